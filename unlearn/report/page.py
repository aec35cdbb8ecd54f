"""One self-contained HTML page from a `Report`: sections in order, style inside, nothing loaded and nothing run.

The page is a jinja2 template (`page.html.jinja`) with one style sheet (`style.css`). It forbids itself every outside resource and
every script (its Content-Security-Policy), is readable without color, on a phone and on paper, and is the same bytes for the
same report.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from lm.run_folder import write_atomic
from unlearn.report import words
from unlearn.report.drawing.svg import printable
from unlearn.report.records import Report, ReportModel
from unlearn.report.sections.answers import AnswerSide, before_and_after
from unlearn.report.sections.attacks import AttackView, DepthView, attacks, depths
from unlearn.report.sections.location import Location, location
from unlearn.report.sections.retraced import TracedAgain, traced_again
from unlearn.report.sections.scores import Column, ScoreTables, score_tables, term_heads
from unlearn.report.sections.training import Training, training
from unlearn.report.verdict import focus, paragraphs

_FOLDER = Path(__file__).parent
_KEY_FIGURES = ("task_aggregate", "mia_auc", "utility", "final")


@dataclass(frozen=True)
class Section:
    """A section that the page has: its anchor and its heading."""

    name: str
    title: str


@dataclass(frozen=True, kw_only=True)
class Box:
    """A number at the top of the page, beside what it is measured against."""

    name: str
    value: str
    notes: list[str]
    title: str


@dataclass(frozen=True, kw_only=True)
class Page:
    """What the template puts in its places."""

    sections: list[Section]
    verdict: list[str]
    about: str
    boxes: list[Box]
    location: Location | None
    scores: ScoreTables
    answers: tuple[AnswerSide, ...]
    again: TracedAgain | None
    attacks: tuple[AttackView, ...]
    depths: tuple[DepthView, ...]
    training: Training | None


def write_report(path: Path, report: Report) -> None:
    """Write the page, whole or not at all.

    Args:
        path: the HTML file; its folder is made if need be.
        report: what to show.

    Raises:
        UserError: the file cannot be written.
    """
    write_atomic(Path(path), render(report), private=True)


def render(report: Report) -> str:
    """The page as text."""
    return _template().render(report=report, page=_page(report), css=_style(), words=words, term_heads=term_heads())


def _page(report: Report) -> Page:
    about = focus(report)
    tables = score_tables(report)
    return Page(
        sections=_sections(report),
        verdict=[" ".join(sentences) for sentences in paragraphs(report)],
        about=about.label if about is not None else "",
        boxes=_boxes(report, about, tables) if about is not None else [],
        location=location(report),
        scores=tables,
        answers=before_and_after(report),
        again=traced_again(report),
        attacks=attacks(report),
        depths=depths(report),
        training=training(report),
    )


def _sections(report: Report) -> list[Section]:
    """Those that there is something for, in order; the first four questions are put in every report."""
    sections: list[tuple[str, str, Any]] = [
        ("where", "Where is it stored?", True),
        ("scores", "Is it gone, and is the rest still there?", True),
        ("answers", "Before and after", True),
        ("again", "What is left where it was stored?", report.again),
        ("attacks", "Does it come back?", report.attacks),
        ("depth", "How deep did unlearning go?", report.depths),
        ("training", "Training", True),
        ("caveats", "Caveats", report.caveats),
        ("repeat", "How to repeat this", report.commands or report.facts),
    ]
    return [Section(name, title) for name, title, shown in sections if shown]


def _boxes(report: Report, about: ReportModel, tables: ScoreTables) -> list[Box]:
    """Up to four numbers of the model that the page is about, and what was trained in it."""
    compared = [("before", model) for model in report.only("reference")]
    compared += [("retain model", model) for model in report.only("retain_model")]

    def beside(name: str) -> list[str]:
        values = [(label, model.value(name)) for label, model in compared]
        return [f"{label} {words.score(value)}" for label, value in values if not math.isnan(value)]

    heads: dict[str, Column] = dict(zip(tables.names, tables.measures, strict=True))
    boxes = [
        Box(
            name=heads[name].title + (" (0.5 is best)" if name == "mia_auc" else ""),
            value=words.score(about.value(name)),
            notes=beside(name),
            title=heads[name].meaning,
        )
        for name in _KEY_FIGURES
        if not math.isnan(about.value(name))
    ]
    return [*boxes, _trained(report, about)]


def _trained(report: Report, about: ReportModel) -> Box:
    if about.layers is None:
        return Box(name="Trained", value="all weights", notes=[], title=words.TRAINED)
    notes = [f"of {report.model_layers} layers"] if report.model_layers else []
    if report.plan is not None and report.plan.evidence and report.plan.layers == about.layers:
        notes.append("singled out by tracing" if report.plan.singled_out else "not singled out by tracing")
    return Box(name="Trained layers", value=words.layer_list(about.layers), notes=notes, title=words.TRAINED)


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(_FOLDER), autoescape=True, undefined=StrictUndefined, finalize=_finalize
    )
    return environment.get_template("page.html.jinja")


def _finalize(value: Any) -> Any:
    """What an expression of the template comes to, before it is escaped."""
    return printable(value) if isinstance(value, str) else value


@cache
def _style() -> Markup:
    return Markup((_FOLDER / "style.css").read_text(encoding="utf-8"))
