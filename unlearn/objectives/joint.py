"""The joint objective of the constrained-unlearning paper: forget up, retain held down by an adaptive weight."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from lm.errors import UserError
from unlearn.objectives.base import Objective, RetainMemory, Term, TokenStats, ascent

Reference = Literal["epoch0_mean", "authors_sum_over_rows"]


@dataclass(frozen=True, kw_only=True)
class Joint(Objective):
    """`L = -CE(forget) + alpha * CE(retain)`, with `alpha = clip(a * b**d + c, alpha_min, alpha_max)`.

    `d` is the batch's mean retain cross-entropy minus its reference. In epoch 0, and whenever d <= 0, alpha is
    `alpha_min`. Source: Selective Amnesia (arXiv 2504.12996), constants from the authors' code and a summary of the paper.
    Badge: **faithful** in the presets `paper`, `april_code` and `january_code` (each published constant is a field);
    the default is a **variant**: a smooth alpha, a reference that is a mean, and a cap on the forget term.
    """

    a: float = 0.3
    """Slope of the adaptive weight."""
    b: float = 6.0
    """Base of the exponential in the retain deviation (nats)."""
    c: float = 0.8
    """Offset of the adaptive weight."""
    alpha_min: float = 1.2
    """Lower clip, and the value in epoch 0."""
    alpha_max: float = 2.3
    """Upper clip: 2.3 in both published code versions, 2.8 in a summary of the paper."""
    round_alpha: bool = False
    """Round the weight to one decimal before clipping, as the published code does."""
    reference: Reference = "epoch0_mean"
    """Epoch 0's mean retain cross-entropy, or the published code's sum of batch means over rows (about 6 times smaller)."""
    forget_cap: float | None = 8.0
    """Nats a token beyond which a forget token is not pushed further; null is the published, unbounded form."""

    def __post_init__(self) -> None:
        if not 0 <= self.alpha_min <= self.alpha_max:
            raise UserError(
                f"alpha_min {self.alpha_min} and alpha_max {self.alpha_max}: give 0 <= alpha_min <= alpha_max"
            )
        if not (math.isfinite(self.a) and math.isfinite(self.c)):
            raise UserError(f"a {self.a} and c {self.c}: give finite numbers")
        if not self.b > 0:
            raise UserError(f"b is {self.b}: the base of the exponential must be above 0")
        check_cap(self.forget_cap)

    def forget_term(self, stats: TokenStats) -> Term:
        """`-CE`, each token stopped at the cap."""
        return Term(ascent(stats, self.forget_cap))

    def retain_weight(self, memory: RetainMemory, retain_cross_entropy: float) -> float:
        """alpha at this step."""
        if memory.epoch == 0:
            return self.alpha_min
        deviation = retain_cross_entropy - self.reference_value(memory)
        return self.alpha(deviation) if deviation > 0 else self.alpha_min

    def alpha(self, deviation: float) -> float:
        """`clip(round?(a * b**deviation + c), alpha_min, alpha_max)`; the exponent is bounded so that it cannot overflow."""
        value = self.a * math.pow(self.b, min(deviation, 50.0)) + self.c
        value = round(value, 1) if self.round_alpha else value
        return min(max(value, self.alpha_min), self.alpha_max)

    def observe_validation(self, memory: RetainMemory, scores: dict[str, float]) -> None:
        """The published code also adds the evaluation passes of epoch 0 to its reference."""
        if self.reference == "authors_sum_over_rows":
            memory.add(
                cross_entropy=0.0, tokens=0.0, batch_means=scores["retain_batch_means"], rows=scores["retain_rows"]
            )

    def reference_value(self, memory: RetainMemory) -> float:
        """The retain cross-entropy that counts as undisturbed (nats a token)."""
        if self.reference == "epoch0_mean":
            return memory.cross_entropy / max(memory.tokens, 1.0)
        return memory.batch_means / max(memory.rows, 1.0)


def check_factor(factor: float) -> None:
    """Refuse a retain weight that would unlearn what is to be kept."""
    if not 0 <= factor < math.inf:
        raise UserError(f"retain_factor is {factor}: give 0 or more; less would unlearn what is to be kept")


def check_cap(cap: float | None) -> None:
    """Refuse a cap that would switch the forget term off."""
    if cap is not None and not cap > 0:
        raise UserError(f"forget_cap is {cap}: give a positive number of nats a token, or null for no cap")
