"""Retain terms: what holds the model where it was on the rows to keep. Any of them goes with any objective."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import log_softmax

from lm.errors import UserError
from unlearn.objectives.base import HiddenNeed, Needs, Retain, Statistic, Term, TokenStats


@dataclass(frozen=True, kw_only=True)
class AsPublished(Retain):
    """The one of the objective's paper."""


@dataclass(frozen=True, kw_only=True)
class NoRetain(Retain):
    """Nothing: retain rows are not even read."""


@dataclass(frozen=True, kw_only=True)
class CrossEntropy(Retain):
    """`CE(retain)`: the mean over supervised tokens of minus the log-probability (nats)."""

    def term(self, stats: TokenStats) -> Term:
        """The cross-entropy, summed over supervised tokens."""
        return Term(stats.total(stats.cross_entropy))


class _Divergence(torch.autograd.Function):
    """Its slope, `softmax(logits) - p_original`, is made while the logits are at hand: a third of what the graph of the formula
    passes through memory, which is most of a small model's step."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, reference: Tensor) -> Tensor:
        original_logprob, logprob = log_softmax(reference, dim=-1), log_softmax(logits, dim=-1)
        original = original_logprob.exp()
        values = original_logprob.sub_(logprob).mul_(original).sum(dim=-1)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(logprob.exp_().sub_(original))
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (slope,) = ctx.saved_tensors
        return gradient[:, None] * slope, None


def divergence(logits: Tensor, targets: Tensor, reference: Tensor | None) -> Tensor:
    """KL(original || model) over the vocabulary, (n,), of logits (n, vocabulary), nats."""
    assert reference is not None
    values: Tensor = _Divergence.apply(logits, reference)  # type: ignore[no-untyped-call]
    return values


DIVERGENCE = Statistic("divergence", divergence, reference=True)


@dataclass(frozen=True, kw_only=True)
class Divergence(Retain):
    """`KL(original || model)` over the whole vocabulary, the mean over supervised tokens (nats).

    Source: TOFU (arXiv 2401.06121). Badge: **variant**: supervised tokens only, where TOFU's code takes all.
    """

    documents: bool = False
    """Supervise completions whole, from their second token on, and not their answers alone."""

    def needs(self) -> Needs:
        """The original's logits."""
        return Needs(statistics=(DIVERGENCE,), documents=self.documents)

    def term(self, stats: TokenStats) -> Term:
        """The divergence, summed over supervised tokens."""
        return Term(stats.total(stats.values["divergence"]))


@dataclass(frozen=True, kw_only=True)
class Blend(Retain):
    """`cross_entropy * CE(retain) + divergence * KL(original || model)(retain)`, both means over supervised tokens (nats).

    As two SemEval-2025 Task 4 systems hold the retain rows: ZJUKLAB (arXiv 2503.21088) and Atyaephyra (arXiv 2503.13690).
    Badge: **variant**: the divergence is that of `Divergence`.
    """

    cross_entropy: float = 1.0
    """What the cross-entropy counts."""
    divergence: float = 1.0
    """What the divergence counts."""

    def __post_init__(self) -> None:
        if not (0 <= self.cross_entropy < math.inf and 0 <= self.divergence < math.inf):
            raise UserError(
                f"retain_loss.cross_entropy is {self.cross_entropy} and .divergence {self.divergence}: give 0 or more"
            )

    def needs(self) -> Needs:
        """The original's logits."""
        return Needs(statistics=(DIVERGENCE,))

    def term(self, stats: TokenStats) -> Term:
        """The weighted sum of both, summed over supervised tokens."""
        both = self.cross_entropy * stats.cross_entropy + self.divergence * stats.values["divergence"]
        return Term(stats.total(both))


@dataclass(frozen=True, kw_only=True)
class HiddenDistance(Retain):
    """Mean over tokens and dimensions of `(h - h_original)^2` at one layer, as in RMU (Li et al. 2024, arXiv 2403.03218).

    Badge: **variant**: without the padding that the authors' code counts.
    """

    layer: int
    """The stream after this block, from 0."""
    tokens: Literal["all", "answer"] = "all"
    """All tokens of a row, as published, or those of its answer."""

    def __post_init__(self) -> None:
        if self.layer < 0:
            raise UserError(f"retain_loss.layer is {self.layer}: give a layer from 0")

    def needs(self) -> Needs:
        """Hidden states of both models, and nothing above that layer."""
        return Needs(logprob=False, hidden=HiddenNeed(self.layer, self.tokens, reference=True))

    def term(self, stats: TokenStats) -> Term:
        """The squared distance, its mean over dimensions, summed over the rows' tokens."""
        states, reference_states = wanted_states(stats, stats.hidden), wanted_states(stats, stats.reference_hidden)
        return Term((states - reference_states).square().mean(dim=-1).sum(), unit="hidden")


def wanted_states(stats: TokenStats, hidden: Tensor | None) -> Tensor:
    """(n, hidden) the states of the tokens asked for, row by row, in float32 at least."""
    assert hidden is not None
    assert stats.hidden_mask is not None
    chosen = hidden[stats.hidden_mask]
    return chosen.to(torch.promote_types(chosen.dtype, torch.float32))
