"""Gradient ascent that leaves a token alone the less likely it has become: weighted (WGA, SatImp) or bounded by its form.

The first two multiply each token's ascent by a weight that is taken as a constant, the third is a loss whose slope is that
weight: `GeneralizedCrossEntropy(q)` and `WGA(alpha=q)` have equal gradients, but only the former's value is what falls.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from lm.errors import UserError
from unlearn.objectives.base import Objective, Retain, Term, TokenStats, Weight
from unlearn.objectives.retain import CrossEntropy
from unlearn.objectives.weight import Fixed


@dataclass(frozen=True, kw_only=True)
class WGA(Objective):
    """`L = mean_tokens p^alpha * log p + CE(retain)`, the weight `p^alpha` taken as a constant.

    Source: Wang et al. 2025 (arXiv 2502.19301), weighted gradient ascent. Badge: **faithful**.
    """

    published_retain: ClassVar[Retain] = CrossEntropy()
    published_weight: ClassVar[Weight] = Fixed()

    alpha: float = 1.0
    """How fast the push fades with the token's probability; 0 is gradient ascent."""

    def __post_init__(self) -> None:
        check_exponent("alpha", self.alpha)

    def forget_term(self, stats: TokenStats) -> Term:
        """The weighted ascent, summed over supervised tokens."""
        weight = (self.alpha * stats.logprob.detach()).exp()
        return Term(stats.total(weight * stats.logprob))


@dataclass(frozen=True, kw_only=True)
class SatImp(Objective):
    """`L = mean_tokens p^beta1 * (1 - p)^beta2 * log p + 0.1 * CE(retain)`, the weight taken as a constant.

    Source: Yang et al. 2025 (arXiv 2505.11953), saturation and importance. Badge: **faithful** in its form; the sources
    disagree in numbers. Defaults and the retain weight are those of the authors' trainer in OpenUnlearning; their own
    repository takes `beta1` from the command line, has 0.2 for `beta2` in its configs and 5 in its code.
    """

    published_retain: ClassVar[Retain] = CrossEntropy()
    published_weight: ClassVar[Weight] = Fixed(factor=0.1)

    beta1: float = 5.0
    """Saturation: how fast the push fades with the token's probability; 0 and `beta2` 0 are gradient ascent."""
    beta2: float = 1.0
    """Importance: how much less the most likely tokens are pushed."""

    def __post_init__(self) -> None:
        check_exponent("beta1", self.beta1)
        check_exponent("beta2", self.beta2)

    def forget_term(self, stats: TokenStats) -> Term:
        """The weighted ascent, summed over supervised tokens."""
        logprob = stats.logprob.detach()
        weight = (self.beta1 * logprob).exp() * (-torch.expm1(logprob)).clamp(min=0.0).pow(self.beta2)
        return Term(stats.total(weight * stats.logprob))


@dataclass(frozen=True, kw_only=True)
class GeneralizedCrossEntropy(Objective):
    """`L = -mean_tokens (1 - p^q) / q + CE(retain)`: it falls no further than `-1/q`, where `-CE` falls for ever.

    The comp-sum losses between cross-entropy (q to 0) and the mean absolute error `1 - p` (q = 1). Source: Mao, Mohri & Zhong
    2023 (arXiv 2304.07288), the family, of Zhang & Sabuncu 2018 (arXiv 1805.07836); both learn with it. Badge:
    **reconstruction**: taken here in place of the unbounded forget term of the joint method, in which neither paper has it.
    """

    formerly: ClassVar[tuple[str, ...]] = ("GeneralisedCrossEntropy",)
    published_retain: ClassVar[Retain] = CrossEntropy()
    published_weight: ClassVar[Weight] = Fixed()

    q: float = 0.7
    """From 0 (excluded: gradient ascent) to 1 (mean absolute error)."""

    def __post_init__(self) -> None:
        if not 0 < self.q <= 1:
            raise UserError(f"q is {self.q}: give more than 0 (near cross-entropy) and at most 1 (mean absolute error)")

    def forget_term(self, stats: TokenStats) -> Term:
        """Minus the bounded loss, summed over supervised tokens."""
        return Term(stats.total(torch.expm1(self.q * stats.logprob) / self.q))


def check_exponent(name: str, value: float) -> None:
    """Refuse a negative exponent: it would push hardest what is gone already, without a bound."""
    if not 0 <= value < math.inf:
        raise UserError(f"{name} is {value}: give 0 or more")
