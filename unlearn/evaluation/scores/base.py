"""What a score is: a number about a model, read off statistics that were measured once, and its words for the report.

A score never asks the model. It declares which statistics it needs, and an evaluation measures those that some score
needs. Adding a score is adding a class to a file of this room; its value then stands in scores.json, in the table that
the command prints and on the page of the report.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, cast

from lm.data.rows import Row
from unlearn.evaluation.word_overlap import Words

T = TypeVar("T")
Generation = Mapping[str, str]
"""A row after generation: `id`, `task`, `input`, `expected_output`, `model_output`."""
Need = Literal["forget", "retain", "losses", "choices", "retain_losses", "fluency", "general"]
"""A statistic: the generations of a side, the losses of member and other documents, the multiple-choice answers, the losses of
the same documents under the retain model, how likely the untouched model finds the generations, how likely the
model finds general text."""


@dataclass(frozen=True)
class Towards:
    """The direction of a score that is best at a number in the middle."""

    target: float


Direction = Literal["higher", "lower"] | Towards


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Mean token loss of each document, in nats: documents that the model was trained on, and others.

    Attributes:
        members, nonmembers: document by document.
        documents: a digest of their texts (`unlearn.evaluation.evaluation_set`), by which losses of other documents are told;
            None where it is not known.
    """

    members: tuple[float, ...]
    nonmembers: tuple[float, ...]
    documents: str | None = None


@dataclass(frozen=True, kw_only=True)
class Fluency:
    """How likely the untouched model finds the generations of each side: nats a token, row by row; None for an empty one."""

    forget: tuple[float | None, ...]
    retain: tuple[float | None, ...]


@dataclass(frozen=True, kw_only=True)
class TextLoss:
    """What a model makes of general text, piece by piece: nats of all its tokens but the first, and how many they are."""

    nats: tuple[float, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What came of multiple-choice questions.

    Attributes:
        accuracy: right answers over questions.
        right: question by question; empty where another program asked and told the accuracy alone.
        truncated: questions that were longer than the model reads and lost their beginning.
    """

    accuracy: float
    right: tuple[bool, ...] = ()
    truncated: int = 0


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What a model was measured to say, lose and choose; what is None was not measured.

    Attributes:
        forget, retain: the generations of a side, in the order of the rows.
        losses: of the membership documents.
        choices: of the multiple-choice questions.
        retain_losses: of the membership documents under the retain model.
        fluency: of the generations, under the untouched model.
        general: of general text.
        words: what counts as a word of a completion (see `unlearn.evaluation.word_overlap`).
    """

    forget: tuple[Generation, ...] | None = None
    retain: tuple[Generation, ...] | None = None
    losses: Losses | None = None
    choices: Choices | None = None
    retain_losses: Losses | None = None
    fluency: Fluency | None = None
    general: TextLoss | None = None
    words: Words = "official"
    _kept: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)

    def has(self, need: Need) -> bool:
        """Whether this was measured."""
        return getattr(self, need) is not None

    def of(self, score: Score) -> float | None:
        """The value of a score, computed once; None where it does not apply, or where something it needs was not measured."""
        return self.once(score, lambda: score.value(self) if all(map(self.has, score.needs)) else None)

    def examples_of(self, score: Score) -> Mapping[str, float]:
        """The score example by example, computed once; empty where it has no such values, or something was not measured."""
        known = all(map(self.has, score.needs))
        return self.once((score, "examples"), lambda: score.per_example(self) if known else {})

    def once(self, key: Hashable, compute: Callable[[], T]) -> T:
        """What `compute` returns, computed for the first who asks under this key."""
        if key not in self._kept:
            self._kept[key] = compute()
        return cast(T, self._kept[key])


@dataclass(frozen=True)
class Score(ABC):
    """The axis: subclasses are frozen dataclasses, equal if their settings are.

    A subclass gives `name`, `title`, `meaning` and `value`, and whatever of the rest differs from what stands here.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """Its key in scores.json."""

    @property
    @abstractmethod
    def title(self) -> str:
        """The head of its column on the page, a few words."""

    @property
    @abstractmethod
    def meaning(self) -> str:
        """What it is and when it is good, a sentence or two for a reader of the page."""

    @property
    def group(self) -> str:
        """What heads its columns among the further scores of the page; empty: its column stands in the summary."""
        return ""

    @property
    def direction(self) -> Direction:
        """Which values are good: `higher`, `lower`, or those near a target."""
        return "higher"

    @property
    def needs(self) -> tuple[Need, ...]:
        """The statistics that it reads itself."""
        return ()

    @property
    def parts(self) -> tuple[Score, ...]:
        """Other scores that it is made of. They are computed, and shown, with it."""
        return ()

    @abstractmethod
    def value(self, statistics: Statistics) -> float | None:
        """The number, from statistics that hold all that it needs; None where it does not apply to them."""

    def per_example(self, statistics: Statistics) -> Mapping[str, float]:
        """Id of a row, document or question -> its number. Empty for a score that has none."""
        return {}

    def check_rows(self, rows: Sequence[Row]) -> None:
        """Raise a `UserError` for rows that it cannot score, before anything is measured on them."""
        return

    @classmethod
    def all(cls) -> tuple[Score, ...]:
        """The scores that this class stands for: itself with its defaults, or a family that differs in its settings."""
        return (cls(),)

    def text(self, value: float) -> str:
        """The value as the page shows it."""
        return f"{value:.3f}"

    def goodness(self, value: float) -> float:
        """The value as a number of which more is better; NaN if no value is better than another."""
        if isinstance(self.direction, Towards):
            return -abs(value - self.direction.target)
        return value if self.direction == "higher" else -value


def needs_of(score: Score) -> tuple[Need, ...]:
    """All statistics behind a score: its own and those of its parts, each once."""
    return tuple(dict.fromkeys([*score.needs, *(need for part in score.parts for need in needs_of(part))]))


def with_parts(scores: Sequence[Score]) -> tuple[Score, ...]:
    """The scores and all that they are made of, parts first, each once."""
    expanded = [each for score in scores for each in (*with_parts(score.parts), score)]
    return tuple(dict.fromkeys(expanded))
