"""How what is said reads: shares of empty, repeated, scrambled and garbled answers; perplexity under the untouched model.

Forgetting that answers with noise is told from forgetting that answers as to a stranger. The arithmetic is
`unlearn.evaluation.legibility` and `unlearn.evaluation.fluency`. Badge: **reconstruction**.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Literal, TypeAlias

from unlearn.evaluation.legibility import Spelling, Text, is_empty, is_repeated
from unlearn.evaluation.scores.base import Direction, Generation, Need, Score, Statistics

Side: TypeAlias = Literal["forget", "retain"]
SIDES: tuple[Side, ...] = ("forget", "retain")
Fault: TypeAlias = Literal["empty", "repeated", "scrambled", "garbled"]
_MEANINGS: dict[Fault, str] = {
    "empty": "without a letter or a digit",
    "repeated": (
        "in which up to 20 characters stand four times in a row or more, or three words take more than half of a long answer"
    ),
    "scrambled": (
        "with a stretch of 12 characters spelled like nothing in the rows' own texts: at most about 1% of the answers that read "
        "well are taken for such"
    ),
    "garbled": (
        "that are empty, repeated or scrambled. Compare with the retain model. Words that are spelled well and make no sense "
        "are not found, so it is a lower bound"
    ),
}
FAULTS: tuple[Fault, ...] = ("empty", "repeated", "scrambled", "garbled")


@dataclass(frozen=True)
class FaultyAnswers(Score):
    """How many answers of a side cannot be read, in one way or in any."""

    side: Side
    fault: Fault

    @property
    def name(self) -> str:
        """`garbled`; of the retain rows `retain_garbled`."""
        return self.fault if self.side == "forget" else f"{self.side}_{self.fault}"

    @property
    def title(self) -> str:
        """The fault."""
        return self.fault.capitalize()

    @property
    def meaning(self) -> str:
        """What is counted."""
        return f"Share of the answers to {self.side} rows {_MEANINGS[self.fault]}."

    @property
    def group(self) -> str:
        """The side."""
        return f"Answers to {self.side} rows"

    @property
    def direction(self) -> Direction:
        """A stranger's question is answered in readable words."""
        return "lower"

    @property
    def needs(self) -> tuple[Need, ...]:
        """The generations; spelling is learned from the texts of both sides."""
        return ("forget", "retain") if self.fault in ("scrambled", "garbled") else (self.side,)

    @property
    def parts(self) -> tuple[Score, ...]:
        """Of garbled answers, the faults that make them so."""
        every = (FaultyAnswers(self.side, fault) for fault in FAULTS if fault != "garbled")
        return tuple(every) if self.fault == "garbled" else ()

    def value(self, statistics: Statistics) -> float | None:
        """The mean over the rows; None if there is none."""
        values = self.per_example(statistics).values()
        return fmean(values) if values else None

    def per_example(self, statistics: Statistics) -> Mapping[str, float]:
        """1 for an answer with the fault, else 0."""
        if self.parts:
            each = [statistics.examples_of(part) for part in self.parts]
            return {row: max(values[row] for values in each) for row in each[0]}
        return {
            row["id"]: float(self._has_fault(row["model_output"], statistics)) for row in _rows(statistics, self.side)
        }

    def _has_fault(self, answer: str, statistics: Statistics) -> bool:
        if self.fault == "empty":
            return is_empty(answer)
        return is_repeated(answer) if self.fault == "repeated" else _spelling(statistics).is_scrambled(answer)

    @classmethod
    def all(cls) -> tuple[Score, ...]:
        """Every fault on both sides."""
        return tuple(cls(side, fault) for side in SIDES for fault in FAULTS)


@dataclass(frozen=True)
class Perplexity(Score):
    """How unlikely the untouched model finds the answers of a side."""

    side: Side

    @property
    def name(self) -> str:
        """`perplexity`; of the retain rows `retain_perplexity`."""
        return "perplexity" if self.side == "forget" else f"{self.side}_perplexity"

    @property
    def title(self) -> str:
        """One word."""
        return "Perplexity"

    @property
    def meaning(self) -> str:
        """What is averaged, and what it does not say."""
        return (
            f"Perplexity of the answers to {self.side} rows under the untouched model, each answer counting once. 1: what it "
            "would say itself. A model that memorized the answers finds any other unlikely, so compare with the retain model's."
        )

    @property
    def group(self) -> str:
        """The side."""
        return f"Answers to {self.side} rows"

    @property
    def direction(self) -> Direction:
        """Low; but see `goodness`."""
        return "lower"

    @property
    def needs(self) -> tuple[Need, ...]:
        """The answers, and how likely the untouched model finds them."""
        return (self.side, "fluency")

    def value(self, statistics: Statistics) -> float | None:
        """`exp(mean over answers of nats a token)`; None if no answer has a token."""
        nats = [each for each in self._nats(statistics) if each is not None]
        return math.exp(fmean(nats)) if nats else None

    def per_example(self, statistics: Statistics) -> Mapping[str, float]:
        """The perplexity of each answer that has a token."""
        rows = zip(_rows(statistics, self.side), self._nats(statistics), strict=True)
        return {row["id"]: math.exp(nats) for row, nats in rows if nats is not None}

    def _nats(self, statistics: Statistics) -> tuple[float | None, ...]:
        assert statistics.fluency is not None
        return statistics.fluency.forget if self.side == "forget" else statistics.fluency.retain

    def text(self, value: float) -> str:
        """Three figures, or more of a large number."""
        return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:,.0f}"

    def goodness(self, value: float) -> float:
        """None: the lowest on forget rows is that of the model that forgot nothing."""
        return math.nan

    @classmethod
    def all(cls) -> tuple[Score, ...]:
        """Both sides."""
        return tuple(cls(side) for side in SIDES)


def _rows(statistics: Statistics, side: Side) -> tuple[Generation, ...]:
    rows = statistics.forget if side == "forget" else statistics.retain
    assert rows is not None
    return rows


def _spelling(statistics: Statistics) -> Spelling:
    """Learned once from the prompts and the true answers of both sides; rows of one document are told by their ids."""
    rows = [row for side in SIDES for row in _rows(statistics, side)]
    texts = [
        Text(re.sub(r"(?:sc|qa)\d+$", "", row["id"]), row[field], answer)
        for row in rows
        for field, answer in (("input", False), ("expected_output", True))
    ]
    return statistics.once("spelling", lambda: Spelling(texts))
