"""Trains one built-in model: a tiny OLMo, from a fixed start, on a corpus, until it knows its rows by heart.

A plain loop in float32 on the CPU: AdamW, cosine learning rate, batches of sequences of like length. It stops early when
every row is recited with room to spare, also after rounding to float16. It is not the trainer that unlearns: that is
`unlearn.training.loop`.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax
from torch.nn.utils.rnn import pad_sequence
from transformers import OlmoConfig, OlmoForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from tools.builtin_model.corpus import Corpus, Example, batches

IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The size of the model. The defaults make 1.9 million parameters: 3.8 MB in float16."""

    layers: int = 8
    hidden: int = 128
    intermediate: int = 384
    heads: int = 4
    positions: int = 512


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is trained: for `steps` at most, on batches of `tokens` tokens counting their padding. `confidence`
    ends the training early: the probability that every token of every row's answer must then have, raw and in chat."""

    steps: int = 3200
    tokens: int = 1024
    learning_rate: float = 1.5e-3
    final_share: float = 0.02
    warmup_steps: int = 100
    weight_decay: float = 0.05
    confidence: float = 0.6
    check_every: int = 100
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a training stands; `recited` and `confidence` are of the last check (0 before it)."""

    step: int
    loss: float
    tokens: int
    recited: float
    confidence: float


@dataclass(frozen=True, kw_only=True)
class Recital:
    """How well rows are known: the share recited without an error, and the smallest token probability in any answer."""

    share: float
    confidence: float


def new_model(tokenizer: PreTrainedTokenizerFast, shape: Shape, seed: int) -> OlmoForCausalLM:
    """A fresh tiny OLMo; the same seed gives the same weights, and the global random state is left as it was."""
    config = OlmoConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=shape.positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return OlmoForCausalLM(config)


def train(
    model: OlmoForCausalLM, corpus: Corpus, recipe: Recipe, report: Callable[[Progress], None] = lambda progress: None
) -> int:
    """Train `model` in place; returns the number of tokens seen. `report` is called after every step."""
    generator = random.Random(f"training {recipe.seed}")
    weights = list(model.parameters())
    optimizer = torch.optim.AdamW(
        weights, lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=recipe.weight_decay, fused=True
    )
    wanted = [corpus.pair(row.input, row.output) for row in corpus.rows]
    wanted += [corpus.chat(row.input, row.output) for row in corpus.rows]
    queue: list[list[Example]] = []
    tokens = 0
    recital = Recital(share=0.0, confidence=0.0)
    for step in range(1, recipe.steps + 1):
        if not queue:
            queue = batches(corpus.epoch(generator), recipe.tokens, generator)
        batch = queue.pop()
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * _share(step - 1, recipe)
        nn.Module.train(model)
        loss = token_losses(model, batch).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tokens += sum(len(example.ids) for example in batch)
        if step % recipe.check_every == 0 and step >= recipe.steps // 2:
            recital = recite(rounded(model), wanted)
        report(
            Progress(step=step, loss=loss.item(), tokens=tokens, recited=recital.share, confidence=recital.confidence)
        )
        if recital.share == 1.0 and recital.confidence >= recipe.confidence:
            break
    nn.Module.eval(model)
    return tokens


def token_losses(model: PreTrainedModel, batch: Sequence[Example]) -> Tensor:
    """Negative log-likelihoods (nats) of all supervised tokens of a batch, in order: shape (supervised tokens,)."""
    ids, labels = _padded(batch)
    logits = nn.Module.__call__(model, input_ids=ids, use_cache=False).logits[:, :-1]
    targets = labels[:, 1:]
    counted = targets != IGNORED
    return cross_entropy(logits[counted].float(), targets[counted], reduction="none")


@torch.no_grad()
def recite(model: PreTrainedModel, examples: Sequence[Example]) -> Recital:
    """How well `examples` are known. When every supervised token is the most likely one given the right ones before
    it, greedy generation from the prompt gives exactly the rest: this is the bound that the models must meet."""
    right, lowest = 0, 1.0
    nn.Module.eval(model)
    for batch in batches(examples, 8192, random.Random(0)):
        ids, labels = _padded(batch)
        scores = log_softmax(nn.Module.__call__(model, input_ids=ids, use_cache=False).logits[:, :-1].float(), dim=-1)
        targets = labels[:, 1:]
        counted = targets != IGNORED
        matches = scores.argmax(-1) == targets
        right += int((matches | ~counted).all(1).sum())
        chosen = scores.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        lowest = min(lowest, math.exp(float(chosen[counted].min())))
    return Recital(share=right / len(examples), confidence=lowest)


def rounded(model: OlmoForCausalLM) -> OlmoForCausalLM:
    """A float32 copy of the model with its weights rounded to float16, as they are shipped."""
    stored = copy.deepcopy(model)
    for parameter in stored.parameters():
        parameter.data = parameter.data.half().float()
    return stored


def _share(step: int, recipe: Recipe) -> float:
    """Warm-up, then a cosine from 1 down to `final_share`."""
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return recipe.final_share + (1 - recipe.final_share) * (1 + math.cos(math.pi * done)) / 2


def _padded(batch: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Token ids and labels, (sequences, longest); padding stands on the right and is not counted."""
    ids = [torch.tensor(example.ids) for example in batch]
    labels = [torch.tensor([IGNORED] * example.start + [*example.ids[example.start :]]) for example in batch]
    return pad_sequence(ids, batch_first=True), pad_sequence(labels, batch_first=True, padding_value=IGNORED)
