"""The gradient-ascent family: baselines that push the forget cross-entropy up, alone, or with a retain term."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lm.errors import UserError
from unlearn.objectives.base import Objective, Retain, Term, TokenStats, Weight
from unlearn.objectives.retain import CrossEntropy, Divergence, NoRetain
from unlearn.objectives.weight import Fixed


@dataclass(frozen=True, kw_only=True)
class GradientAscent(Objective):
    """`L = -CE(forget)`. Source: Jang et al. 2022 (arXiv 2210.01504). Badge: **faithful** with `forget_cap: null`."""

    published_retain: ClassVar[Retain] = NoRetain()
    published_weight: ClassVar[Weight] = Fixed()

    forget_cap: float | None = None
    """Nats a token beyond which a forget token is not pushed further; null is the published form."""

    def __post_init__(self) -> None:
        if self.forget_cap is not None and not self.forget_cap > 0:
            raise UserError(
                f"forget_cap is {self.forget_cap}: give a positive number of nats a token, or null for no cap"
            )

    def forget_term(self, stats: TokenStats) -> Term:
        """`-CE`, each token stopped at the cap."""
        return Term(ascent(stats, self.forget_cap))


@dataclass(frozen=True, kw_only=True)
class GradientDifference(GradientAscent):
    """`L = -CE(forget) + CE(retain)`. Source: Liu et al. 2022 (arXiv 2203.12817), as in TOFU. Badge: **faithful**."""

    published_retain: ClassVar[Retain] = CrossEntropy()


@dataclass(frozen=True, kw_only=True)
class KLMinimization(GradientAscent):
    """`L = -CE(forget) + KL(original || model)(retain)`, over the whole vocabulary at each supervised token.

    Source: TOFU (arXiv 2401.06121), section on KL minimization. Badge: **variant**: the divergence is taken on supervised
    tokens only, where TOFU's code takes all.
    """

    formerly: ClassVar[tuple[str, ...]] = ("KLMinimisation",)
    published_retain: ClassVar[Retain] = Divergence()


def ascent(stats: TokenStats, cap: float | None) -> Tensor:
    """Minus the forget cross-entropy, summed: `-sum(min(CE, cap))`.

    Nothing bounds `-CE`: it falls for ever, and with it the model. `cap` (nats a token) is the guard: a token whose
    cross-entropy passed it has no gradient any more, so each token is pushed until it is forgotten and no further.
    None is the published form.
    """
    cross_entropy = stats.cross_entropy
    return -stats.total(cross_entropy if cap is None else torch.clamp(cross_entropy, max=cap))
