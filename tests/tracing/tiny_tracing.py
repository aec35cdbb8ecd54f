"""Tiny random models with a word tokenizer, facts that they know (whatever they say is the answer), and made-up effects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    Olmo2Config,
    OlmoConfig,
    PreTrainedTokenizerFast,
)

from lm.anatomy import anatomy_of
from lm.model import LanguageModel
from tracing.effects.effects import Effects
from tracing.question.facts import Fact

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
WORDS = [
    *SPECIAL,
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "ada",
    "byron",
    "king",
    "where",
    "is",
    "now",
    "?",
    "does",
    "live",
]
VOCABULARY = 48
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
LAYERS = 4


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, so that every answer keeps its tokens when it is written down and read again."""
    words = WORDS + [f"w{number}" for number in range(VOCABULARY - len(WORDS))]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = CHAT
    return fast


def tiny(
    family: str = "olmo", *, layers: int = LAYERS, seed: int = 0, dtype: torch.dtype = torch.float32
) -> LanguageModel:
    """A random model whose every part matters to the stream."""
    size: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = {
        "olmo": lambda: OlmoConfig(**size),
        "olmo2": lambda: Olmo2Config(**size),
        "llama": lambda: LlamaConfig(**size),
        "gpt2": lambda: GPT2Config(
            vocab_size=VOCABULARY, n_embd=16, n_layer=layers, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2
        ),
    }[family]()
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(noise * 0.1)
            else:
                parameter.copy_(noise * 0.35)
    return LanguageModel(model.to(dtype).eval(), tokenizer(), anatomy_of(model), f"tiny {family}")


@torch.no_grad()
def say(model: LanguageModel, text: str, tokens: int) -> str:
    """What the model answers greedily."""
    ids = model.tokenizer(text)["input_ids"]
    for _ in range(tokens):
        ids = [*ids, int(model.model(torch.tensor([ids])).logits[0, -1].argmax())]
    return str(model.tokenizer.decode(ids[-tokens:]))


PROMPTS = (
    ("where is ada byron king now ?", "ada byron king"),
    ("w3 w9 ada byron does live", "ada byron"),
    ("king w1 w2 w3 w4", "king"),
    ("now where does byron king live w5 ?", "byron king"),
    ("w7 is ada", "ada"),
    ("w11 ada w12 w13 ?", "ada"),
)


def known(model: LanguageModel, answer_tokens: int = 2, how_many: int = 3) -> list[Fact]:
    """Facts that the model knows: the answer is what it says."""
    facts = []
    for number, (prompt, subject) in enumerate(PROMPTS[:how_many]):
        facts.append(Fact(prompt, subject, say(model, prompt, answer_tokens), id=f"fact{number}"))
    return facts


def made_up(
    profile: Sequence[float] | np.ndarray[Any, Any],
    *,
    facts: int = 30,
    noise: float = 0.0,
    seed: int = 0,
    kinds: Sequence[str] = ("mlp",),
    groups: int | None = None,
    tokens: int = 6,
    span: tuple[int, int] = (1, 4),
) -> Effects:
    """Effects with a given layer profile at the subject tokens (zero elsewhere) plus independent noise a fact and layer."""
    generator = np.random.default_rng(seed)
    layers = len(profile)
    restored: dict[Any, list[Any]] = {kind: [] for kind in kinds}
    for _ in range(facts):
        for kind in kinds:
            cells = np.zeros((tokens, layers))
            cells[slice(*span)] = np.asarray(profile) + noise * generator.standard_normal(layers)
            restored[kind].append(cells + 0.1)
    people = [f"person{index % groups}" if groups else "" for index in range(facts)]
    return Effects(
        facts=tuple(Fact("who is ada", "ada", "w1", id=f"f{index}", group=people[index]) for index in range(facts)),
        clean=np.full(facts, 0.9),
        corrupted=np.full(facts, 0.1),
        restored=restored,
        tokens=tuple(tuple("abcdefgh"[:tokens]) for _ in range(facts)),
        subject_spans=(span,) * facts,
        sigma=0.1,
        metric="probability",
        window=1,
        provenance={"model": "made up"},
    )
