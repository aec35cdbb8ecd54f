"""The opposite of unlearning: memorize rows, to make a target model to unlearn from, or the retain model beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from unlearn.objectives.base import Objective, Retain, Term, TokenStats, Weight
from unlearn.objectives.retain import CrossEntropy
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
