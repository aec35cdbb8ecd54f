"""Something else to say instead: an alternate answer is learned, alone (`LearnAlternate`) or against the old one (`FLAT`).

What the alternates are, refusals, random tokens or a file's, is `unlearn.alternates.base`. DPO, which also takes alternates, is
`unlearn.objectives.preference`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from unlearn.objectives.base import Needs, Objective, Retain, Term, TokenStats, Weight
from unlearn.objectives.retain import CrossEntropy, NoRetain
from unlearn.objectives.weight import Fixed


@dataclass(frozen=True, kw_only=True)
class LearnAlternate(Objective):
    """`L = mean_rows CE(alternate) + CE(retain)`: another answer is learned in place of the one to forget.

    With `Refusals` it is IdkNLL, the "I don't know" baseline of TOFU (arXiv 2401.06121); with `RandomTokens` the random
    pseudo-token targets of YNU (ACL 2025.semeval-1.264), whose details are not published. Badge: **variant**: each row counts
    alike, where TOFU's code averages over the tokens of forget and retain rows together; with `RandomTokens`
    **reconstruction**.
    """

    published_retain: ClassVar[Retain] = CrossEntropy()
    published_weight: ClassVar[Weight] = Fixed()

    def forget_needs(self) -> Needs:
        """The alternate's log-probabilities; the answer's are measured beside them."""
        return Needs(alternate=True)

    def forget_term(self, stats: TokenStats) -> Term:
        """Each row's mean cross-entropy of its alternate, summed over rows; a row without one does not count."""
        assert stats.alternate is not None
        return Term(-mean_over_row(stats.alternate, stats.alternate.logprob).sum(), unit="row")


@dataclass(frozen=True, kw_only=True)
class FLAT(Objective):
    """`L = mean_rows f*(g(P)) - g(P_alternate)`, P a row's mean probability of its tokens; no retain term.

    Minus the variational form of an f-divergence between alternate and forget answer:

    | divergence | g(P) | f*(g(P)) |
    |---|---|---|
    | total_variation | tanh(P) / 2 | tanh(P) / 2 |
    | kl | P | exp(P - 1) |
    | jensen_shannon | log 2 - log(1 + exp(-P)) | P + log(1 + exp(-P)) - log 2 |
    | pearson | P | P^2 / 4 + P |

    Source: Wang et al. 2025 (arXiv 2410.11143), with `Refusals` for alternates. Badge: **faithful** (the authors' code averages
    P over prompt and padding too, which counts them as 0).
    """

    published_retain: ClassVar[Retain] = NoRetain()
    published_weight: ClassVar[Weight] = Fixed()

    divergence: Literal["total_variation", "kl", "jensen_shannon", "pearson"] = "total_variation"
    """Which f-divergence."""

    def forget_needs(self) -> Needs:
        """Log-probabilities of the answer and of an alternate."""
        return Needs(alternate=True)

    def forget_term(self, stats: TokenStats) -> Term:
        """The loss, summed over rows; a row that lacks an answer or an alternate does not count."""
        assert stats.alternate is not None
        answer, alternate = (mean_over_row(one, one.logprob.exp()) for one in (stats, stats.alternate))
        counts = stats.mask.any(dim=1) & stats.alternate.mask.any(dim=1)
        loss = self.conjugate(answer) - self.variational(alternate)
        return Term(loss.where(counts, 0.0).sum(), unit="row")

    def variational(self, probability: Tensor) -> Tensor:
        """`g(P)`."""
        if self.divergence == "total_variation":
            return torch.tanh(probability) / 2
        if self.divergence == "jensen_shannon":
            return math.log(2) - softplus(-probability)
        return probability

    def conjugate(self, probability: Tensor) -> Tensor:
        """`f*(g(P))`."""
        if self.divergence == "kl":
            return torch.exp(probability - 1)
        if self.divergence == "jensen_shannon":
            return probability + softplus(-probability) - math.log(2)
        if self.divergence == "pearson":
            return probability.square() / 4 + probability
        return torch.tanh(probability) / 2


def mean_over_row(stats: TokenStats, values: Tensor) -> Tensor:
    """(rows,) the mean of (rows, tokens) values over each row's supervised tokens; 0 for a row without any."""
    return values.where(stats.mask, 0.0).sum(dim=1) / stats.mask.sum(dim=1).clamp(min=1)
