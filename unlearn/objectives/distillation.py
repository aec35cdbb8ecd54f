"""Distributions to learn in place of the forget answer's: each forget token has a target, so the loss has a floor.

`UNDIAL` and `CEU` take a distribution of the model itself with the token pushed down, `PDU` a flat one. They read whole
logits, so what is computed of them is a `Statistic`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, softmax

from lm.errors import UserError
from unlearn.objectives.base import Needs, Objective, Retain, Statistic, Term, TokenStats, Weight
from unlearn.objectives.retain import CrossEntropy, NoRetain
from unlearn.objectives.weight import Dual, Fixed


@dataclass(frozen=True, kw_only=True)
class UNDIAL(Objective):
    """`L = mean_tokens H(softmax(z_original - strength * e_y), p)`: H the cross-entropy, e_y one at the token to forget.

    Self-distillation with that token's logit lowered. No retain term. Source: Dong et al. 2024 (arXiv 2402.10052).
    Badge: **faithful**.
    """

    published_retain: ClassVar[Retain] = NoRetain()
    published_weight: ClassVar[Weight] = Fixed()

    strength: float = 10.0
    """How far the token's logit is lowered; the authors try 3, 10 and 30."""

    def __post_init__(self) -> None:
        if not 0 <= self.strength < math.inf:
            raise UserError(f"strength is {self.strength}: give 0 or more; less would teach what is to be forgotten")

    def forget_needs(self) -> Needs:
        """The original's logits."""
        return Needs(statistics=(Statistic("undial", self.distance, reference=True),))

    def forget_term(self, stats: TokenStats) -> Term:
        """The cross-entropy to the adjusted distribution, summed over supervised tokens."""
        return Term(stats.total(stats.values["undial"]))

    def distance(self, logits: Tensor, targets: Tensor, reference: Tensor | None) -> Tensor:
        """(n,) cross-entropy of logits (n, vocabulary) to the adjusted distribution, nats."""
        assert reference is not None
        lowered = torch.full_like(reference[:, :1], self.strength)
        adjusted = softmax(reference.scatter_add(1, targets[:, None], -lowered), dim=-1)
        return -(adjusted * log_softmax(logits, dim=-1)).sum(dim=-1)


def without_token(logits: Tensor, targets: Tensor, reference: Tensor | None) -> Tensor:
    """(n,) cross-entropy of logits (n, vocabulary) to their own distribution without the target, taken as a constant; nats."""
    others = softmax(logits.detach().scatter(1, targets[:, None], -torch.inf), dim=-1)
    return -(others * log_softmax(logits, dim=-1)).sum(dim=-1)


WITHOUT_TOKEN = Statistic("without_token", without_token)


@dataclass(frozen=True, kw_only=True)
class CEU(Objective):
    """`L = mean_tokens H(q, p)`, q the model's own distribution with the token to forget taken out, as a constant.

    Its gradient is that of the unlikelihood loss `-log(1 - p)`. No retain term. Source: Yang 2025 (arXiv 2503.01224).
    Badge: **variant**: the first answer token counts too, where the published training leaves it out.
    """

    published_retain: ClassVar[Retain] = NoRetain()
    published_weight: ClassVar[Weight] = Fixed()

    def forget_needs(self) -> Needs:
        """The model's own logits."""
        return Needs(statistics=(WITHOUT_TOKEN,))

    def forget_term(self, stats: TokenStats) -> Term:
        """The cross-entropy, summed over supervised tokens."""
        return Term(stats.total(stats.values["without_token"]))


def margin(logits: Tensor, targets: Tensor, reference: Tensor | None) -> Tensor:
    """(n,) the squared distance of the largest of logits (n, vocabulary) from their mean."""
    return (logits.amax(dim=-1) - logits.mean(dim=-1)).square()


MARGIN = Statistic("margin", margin)


@dataclass(frozen=True, kw_only=True)
class PDU(Objective):
    """`L = mean_tokens (max z - mean z)^2 + lambda * CE(retain)`: flat logits, lambda the dual variable of `Dual`.

    The constraint is `CE(retain) <= tolerance`: set `retain_weight.tolerance` somewhat above the model's retain cross-entropy
    before unlearning. Source: Entesari et al. 2025 (arXiv 2506.05314), the numbers from the authors' TOFU runs.
    Badge: **faithful** (the authors' code reads the logits one position later than those that predict the answer).
    """

    published_retain: ClassVar[Retain] = CrossEntropy()
    published_weight: ClassVar[Weight] = Dual(tolerance=0.3, rate=5.0, start=100.0, warmup_epochs=5)

    def forget_needs(self) -> Needs:
        """The model's own logits."""
        return Needs(statistics=(MARGIN,))

    def forget_term(self, stats: TokenStats) -> Term:
        """The squared margins, summed over supervised tokens."""
        return Term(stats.total(stats.values["margin"]))
