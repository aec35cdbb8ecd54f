"""The score tables: a summary with one row a model, the twelve terms behind it, and further scores in groups.

The reference model comes first as the floor, the retain model last as the ceiling; only the methods between them compete for
the mark of the best in a column. Columns, their words and which of two values is better come from `unlearn.evaluation.scores`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from markupsafe import Markup

from unlearn.evaluation.lume import TERMS
from unlearn.evaluation.result import MEASURES
from unlearn.evaluation.scores import known_scores
from unlearn.report import words
from unlearn.report.drawing.term_bars import term_bars
from unlearn.report.records import ATTACK_MEASURES, Report, ReportModel

_SHORT = {"regurgitation": "regurg.", "knowledge": "know."}
_TAGS = {"reference": "floor", "retain_model": "ceiling", "control": "control", "all_layers": "control"}
Value = Callable[[ReportModel], float]


class Shown(Protocol):
    """What a column needs to know of the measure in it, as `Score` says it."""

    @property
    def title(self) -> str:
        """The head."""

    @property
    def meaning(self) -> str:
        """A sentence or two."""

    def text(self, value: float) -> str:
        """A value as it is shown."""

    def goodness(self, value: float) -> float:
        """A value as a number of which more is better."""


@dataclass(frozen=True, kw_only=True)
class AttackMeasure:
    """What an attack comes to, beside the scores; the best is what the retain model has, 0."""

    title: str
    meaning: str
    text: Callable[[float], str]
    goodness: Callable[[float], float]


_ATTACK_MEASURES: dict[str, Shown] = {
    "relearned": AttackMeasure(
        title="Relearned",
        meaning="What attacks brought back at most, of what is said right, beyond the retain model under the same attack. 0 or "
        "less: nothing.",
        text=words.signed,
        goodness=lambda value: -max(value, 0.0),
    ),
    "residue_nats": AttackMeasure(
        title="Residue",
        meaning="How much likelier forgotten answers are than those of people never seen, after an attack, in nats a token, "
        "beyond the retain model's own difference. 0: nothing.",
        text=words.nats,
        goodness=lambda value: -abs(value),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Column:
    """The head of a column, and what it means."""

    title: str
    meaning: str


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A value as text; None where there is none."""

    text: str | None
    best: bool
    title: str = ""


@dataclass(frozen=True, kw_only=True)
class ScoreRow:
    """A model: its names and part, what was trained, its terms as bars, its values."""

    label: str
    note: str
    tag: str
    part: str
    trained: str
    bars: Markup
    measures: tuple[Cell, ...]
    terms: tuple[Cell, ...]
    further: tuple[Cell, ...]
    seconds: str


@dataclass(frozen=True, kw_only=True)
class ScoreTables:
    """The tables: their columns (of measures also the names of the scores), and the rows in groups.

    Attributes:
        further: the columns of scores that stand apart, under what heads them (`Score.group`).
    """

    names: tuple[str, ...]
    measures: tuple[Column, ...]
    terms: tuple[Column, ...]
    further: tuple[tuple[str, tuple[Column, ...]], ...]
    groups: tuple[tuple[ScoreRow, ...], ...]
    marks: str
    missing: bool

    @property
    def starts(self) -> tuple[int, ...]:
        """The places of the further columns with which a group begins."""
        counts = [len(columns) for _, columns in self.further]
        return tuple(sum(counts[:place]) for place in range(len(counts)))

    @property
    def meanings(self) -> tuple[Column, ...]:
        """What every column means, for readers who cannot hover."""
        trained = Column(title="Trained layers", meaning=words.TRAINED)
        time = Column(title="Time", meaning=words.SECONDS)
        terms = (Column(title=term.title[:1].upper() + term.title[1:], meaning=term.meaning) for term in self.terms)
        further = (
            Column(title=f"{column.title} ({group})", meaning=column.meaning)
            for group, columns in self.further
            for column in columns
        )
        return (trained, *self.measures, time, *terms, *further)


