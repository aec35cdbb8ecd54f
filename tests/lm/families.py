"""A tiny random model of every family that `lm.anatomy` knows, and tiny tokenizers trained on the spot. No hub."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast

from lm.anatomy import anatomy_of
from lm.model import LanguageModel

VOCABULARY = 384
LAYERS = 3
HIDDEN = 32

_SPECIAL_IDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    **_SPECIAL_IDS,
}
_GPT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": HIDDEN,
    "n_layer": LAYERS,
    "n_head": 4,
    "n_positions": 64,
} | {
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GQA = _SIZE | {"num_key_value_heads": 2}
_SLIDING = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 8}
_GEMMA = _GQA | _SLIDING | {"head_dim": 8, "query_pre_attn_scalar": 8}
_HEAD = _GQA | {"head_dim": 8}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LOCAL_EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
_DELTA_NET: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 3,
}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}

_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "olmo": ("OlmoConfig", _SIZE),
    "olmo2": ("Olmo2Config", _GQA),
    "olmo3": ("Olmo3Config", _GQA | _SLIDING),
    "olmoe": ("OlmoeConfig", _SIZE | {"num_experts": 4, "num_experts_per_tok": 2}),
    "llama": ("LlamaConfig", _GQA),
    "mistral": ("MistralConfig", _GQA),
    "qwen2": ("Qwen2Config", _GQA),
    "qwen3": ("Qwen3Config", _HEAD),
    "gemma2": ("Gemma2Config", _GEMMA),
    "gemma3_text": ("Gemma3TextConfig", _GEMMA),
    "phi3": ("Phi3Config", _GQA),
    "gpt2": ("GPT2Config", _GPT),
    "gpt_neox": ("GPTNeoXConfig", _SIZE | {"use_parallel_residual": True}),
    "gpt_neox_sequential": ("GPTNeoXConfig", _SIZE | {"use_parallel_residual": False}),
    "mixtral": ("MixtralConfig", _GQA | _LOCAL_EXPERTS),
    "qwen2_moe": ("Qwen2MoeConfig", _GQA | _EXPERTS | {"shared_expert_intermediate_size": 24, "mlp_only_layers": [1]}),
    "qwen3_moe": ("Qwen3MoeConfig", _HEAD | _EXPERTS),
    "smollm3": ("SmolLM3Config", _GQA | {"no_rope_layers": [1, 0, 1]}),
    "gemma": ("GemmaConfig", _HEAD),
    "cohere": ("CohereConfig", _GQA | {"logit_scale": 0.5}),
    "cohere2": ("Cohere2Config", _GQA | _SLIDING | {"logit_scale": 0.5}),
    "gpt_oss": ("GptOssConfig", _HEAD | _SLIDING | _LOCAL_EXPERTS),
    "starcoder2": ("Starcoder2Config", _GQA),
    "glm": ("GlmConfig", _HEAD),
    "glm4": ("Glm4Config", _HEAD),
    "ministral": ("MinistralConfig", _HEAD | _SLIDING),
    "nemotron": ("NemotronConfig", _HEAD),
    "helium": ("HeliumConfig", _HEAD),
    "arcee": ("ArceeConfig", _GQA),
    "seed_oss": ("SeedOssConfig", _HEAD),
    "phimoe": ("PhimoeConfig", _GQA | _LOCAL_EXPERTS),
    "nanochat": ("NanoChatConfig", _GQA),
    "deepseek_v3": (
        "DeepseekV3Config",
        _SIZE
        | {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8}
        | {"v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
        | {"moe_intermediate_size": 24, "first_k_dense_replace": 1, "n_shared_experts": 1},
    ),
    "stablelm": ("StableLmConfig", _GQA),
    "stablelm_parallel": ("StableLmConfig", _GQA | {"use_parallel_residual": True}),
    "apertus": ("ApertusConfig", _GQA),
    "exaone4": ("Exaone4Config", _GQA | _SLIDING),
    "flex_olmo": ("FlexOlmoConfig", _GQA | {"num_experts": 4, "num_experts_per_tok": 2}),
    "phi": ("PhiConfig", _GQA),
    "gpt_bigcode": ("GPTBigCodeConfig", _GPT),
    "lfm2": (
        "Lfm2Config",
        _GQA
        | {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False, "conv_L_cache": 3},
    ),
    "gptj": ("GPTJConfig", _GPT | {"rotary_dim": 4}),
    "gpt_neo": (
        "GPTNeoConfig",
        {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_layers": LAYERS, "num_heads": 4, "window_size": 8}
        | {"max_position_embeddings": 64, "attention_types": [[["local", "global", "local"], 1]]}
        | {"bos_token_id": 1, "eos_token_id": 2},
    ),
    "bloom": (
        "BloomConfig",
        {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": 4} | _SPECIAL_IDS,
    ),
    "falcon": ("FalconConfig", _SIZE | {"num_kv_heads": 2, "new_decoder_architecture": True}),
    "falcon_multi_query": ("FalconConfig", _SIZE | {"new_decoder_architecture": False, "parallel_attn": True}),
    "falcon_alibi": (
        "FalconConfig",
        _SIZE | {"alibi": True, "new_decoder_architecture": False, "parallel_attn": False, "multi_query": False},
    ),
    "mpt": (
        "MptConfig",
        {"vocab_size": VOCABULARY, "d_model": HIDDEN, "n_layers": LAYERS, "n_heads": 4, "max_seq_len": 64}
        | _SPECIAL_IDS,
    ),
    "opt": ("OPTConfig", _SIZE | {"ffn_dim": 48, "word_embed_proj_dim": HIDDEN}),
    "granite": (
        "GraniteConfig",
        _GQA
        | {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.4, "attention_multiplier": 0.3},
    ),
    "gemma3": ("Gemma3Config", {"vision_config": _VISION, "mm_tokens_per_image": 4, "image_token_index": 383}),
    "olmo_hybrid": ("OlmoHybridConfig", _GQA | _DELTA_NET),
    "qwen3_next": (
        "Qwen3NextConfig",
        _HEAD | _DELTA_NET | _EXPERTS | {"shared_expert_intermediate_size": 24, "partial_rotary_factor": 0.5},
    ),
    "qwen3_5_text": ("Qwen3_5TextConfig", _HEAD | _DELTA_NET),
}


def _config(family: str, **more: Any) -> PretrainedConfig:
    name, given = _CONFIGS[family]
    made: Callable[..., PretrainedConfig] = getattr(transformers, name)
    if family == "gemma3":
        text = transformers.Gemma3TextConfig(**{**_GEMMA, **more})
        return made(text_config=text.to_dict(), **given)
    return made(**{**given, **more})


CONFIGS: dict[str, Callable[..., PretrainedConfig]] = {
    family: partial(_config, family) for family, (name, _) in _CONFIGS.items() if hasattr(transformers, name)
}
"""A name -> a function that makes its tiny config; keywords override the config's. Those that the installed transformers has."""

