"""The worst of a grid of attacks: where an unlearned model gives back most beyond the retain model. Pure numpy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unlearn.attacks.comparison.curves import KNOWS, Comparison, plain


@dataclass(frozen=True)
class Worst:
    """One cell of the grid, given rows x way of attacking x level above 0: the one with the largest gap.

    It was chosen for being the largest of all, so by chance alone it lies above 0, the more the larger the grid. The interval
    is that of this one cell.

    Attributes:
        given: what the attacker had.
        learning_rate: of an attack that trains.
        steps: the level, in what the attack counts: steps of training.
        gap: mean score of the unlearned model less that of the retain model, -1 to 1.
        low, high: its interval over people; NaN for one person.
        place: the comparison's place in the grid.
    """

    given: str
    learning_rate: float | None
    steps: int
    gap: float
    low: float
    high: float
    place: int

    def sentence(self, unit: str, confidence: float) -> str:
        """Which cell it is, and its gap."""
        rate = "" if self.learning_rate is None else f" at rate {self.learning_rate:g}"
        where = f"{self.given.replace('_', ' ')} given{rate}, after {self.steps} {unit}"
        interval = "" if np.isnan(self.low) else f" ({confidence:.0%} interval {self.low:+.3f} to {self.high:+.3f})"
        return f"At worst ({where}) the unlearned model scores {self.gap:+.3f} beyond the retain model{interval}."

    def to_json(self) -> dict[str, Any]:
        """As plain data; null for an end that is not there."""
        gap, low, high = plain((self.gap, self.low, self.high))
        where = {"given": self.given, "learning_rate": self.learning_rate, "steps": self.steps}
        return {**where, "gap": gap, "low": low, "high": high}


def worst_of(comparisons: Sequence[Comparison]) -> Worst | None:
    """The cell with the largest gap, the first of equal ones; None where no retain model that did not know is beside."""
    cells = []
    for place, each in enumerate(comparisons):
        if each.alone or each.known_before > KNOWS:
            continue
        levels = zip(each.levels, *(ends.tolist() for ends in each.difference()), strict=True)
        for level, gap, low, high in list(levels)[1:]:
            cells.append(Worst(each.name, each.learning_rate, level, gap, low, high, place))
    return max(cells, key=lambda cell: cell.gap, default=None)