def score_tables(report: Report) -> ScoreTables:
    """The columns of the five official measures, and of every other score that some model has, those of a group apart."""
    scores: dict[str, Shown] = {**known_scores(), **_ATTACK_MEASURES}
    groups_known = {name: score.group for name, score in known_scores().items()}
    others = dict.fromkeys(name for m in report.models for name in m.others if not math.isnan(m.value(name)))
    group_of = {name: groups_known.get(name, "") for name in others}
    attacked = [name for name in ATTACK_MEASURES if any(not math.isnan(m.value(name)) for m in report.models)]
    names = [*MEASURES, *(name for name in others if not group_of[name]), *attacked]
    groups_of_scores = {group: [n for n in others if group_of[n] == group] for group in group_of.values() if group}
    further = [name for columns in groups_of_scores.values() for name in columns]
    best = {name: best_of(report.methods, _goodness(name, scores.get(name))) for name in (*names, *further)}
    best_terms = [best_of(report.methods, lambda model, at=index: model.terms[at]) for index in range(len(TERMS))]  # type: ignore[misc]

    def cells(model: ReportModel, columns: Sequence[str]) -> tuple[Cell, ...]:
        return tuple(_cell(model.value(n), model.key in best[n], score=scores.get(n)) for n in columns)

    def row(model: ReportModel) -> ScoreRow:
        return ScoreRow(
            label=model.label,
            note=model.note,
            tag=_TAGS.get(model.part, ""),
            part=model.part,
            trained=words.trained(model),
            bars=term_bars(model.terms),
            measures=cells(model, names),
            further=cells(model, further),
            terms=tuple(
                _cell(term, model.key in best_terms[index], words.term_name(index))
                for index, term in enumerate(model.terms)
            ),
            seconds=words.duration(model.seconds),
        )

    groups = (report.only("reference"), report.methods, report.only("retain_model"))
    return ScoreTables(
        names=tuple(names),
        measures=tuple(_column(name, scores.get(name)) for name in names),
        terms=tuple(
            Column(title=words.term_name(index), meaning=words.term_meaning(index)) for index in range(len(TERMS))
        ),
        further=tuple(
            (group, tuple(_column(name, scores.get(name)) for name in columns))
            for group, columns in groups_of_scores.items()
        ),
        groups=tuple(tuple(map(row, group)) for group in groups if group),
        marks=_marks(report),
        missing=any(math.isnan(term) for model in report.models for term in model.terms),
    )


def term_heads() -> list[str]:
    """`regurg.` or `know.`, column by column."""
    return [_SHORT[term.split(" ")[2]] for term in TERMS]


def best_of(models: Sequence[ReportModel], compared: Value) -> set[str]:
    """Keys of the models with the highest value as shown (three decimals), ties together; none if all are alike."""
    values = {model.key: round(compared(model), 3) for model in models if not math.isnan(compared(model))}
    if len(set(values.values())) < 2:
        return set()
    return {key for key, value in values.items() if value == max(values.values())}


def _column(name: str, score: Shown | None) -> Column:
    if score is None:  # of a class that is not imported here
        return Column(title=name.replace("_", " "), meaning="A score that this program does not know.")
    return Column(title=score.title, meaning=score.meaning)


def _goodness(name: str, score: Shown | None) -> Value:
    """What is compared; of a score that nobody knows, nothing."""
    return lambda model: math.nan if score is None else score.goodness(model.value(name))


def _cell(value: float, best: bool, title: str = "", score: Shown | None = None) -> Cell:
    text = words.score if score is None else score.text
    return Cell(text=None if math.isnan(value) else text(value), best=best, title=title)


def _marks(report: Report) -> str:
    if len(report.methods) < 2:
        return "Layers are counted from 0."
    bold = "Bold: the best of the methods to three decimals; ties share it, floor and ceiling do not compete."
    return f"Layers are counted from 0. {bold}"
