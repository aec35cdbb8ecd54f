"""One self-contained HTML page from a `Report`: sections in order, style inside, nothing loaded and nothing run.

The page forbids itself every outside resource and every script (its Content-Security-Policy), is readable without
color, on a phone and on paper, and is the same bytes for the same report.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from lm.run_folder import write_atomic
from unlearn.report import curves, tables, words
from unlearn.report.answers import before_and_after
from unlearn.report.location import where
from unlearn.report.markup import Html, el, join
from unlearn.report.records import Report, ReportModel
from unlearn.report.retraced import traced_again
from unlearn.report.style import CSS
from unlearn.report.verdict import focus, verdict

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def write_report(path: Path, report: Report) -> None:
    """Write the page, whole or not at all.

    Args:
        path: the HTML file; its folder is made if need be.
        report: what to show.

    Raises:
        UserError: the file cannot be written.
    """
    write_atomic(Path(path), render(report))


def render(report: Report) -> str:
    """The page as text."""
    sections = [
        ("where", "Where is it stored?", where(report)),
        ("scores", "Is it gone, and is the rest still there?", _scores(report)),
        ("answers", "Before and after", _answers(report)),
        ("again", "What is left where it was stored?", traced_again(report)),
        ("training", "Training", _training(report)),
        ("caveats", "Caveats", _caveats(report)),
        ("repeat", "How to repeat this", _repeat(report)),
    ]
    shown = [(name, title, content) for name, title, content in sections if content]
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        el("meta", name="color-scheme", content="light dark"),
        el("meta", name="generator", content="Palimpsest"),
        el("title", f"{report.title} · Palimpsest"),
        el("style", Html(CSS)),
    )
    links = [el("li", el("a", title, href=f"#{name}")) for name, title, _ in shown]
    body = el(
        "body",
        el("a", "Skip to the report", href="#where", class_="skip"),
        _header(report),
        el("nav", el("ol", links), aria_label="Sections"),
        el("main", [_section(place, *section) for place, section in enumerate(shown, start=1)]),
        el("footer", el("p", f"Palimpsest · {report.model_name}")),
    )
    return f"<!doctype html>\n{el('html', head, body, lang='en')}\n"


def _section(place: int, name: str, title: str, content: Html) -> Html:
    heading = el("h2", el("span", f"{place}", class_="place"), " ", title)
    return el("section", heading, content, id=name)


def _header(report: Report) -> Html:
    return el(
        "header",
        el("p", el("span", "Palimpsest", class_="mark"), " ", el("bdi", report.model_name), class_="over"),
        el("h1", report.title),
        el("p", report.question, class_="question"),
        el("p", " ".join(verdict(report)), class_="verdict"),
        _key_figures(report),
    )


def _key_figures(report: Report) -> Html | None:
    """Up to five numbers of the model that the page is about, each beside what it is measured against."""
    about = focus(report)
    if about is None:
        return None
    compared = [("before", model) for model in report.only("base")] + [("never saw it", m) for m in report.only("twin")]

    def beside(value: Callable[[ReportModel], float]) -> list[str]:
        return [f"{name} {words.score(value(model))}" for name, model in compared if not math.isnan(value(model))]

    measures: list[tuple[str, str, Callable[[ReportModel], float]]] = [
        ("task_aggregate", "", lambda model: model.task_aggregate),
        ("mia_auc", " (0.5 is best)", lambda model: model.mia_auc),
        ("utility", "", lambda model: model.utility),
        ("final", "", lambda model: model.final),
    ]
    boxes = [
        _box(words.HEADS[name] + note, words.score(value(about)), beside(value), words.COLUMNS[name])
        for name, note, value in measures
        if not math.isnan(value(about))
    ]
    return el("dl", boxes, _trained(report, about), class_="figures-row", aria_label=about.label)


def _trained(report: Report, about: ReportModel) -> Html:
    if about.layers is None:
        return _box("Trained", "all weights", [], words.COLUMNS["trained"])
    notes = [f"of {report.model_layers} layers"] if report.model_layers else []
    if report.plan is not None and report.plan.evidence and report.plan.layers == about.layers:
        notes.append("singled out by tracing" if report.plan.singled_out else "not singled out by tracing")
    return _box("Trained layers", words.layer_list(about.layers), notes, words.COLUMNS["trained"])


def _box(name: str, value: str, notes: list[str], title: str) -> Html:
    long = "value long" if len(value) > 7 else "value"
    lines = el("dd", [el("span", note) for note in notes], class_="note") if notes else None
    return el("div", el("dt", name, title=title), el("dd", value, class_=long), lines)


def _scores(report: Report) -> Html:
    return join(tables.summary(report), tables.terms(report), tables.meanings())


def _answers(report: Report) -> Html:
    if not report.answers:
        return el("p", "No answers were given to this report.")
    warning = "This section repeats the text that is to be forgotten: handle the page as you handle the forget set."
    how = (
        "Each answer is one greedy generation; that it differs from the truth does not prove that the truth cannot be "
        "had in another way."
    )
    return join(el("p", warning, " ", how), before_and_after(report))


def _training(report: Report) -> Html:
    logs = [(model, curves.training_lines(model.log)) for model in report.methods]
    drawn = [(model, log) for model, log in logs if log]
    three = len(drawn) not in (1, 2, 4)
    scales = curves.shared_scales([log for _, log in drawn], width=400.0 if three else 440.0)
    if scales is None:
        return el("p", "No training log was given to this report.")
    figures = [
        el("figure", el("figcaption", el("b", el("bdi", model.label))), curves.curves(model.label, log, scales))
        for model, log in drawn
    ]
    text = (
        "Cross-entropy of the answer tokens in nats, on a logarithmic scale that all methods share: forget rows should "
        "rise, retain rows stay low. The strip below is α, the weight of the retain term, on one scale as well. "
        "A gap is a step without a number."
    )
    without = [model.label for model, log in logs if not log]
    missing = el("p", f"No training log: {'; '.join(without)}.") if without else None
    return join(el("p", text), el("div", figures, class_=f"figures {'three' if three else 'two'}"), missing)


def _caveats(report: Report) -> Html | None:
    return el("ul", [el("li", caveat) for caveat in report.caveats], class_="caveats") if report.caveats else None


def _repeat(report: Report) -> Html | None:
    parts = []
    if report.commands:
        parts.append(el("pre", el("code", "\n".join(report.commands)), tabindex="0"))
    if report.facts:
        rows = [el("div", el("dt", name), el("dd", value)) for name, value in report.facts.items()]
        parts.append(el("dl", rows, class_="facts"))
    return join(parts) if parts else None
