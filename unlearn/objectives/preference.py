"""The preference family: negative preference optimisation, bounded where gradient ascent is not."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch.nn.functional import logsigmoid

from lm.errors import UserError
from unlearn.objectives.base import Needs, Objective, Retain, Term, TokenStats, Weight
from unlearn.objectives.retain import CrossEntropy
from unlearn.objectives.weight import Fixed


@dataclass(frozen=True, kw_only=True)
class NPO(Objective):
    """`L = -(2/beta) * mean_rows logsigmoid(-beta * (log p - log p_original)) + weight * CE(retain)`.

    `log p` is summed over the supervised tokens of a row. Source: Zhang et al. 2024 (arXiv 2404.05868), equation 3; with
    the retain term `NoRetain` it is NPO alone, with `CrossEntropy` its retain version. Badge: **faithful**.
    """

    published_retain: ClassVar[Retain] = CrossEntropy()
    published_weight: ClassVar[Weight] = Fixed()

    beta: float = 0.1
    """Inverse temperature; gradient ascent in the limit 0."""

    def __post_init__(self) -> None:
        if not 0 < self.beta < math.inf:
            raise UserError(f"beta is {self.beta}: give a positive number (0.1 is usual)")

    def forget_needs(self) -> Needs:
        """The original's log-probabilities."""
        return Needs(reference_logprob=True)

    def forget_term(self, stats: TokenStats) -> Term:
        """The preference loss, summed over rows; a row without supervised tokens does not count."""
        assert stats.reference_logprob is not None
        change = stats.row_logprob() - (stats.reference_logprob * stats.mask).sum(dim=1)
        loss = -(2.0 / self.beta) * logsigmoid(-self.beta * change)
        return Term((loss * stats.mask.any(dim=1)).sum(), unit="row")
