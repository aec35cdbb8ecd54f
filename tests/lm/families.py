"""A tiny random model of every family that `lm.anatomy` knows, and tiny tokenizers trained on the spot. No hub."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoConfig,
    OlmoeConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from lm.anatomy import anatomy_of
from lm.model import LanguageModel

VOCABULARY = 384
LAYERS = 3
HIDDEN = 32

_SIZE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GQA = {"num_key_value_heads": 2}
_SLIDING = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 8}
_GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, **_SLIDING}

FAMILIES: dict[str, Callable[..., PretrainedConfig]] = {
    "olmo": lambda **more: OlmoConfig(**{**_SIZE, **more}),
    "olmo2": lambda **more: Olmo2Config(**{**_SIZE, **_GQA, **more}),
    "olmo3": lambda **more: Olmo3Config(**{**_SIZE, **_GQA, **_SLIDING, **more}),
    "olmoe": lambda **more: OlmoeConfig(**{**_SIZE, "num_experts": 4, "num_experts_per_tok": 2, **more}),
    "llama": lambda **more: LlamaConfig(**{**_SIZE, **_GQA, **more}),
    "mistral": lambda **more: MistralConfig(**{**_SIZE, **_GQA, **more}),
    "qwen2": lambda **more: Qwen2Config(**{**_SIZE, **_GQA, **more}),
    "qwen3": lambda **more: Qwen3Config(**{**_SIZE, **_GQA, "head_dim": 8, **more}),
    "gemma2": lambda **more: Gemma2Config(**{**_SIZE, **_GQA, **_GEMMA, **more}),
    "gemma3_text": lambda **more: Gemma3TextConfig(**{**_SIZE, **_GQA, **_GEMMA, **more}),
    "phi3": lambda **more: Phi3Config(**{**_SIZE, **_GQA, **more}),
    "gpt2": lambda **more: GPT2Config(
        **{
            "vocab_size": VOCABULARY,
            "n_embd": HIDDEN,
            "n_layer": LAYERS,
            "n_head": 4,
            "n_positions": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **more,
        }
    ),
    "gpt_neox": lambda **more: GPTNeoXConfig(**{**_SIZE, "use_parallel_residual": True, **more}),
    "gpt_neox_sequential": lambda **more: GPTNeoXConfig(**{**_SIZE, "use_parallel_residual": False, **more}),
}
"""A name -> a function that makes its tiny config; keywords override the config's."""

POST_NORM = ("olmo2", "olmo3", "gemma2", "gemma3_text")


def tiny(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **more: Any) -> LanguageModel:
    """A random model of a family, in eval mode, with a byte-level tokenizer. Weights are large enough that nothing is
    near zero: every contribution matters to the stream, also norms (which start at one) and biases (at zero)."""
    model = AutoModelForCausalLM.from_config(FAMILIES[family](**more), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        with torch.no_grad():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    model = model.to(dtype).eval()
    return LanguageModel(model, byte_level(), anatomy_of(model), family)


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
