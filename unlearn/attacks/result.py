"""What an attack came to: a comparison for each way of attacking, and the worst of all. As text, and as `attack.json`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from unlearn.attacks.base import Attack
from unlearn.attacks.curves import Comparison
from unlearn.attacks.worst import Worst, worst_of


@dataclass(frozen=True)
class AttackResult:
    """The comparison for each name and variant that trials have, in order."""

    attack: Attack
    comparisons: tuple[Comparison, ...]

    @cached_property
    def worst(self) -> Worst | None:
        """The cell of the grid (given rows x way x level above 0) with the largest mean gap to the retain model; None without
        one, or with one that knew the answers."""
        return worst_of(self.comparisons)

    @property
    def worst_sentence(self) -> str:
        """The worst cell in a sentence; empty where there is none."""
        worst = self.worst
        return "" if worst is None else worst.sentence(self.attack.unit, self.comparisons[worst.place].confidence)

    def __str__(self) -> str:
        """A table and a sentence for each, and the worst."""
        parts = [
            f"{each.title}: {each.given:.0f} rows given, {len(each.ids)} rows of {each.people} people asked"
            + (f", {each.told:.0f} left out (a given row tells the answer)" if each.told else "")
            + f"\n{each.table(self.attack.unit)}\n{each.sentence(self.attack.words)}"
            for each in self.comparisons
        ]
        return "\n\n".join([*parts, *([self.worst_sentence] if self.worst_sentence else [])])

    def to_json(self) -> dict[str, Any]:
        """Everything as plain data, as in `attack.json`."""
        words = self.attack.words
        trials = [{**each.to_json(), "sentence": each.sentence(words)} for each in self.comparisons]
        worst = None if self.worst is None else {**self.worst.to_json(), "sentence": self.worst_sentence}
        return {"unit": self.attack.unit, "trials": trials, "worst": worst}
