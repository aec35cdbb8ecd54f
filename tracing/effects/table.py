"""Mean indirect effects by token role and layer with their intervals: what `Cells.table` gives, and what is drawn.

Also `Skipped`, a fact that a trace left out. Nothing is computed here (`tracing.effects.cells`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lm.anatomy import Kind
from tracing.arrays import Array
from tracing.question.facts import Fact
from tracing.question.sweep import layers_restored


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A fact that was left out, and why."""

    fact: Fact
    reason: str

    @property
    def why(self) -> str:
        """The reason without what the model said and should have said: for files, which are passed on more freely than data."""
        return "the model gives another answer" if self.reason.startswith("the model says ") else self.reason


@dataclass(frozen=True, kw_only=True, eq=False)
class EffectTable:
    """Mean indirect effects by token role and layer.

    Attributes:
        mean, low, high: (roles, layers); NaN where no fact has such a token (intervals also where only one group of facts has).
        share, share_low, share_high: (roles, layers), the mean over the mean total effect of the same facts, with its interval
            (`tracing.bootstrap.shares`); NaN where the corruption took nothing on average.
        facts: (roles,), how many facts each row is the mean of.
        total_effect: what the corruption took, the mean over all facts.
    """

    kind: Kind
    roles: tuple[str, ...]
    mean: Array
    low: Array
    high: Array
    share: Array
    share_low: Array
    share_high: Array
    facts: npt.NDArray[np.int64]
    confidence: float
    metric: str
    window: int
    sigma: float | None
    total_facts: int
    total_effect: float

    @property
    def layers_restored(self) -> npt.NDArray[np.int64]:
        """(layers,): how many layers were restored together; fewer than `window` where an end of the model cuts it short."""
        return np.array(layers_restored(self.window, self.mean.shape[1], self.kind), dtype=np.int64)

    @property
    def per_layer(self) -> Array:
        """(roles, layers): the mean per layer restored, which is comparable at the ends of the model too."""
        return np.asarray(self.mean / self.layers_restored)
