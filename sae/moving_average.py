"""An exponential moving average of weights, which may be the result of a training in place of the last weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lm.errors import UserError


@dataclass(frozen=True, eq=False)
class MovingAverage:
    """An exponential average of weights, corrected for its start: `m <- d m + (1 - d) w`, read as `m / (1 - d^t)`.

    Badge: **faithful** but for its place: it is updated after the optimizer's step (the released loop does it before).
    """

    total: dict[str, Tensor]
    """The uncorrected averages, by name."""
    steps: int
    decay: float

    @classmethod
    def start(cls, weights: dict[str, Tensor], *, decay: float = 0.999) -> MovingAverage:
        """All zero; `value` needs one update first."""
        if not 0 <= decay < 1:
            raise UserError(f"the decay {decay} of the weight average must be from 0 to below 1: 0.999 is usual")
        return cls({name: torch.zeros_like(w.detach()) for name, w in weights.items()}, 0, decay)

    def update(self, weights: dict[str, Tensor]) -> MovingAverage:
        """One step further; the weights are read, not kept."""
        if weights.keys() != self.total.keys():
            raise UserError(f"the average holds {sorted(self.total)}, not {sorted(weights)}: start it anew")
        with torch.no_grad():
            total = {name: old.lerp(weights[name].detach(), 1 - self.decay) for name, old in self.total.items()}
        return MovingAverage(total, self.steps + 1, self.decay)

    def value(self) -> dict[str, Tensor]:
        """The averaged weights; a decoder among them is no longer of unit norm."""
        if not self.steps:
            raise UserError("the weight average is empty: update it once before reading it")
        return {name: total / (1 - self.decay**self.steps) for name, total in self.total.items()}
