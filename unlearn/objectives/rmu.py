"""Representation misdirection: forget rows are steered, at one layer, to a random direction. No answer is read at all."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lm.errors import UserError
from unlearn.objectives.base import HiddenNeed, Needs, Objective, Retain, Term, TokenStats, Weight
from unlearn.objectives.retain import HiddenDistance, wanted_states
from unlearn.objectives.weight import Fixed


@dataclass(frozen=True, kw_only=True)
class RMU(Objective):
    """`L = mean_tokens mean_dims (h - scale * u)^2 + 1200 * mean_tokens mean_dims (h - h_original)^2(retain)`.

    h is the stream after block `layer`, u one random unit vector with positive entries. Source: Li et al. 2024 (arXiv
    2403.03218) with the authors' numbers for a 7B model, which trains the MLPs' last matrices in blocks `layer - 2` to `layer`.
    Badge: **variant**: one vector for all rows, where the authors draw one a topic; both terms are means over dimensions as in
    their code, and over tokens without the padding that theirs counts.
    """

    published_weight: ClassVar[Weight] = Fixed(factor=1200.0)

    layer: int
    """The stream after this block, from 0. The scope should hold this block or some below it; none above it learns."""
    scale: float = 6.5
    """Length of the vector to steer to."""
    seed: int = 0
    """Of its direction."""
    tokens: Literal["all", "answer"] = "all"
    """All tokens of a row, as published, or those of its answer."""

    def __post_init__(self) -> None:
        if self.layer < 0:
            raise UserError(f"objective.layer is {self.layer}: give a layer from 0")
        if not 0 < self.scale < math.inf:
            raise UserError(f"objective.scale is {self.scale}: give a positive length (6.5 is usual)")

    @property
    def published_retain(self) -> Retain:  # type: ignore[override]  # it depends on the layer
        """The distance from the original model's states, at the same layer."""
        return HiddenDistance(layer=self.layer, tokens=self.tokens)

    def forget_needs(self) -> Needs:
        """Hidden states, and nothing above that layer."""
        return Needs(logprob=False, hidden=HiddenNeed(self.layer, self.tokens))

    def forget_term(self, stats: TokenStats) -> Term:
        """The squared distance from the target, its mean over dimensions, summed over the rows' tokens."""
        hidden = wanted_states(stats, stats.hidden)
        target = self.length(stats, hidden) * direction(hidden.shape[-1], self.seed).to(hidden)
        return Term((hidden - target).square().mean(dim=-1).sum(), unit="hidden")

    def length(self, stats: TokenStats, hidden: Tensor) -> Tensor:
        """(n, 1), or () for all alike: how long the vector is that each token's state (n, hidden) is steered to."""
        return hidden.new_tensor(self.scale)


@dataclass(frozen=True, kw_only=True)
class AdaptiveRMU(RMU):
    """RMU with `scale * |h_original|` for the length: it fits layers of any norm, also late ones.

    Source: Dang et al. 2025 (arXiv 2408.06223). Badge: **variant**: the norm is the mean over the row's own tokens, where the
    equation has each token's (the first token's is a hundred times the others') and the authors' code the first batch's mean.
    """

    scale: float = 5.0
    """Length of the vector to steer to, in norms of the original state."""

    def forget_needs(self) -> Needs:
        """Hidden states of both models, and nothing above that layer."""
        return Needs(logprob=False, hidden=HiddenNeed(self.layer, self.tokens, reference=True))

    def length(self, stats: TokenStats, hidden: Tensor) -> Tensor:
        """(n, 1): `scale` times the mean norm of the original's states in the token's own row."""
        assert stats.hidden_mask is not None
        norms = wanted_states(stats, stats.reference_hidden).norm(dim=-1)
        counts = stats.hidden_mask.sum(dim=1)
        row = torch.arange(len(counts), device=norms.device).repeat_interleave(counts)
        means = norms.new_zeros(len(counts)).index_add(0, row, norms) / counts.clamp(min=1)
        lengths: Tensor = self.scale * means[row, None]
        return lengths


def direction(dimensions: int, seed: int) -> Tensor:
    """(dimensions,) a random unit vector with positive entries, float32 on the CPU: the same for a seed everywhere."""
    drawn = torch.rand(dimensions, generator=torch.Generator().manual_seed(seed))
    unit: Tensor = drawn / drawn.norm()
    return unit
