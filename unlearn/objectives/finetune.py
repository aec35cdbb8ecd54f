"""No unlearning: memorize rows, to make a target model or the retain model beside it; or push nothing out, and heal alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from unlearn.objectives.base import Objective, Retain, Term, TokenStats, Weight
from unlearn.objectives.retain import CrossEntropy, Divergence
from unlearn.objectives.weight import Fixed


@dataclass(frozen=True, kw_only=True)
class Learn(Objective):
    """`L = CE(forget) + CE(retain)`: ordinary supervised fine-tuning on both sides. Nothing is unlearned with it.

    A retain model is learned from the same start by giving half of the retain rows on each side.
    """

    published_retain: ClassVar[Retain] = CrossEntropy()
    published_weight: ClassVar[Weight] = Fixed()

    def forget_term(self, stats: TokenStats) -> Term:
        """`+CE`: the rows to be forgotten later are learned now."""
        return Term(stats.total(stats.cross_entropy))


@dataclass(frozen=True, kw_only=True)
class NoForget(Objective):
    """`L = KL(original || model)(retain)`: nothing is pushed out, and no forget row is read.

    After a perturbation it heals alone, so that what is gone is gone by the perturbation and not by a loss. A step has its retain
    rows and general text; its places for forget rows stay empty.
    """

    published_retain: ClassVar[Retain] = Divergence(documents=True)
    published_weight: ClassVar[Weight] = Fixed()
    forgets: ClassVar[bool] = False

    def forget_term(self, stats: TokenStats) -> Term:
        """0."""
        return Term(stats.logprob.sum() * 0.0)
