"""What changes from step to step: the learning rate, as transformers' schedulers have it, and what the forget term counts."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["linear", "cosine", "constant"]


def learning_rate(step: int, steps: int, *, peak: float, schedule: Schedule, warmup: int = 0) -> float:
    """The learning rate of the 0-based `step` of `steps`: a linear warm-up over `warmup` steps, then linear, cosine or constant.

    As in transformers' schedulers, step 0 of a warm-up has rate 0, and a linear or cosine decay would reach 0 at `steps`.
    """
    if step < warmup:
        return peak * (step / warmup)
    if schedule == "constant":
        return peak
    done = (step - warmup) / max(steps - warmup, 1)
    left = 1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return peak * left


def forget_weight(step: int, steps: int, *, begins: float, ramp: float) -> float:
    """What the forget term counts at the 0-based `step` of `steps`: 0 for the share `begins`, then rising to 1 over `ramp`."""
    first, rising = round(begins * steps), round(ramp * steps)
    if step < first:
        return 0.0
    return min((step - first + 1) / rising, 1.0) if rising else 1.0
