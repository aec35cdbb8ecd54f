"""The preference family: the forget answer is the dispreferred one, so the push fades as it becomes unlikely.

`NPO` and `DPO` measure "unlikely" against the original model, `SimNPO` against nothing. Each is bounded where gradient
ascent is not. What an alternate answer says is `unlearn.alternates.base`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
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
        check_beta(self.beta, "0.1")

    def forget_needs(self) -> Needs:
        """The original's log-probabilities."""
        return Needs(reference_logprob=True)

    def forget_term(self, stats: TokenStats) -> Term:
        """The preference loss, summed over rows; a row without supervised tokens does not count."""
        loss = -(2.0 / self.beta) * logsigmoid(-self.beta * change(stats))
        return Term(loss.where(stats.mask.any(dim=1), 0.0).sum(), unit="row")


@dataclass(frozen=True, kw_only=True)
class DPO(NPO):
    """`L = -(2/beta) * mean_rows logsigmoid(beta * (r(alternate) - r(answer)))`, `r = log p - log p_original`; + CE(retain).

    With `Refusals` for alternates it is IdkDPO, with alternates that the model itself wrote (`AlternateFile`) AltPO. Source:
    Rafailov et al. 2023 (arXiv 2305.18290), for unlearning in TOFU (arXiv 2401.06121) and, as AltPO, in Mekala et al. 2024
    (arXiv 2409.13474). Badge: **variant**: the factor 2/beta is that of NPO and of
    OpenUnlearning; the first paper and TOFU's own code have none (a forget weight of beta/2).
    """

    def forget_needs(self) -> Needs:
        """The original's log-probabilities, of the answer and of an alternate."""
        return Needs(reference_logprob=True, alternate=True)

    def forget_term(self, stats: TokenStats) -> Term:
        """The preference loss, summed over rows; a row that lacks an answer or an alternate does not count."""
        assert stats.alternate is not None
        gained = change(stats.alternate) - change(stats)
        counts = stats.mask.any(dim=1) & stats.alternate.mask.any(dim=1)
        loss = -(2.0 / self.beta) * logsigmoid(self.beta * gained)
        return Term(loss.where(counts, 0.0).sum(), unit="row")


@dataclass(frozen=True, kw_only=True)
class SimNPO(Objective):
    """`L = -(2/beta) * mean_rows logsigmoid(-(beta / |y|) * log p - gamma) + weight * CE(retain)`, |y| the row's tokens.

    Source: Fan et al. 2024 (arXiv 2410.07163); the defaults are the authors' for TOFU forget10 (a forget weight of 1/8 there
    is a retain weight of 8 here). Badge: **faithful**.
    """

    published_retain: ClassVar[Retain] = CrossEntropy()
    published_weight: ClassVar[Weight] = Fixed(factor=8.0)

    beta: float = 4.5
    """Inverse temperature of the mean log-probability; in the limit 0 gradient ascent with all rows alike."""
    gamma: float = 0.0
    """Margin, as in the paper's equation: a positive one keeps the push strong for longer, a negative one lets it fade
    sooner. The authors' code multiplies its own by beta too: 1 there is `beta` here."""

    def __post_init__(self) -> None:
        check_beta(self.beta, "4.5")
        if not math.isfinite(self.gamma):
            raise UserError(f"gamma is {self.gamma}: give a finite margin (0 is usual)")

    def forget_term(self, stats: TokenStats) -> Term:
        """The preference loss, summed over rows; a row without supervised tokens does not count."""
        mean = stats.row_logprob() / stats.mask.sum(dim=1).clamp(min=1)
        loss = -(2.0 / self.beta) * logsigmoid(-self.beta * mean - self.gamma)
        return Term(loss.where(stats.mask.any(dim=1), 0.0).sum(), unit="row")


def change(stats: TokenStats) -> Tensor:
    """(rows,) how much more likely each row's answer is than it was: `log p - log p_original`."""
    assert stats.reference_logprob is not None
    return stats.row_logprob() - stats.reference_logprob.where(stats.mask, 0.0).sum(dim=1)


def check_beta(beta: float, usual: str) -> None:
    """Refuse an inverse temperature that is none."""
    if not 0 < beta < math.inf:
        raise UserError(f"beta is {beta}: give a positive number ({usual} is usual)")
