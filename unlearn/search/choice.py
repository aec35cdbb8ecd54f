"""Which trial counts, which is best, what the sampler is to raise, what is not dominated: pure arithmetic on scored runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.stats import t as student

from unlearn.search.scored import Finished, Scored


def floor(base_utility: float, budget: float) -> float:
    """The lowest utility that counts: `(1 - budget) * base_utility`, less 1e-12 for what that rounds to."""
    return (1.0 - budget) * base_utility - 1e-12


def value(scored: Scored, lowest: float) -> float:
    """What the sampler raises: the quality, in [0, 1], if the utility is at least `lowest`; else `utility / lowest - 1`, in
    [-1, 0): any trial within the budget is better than any outside it, and outside it the nearer one."""
    return scored.quality if scored.utility >= lowest else scored.utility / lowest - 1.0


def best(trials: Sequence[Finished], lowest: float) -> int | None:
    """The number of the trial of the highest quality among those within the budget, the first of equals; None without any."""
    within = [
        number for number, trial in enumerate(trials) if trial.scored is not None and trial.scored.utility >= lowest
    ]
    return max(within, key=lambda number: (_quality(trials[number]), -number), default=None)


def leading(methods: Mapping[str, Sequence[Finished]], lowest: float, count: int | None) -> list[str]:
    """The methods that have a best trial, those of the highest quality first and the first of equals; at most `count`."""
    best_trials = {name: number for name, trials in methods.items() if (number := best(trials, lowest)) is not None}
    return sorted(best_trials, key=lambda name: -_quality(methods[name][best_trials[name]]))[:count]


def _quality(trial: Finished) -> float:
    assert trial.scored is not None
    return trial.scored.quality


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The places of the points that no other is at least as good as in both and better in one (both: higher is better),
    ordered by the first coordinate; of equal points all."""
    kept = [
        place
        for place, (x, y) in enumerate(points)
        if not any(other[0] >= x and other[1] >= y and other != (x, y) for other in points)
    ]
    return sorted(kept, key=lambda place: (points[place], place))


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, with the smallest and the largest, and half of its 95 % Student interval: NaN for one seed."""

    mean: float
    half: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """`mean ± t(0.975, n - 1) * s / sqrt(n)`."""
        n = len(values)
        half = float(student.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.nan
        return cls(statistics.fmean(values), half, min(values), max(values))