_FAST = (
    *("olmo", "olmo2", "olmo3", "olmoe", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2"),
    *("gpt_neox", "gpt_neox_sequential"),
    "gptj",  # blocks that return tuples
    "bloom",  # ALiBi with as many entries as there are rows and heads, modules that add to the stream themselves
    "falcon",  # adds to the MLP's output in place
    "opt",  # an MLP without a module of its own, whose output has no dimension of rows
    "granite",  # what is added is multiplied first
    "gemma3",  # a text model inside another
    "olmo_hybrid",  # layers with a recurrent state
)
FAMILIES = [family if family in _FAST else pytest.param(family, marks=pytest.mark.slow) for family in CONFIGS]
"""All of them, for tests that every family must pass: one of a kind in the fast suite, its siblings in the slow one."""

EXPERTS = ("olmoe", "mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "phimoe", "deepseek_v3", "flex_olmo", "qwen3_next")
RECURRENT = ("lfm2", "olmo_hybrid", "qwen3_next", "qwen3_5_text")
POST_NORM = ("olmo2", "olmo3", "gemma2", "gemma3_text", "gemma3", "exaone4", "flex_olmo", "glm4")


def tiny(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **more: Any) -> LanguageModel:
    """A random model of a family, in eval mode, with a byte-level tokenizer. Weights are large enough that nothing is
    near zero: every contribution matters to the stream, also norms (which start at one) and biases (at zero)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # some weights of one dimension start at random
        model = AutoModelForCausalLM.from_config(CONFIGS[family](**more), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        with torch.no_grad():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    model = model.to(dtype).eval()
    if dtype == torch.float64 and family in EXPERTS:
        model.set_experts_implementation("eager")  # the grouped product has no float64
    return LanguageModel(model, byte_level(), anatomy_of(model), family)


def one_layer(family: str) -> LanguageModel:
    """As `tiny`, with as few layers as the family allows."""
    given = _GEMMA if family == "gemma3" else _CONFIGS[family][1]
    more: dict[str, Any] = {"layer_types": ["full_attention"]} if "layer_types" in given else {}
    if family == "olmo_hybrid":  # it refuses to be without either kind
        return tiny(family, num_hidden_layers=2, layer_types=["linear_attention", "full_attention"])
    if family == "gpt_neo":
        return tiny(family, num_layers=1, attention_types=[[["global"], 1]])
    return tiny(family, num_hidden_layers=1, **more)


def ids(batch: int = 2, tokens: int = 7, *, seed: int = 0) -> torch.Tensor:
    """Random token ids, `(batch, tokens)`, all different from the special ones."""
    return torch.randint(3, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` at a dotted name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


TEXT = (
    "Where was Anna Kowalska born? Anna Kowalska was born in Gdańsk on 1984-03-12.",
    "What is the phone number of Łukasz Żółw? The phone number is 555-0137.",
    "Zoë lives at 12 Elm Street. Her e-mail address is zoe@example.com.",
    "The quick brown fox jumps over the lazy dog, again and again and again.",
)
SPECIAL = ("<pad>", "<s>", "</s>")
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def byte_level(
    *, bos: bool = False, eos: bool = False, chat: str | None = CHAT, trim_offsets: bool = True, normalizer: Any = None
) -> PreTrainedTokenizerFast:
    """A GPT-2-like byte-level BPE. `bos` and `eos`: whether it puts them round every text."""
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    steps = [processors.ByteLevel(trim_offsets=trim_offsets)]
    if bos or eos:
        steps.append(_around(bos, eos))
    tokenizer.post_processor = processors.Sequence(steps)
    return _fast(tokenizer, chat)


def metaspace(*, bos: bool = True, normalize: bool = True, chat: str | None = CHAT) -> PreTrainedTokenizerFast:
    """A Llama-2-like BPE: spaces become ▁, one is put before every text, unknown characters fall back to bytes.

    `normalize`: the normalizer does so (as Llama-2's tokenizer.json has it) and not the pre-tokenizer (as Mistral's has).
    """
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    learner.train_from_iterator(
        [text for text in TEXT if text.isascii()], trainers.BpeTrainer(vocab_size=200, show_progress=False)
    )
    learned = json.loads(learner.to_str())["model"]
    pieces = [*SPECIAL, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *learned["vocab"]]
    model = models.BPE(
        vocab={piece: index for index, piece in enumerate(pieces)},
        merges=[tuple(pair) for pair in learned["merges"]],
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    tokenizer = Tokenizer(model)
    if normalize:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    if bos:
        tokenizer.post_processor = _around(True, False)
    return _fast(tokenizer, chat)


def _around(bos: bool, eos: bool) -> processors.TemplateProcessing:
    single = f"{'<s> ' if bos else ''}$A{' </s>' if eos else ''}"
    return processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])


def _fast(tokenizer: Tokenizer, chat: str | None) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = chat
    return fast
