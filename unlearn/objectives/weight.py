"""Weights of the retain term: fixed, the joint method's adaptive one, or a dual variable. Any goes with any objective."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from lm.errors import UserError
from unlearn.objectives.base import RetainMemory, Weight

Reference = Literal["epoch0_mean", "authors_sum_over_rows"]


@dataclass(frozen=True, kw_only=True)
class AsPublishedWeight(Weight):
    """The one of the objective's paper."""


@dataclass(frozen=True, kw_only=True)
class Fixed(Weight):
    """The same at every step."""

    factor: float = 1.0
    """The weight of the retain term."""

    def __post_init__(self) -> None:
        if not 0 <= self.factor < math.inf:
            raise UserError(
                f"retain_weight.factor is {self.factor}: give 0 or more; less would unlearn what is to be kept"
            )

    def at(self, memory: RetainMemory, cross_entropy: float, loss: float) -> float:
        """`factor`."""
        return self.factor


@dataclass(frozen=True, kw_only=True)
class Adaptive(Weight):
    """`alpha = clip(a * b**d + c, alpha_min, alpha_max)`, d the retain cross-entropy minus its reference.

    In epoch 0, and whenever d <= 0, alpha is `alpha_min`. Source: Selective Amnesia (arXiv 2504.12996), constants from the
    authors' code and a summary of the paper. Badge: **faithful** in the presets `paper`, `april_code` and `january_code`
    (each published constant is a field); the default is a **variant**: a smooth alpha, and a reference that is a mean.
    """

    needs_cross_entropy: ClassVar[bool] = True

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

    def __post_init__(self) -> None:
        if not 0 <= self.alpha_min <= self.alpha_max:
            raise UserError(
                f"alpha_min {self.alpha_min} and alpha_max {self.alpha_max}: give 0 <= alpha_min <= alpha_max"
            )
        if not (math.isfinite(self.a) and math.isfinite(self.c)):
            raise UserError(f"a {self.a} and c {self.c}: give finite numbers")
        if not self.b > 0:
            raise UserError(f"b is {self.b}: the base of the exponential must be above 0")

    def at(self, memory: RetainMemory, cross_entropy: float, loss: float) -> float:
        """alpha at this step."""
        if memory.epoch == 0:
            return self.alpha_min
        deviation = cross_entropy - self.reference_value(memory)
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


@dataclass(frozen=True, kw_only=True)
class Dual(Weight):
    """A dual variable for the constraint `retain loss <= tolerance`: `lambda <- max(0, lambda + rate * (loss - tolerance))`.

    A step uses the variable as it stands and moves it afterwards, by the retain loss of the global batch: it is the same on
    every process and for any micro-batch, and it is saved in checkpoints. Any objective and any retain term can be held so.
    Source: primal-dual unlearning, Entesari et al. 2025 (arXiv 2506.05314), whose defaults `PDU` has. Badge: **faithful** with
    `largest: null` (the authors' code moves it at each micro-batch and each process by its own loss).
    """

    tolerance: float = 0.5
    """The retain loss that is allowed, in its own unit (nats a token for cross-entropy)."""
    rate: float = 0.1
    """How fast the variable follows."""
    start: float = 1.0
    """Its value before the first step."""
    warmup_epochs: int = 0
    """It stands still during these first epochs."""
    largest: float | None = None
    """It grows no further."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.tolerance) and 0 < self.rate < math.inf):
            raise UserError(f"tolerance {self.tolerance} and rate {self.rate}: give a number, and a positive number")
        if not 0 <= self.start <= self.bound or self.start == math.inf:
            raise UserError(f"start {self.start} and largest {self.largest}: give 0 <= start <= largest")
        if self.warmup_epochs < 0:
            raise UserError(f"warmup_epochs is {self.warmup_epochs}: give 0 or more")

    @property
    def bound(self) -> float:
        """`largest`, or infinity."""
        return math.inf if self.largest is None else self.largest

    def at(self, memory: RetainMemory, cross_entropy: float, loss: float) -> float:
        """The variable as it stands; it is then moved."""
        now = self.start if memory.dual is None else memory.dual
        if memory.epoch >= self.warmup_epochs:
            memory.dual = min(max(now + self.rate * (loss - self.tolerance), 0.0), self.bound)
        return now
