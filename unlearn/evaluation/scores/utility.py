"""What a model still knows of everything else: accuracy on multiple-choice questions. See `unlearn.evaluation.utility`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from unlearn.evaluation.scores.base import Need, Score, Statistics


@dataclass(frozen=True)
class UtilityScore(Score):
    """Right answers over questions."""

    name = "utility"
    title = "Utility"
    meaning = "Share of general multiple-choice questions answered correctly."

    @property
    def needs(self) -> tuple[Need, ...]:
        """The answers that were chosen."""
        return ("choices",)

    def value(self, statistics: Statistics) -> float | None:
        """Each question counts once."""
        assert statistics.choices is not None
        return statistics.choices.accuracy

    def per_example(self, statistics: Statistics) -> Mapping[str, float]:
        """1 or 0 for each question, by its place; empty where lm-eval asked."""
        assert statistics.choices is not None
        return {f"question {index}": float(right) for index, right in enumerate(statistics.choices.right)}
