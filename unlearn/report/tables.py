"""The score tables: a summary with one row a model, and the twelve terms behind it.

The model before unlearning comes first as the floor, the twin that never saw the forget rows last as the ceiling; only
the methods between them compete for the mark of the best in a column.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from unlearn.evaluation.lume import SIDES, TASKS, TERMS
from unlearn.report import words
from unlearn.report.charts import term_bars
from unlearn.report.markup import Html, el, join
from unlearn.report.records import Report, ReportModel

_SHORT = {"regurgitation": "regurg.", "knowledge": "know."}
Value = Callable[[ReportModel], float]
_MEASURES: dict[str, tuple[Value, Value]] = {  # column -> what is shown, what is compared (higher is better)
    "task_aggregate": (lambda m: m.task_aggregate, lambda m: m.task_aggregate),
    "mia_auc": (lambda m: m.mia_auc, lambda m: -abs(m.mia_auc - 0.5)),
    "mia_score": (lambda m: m.mia_score, lambda m: m.mia_score),
    "utility": (lambda m: m.utility, lambda m: m.utility),
    "final": (lambda m: m.final, lambda m: m.final),
}


def summary(report: Report) -> Html:
    """One row a model: what was trained, the terms as bars, and the aggregates."""
    best = {name: best_of(report.methods, compared) for name, (_, compared) in _MEASURES.items()}

    def row(model: ReportModel) -> Html:
        cells = [_head(model), el("td", words.trained(model), class_="trained"), el("td", term_bars(model.terms))]
        for name, (shown, _) in _MEASURES.items():
            cells.append(_cell(shown(model), model.key in best[name]))
        return el("tr", cells, el("td", words.duration(model.seconds), class_="number"), class_=model.part)

    columns = ["trained", "", *_MEASURES, "seconds"]
    heads = [el("th", el("span", "Model"), scope="col")]
    for name in columns:
        if name:
            kind = None if name == "trained" else "number"
            heads.append(el("th", words.HEADS[name], scope="col", class_=kind, title=words.COLUMNS[name]))
        else:
            sides = join(el("span", "forget", class_="forget"), " · ", el("span", "retain", class_="retain"))
            heads.append(
                el(
                    "th",
                    "The 12 terms",
                    el("small", sides),
                    scope="col",
                    title="As bars from 0 to 1, in the order of the table below.",
                )
            )
    above = el("p", "One row a model, each a single run. ", _marks(report), class_="above")
    caption = el("caption", "Summary of scores", class_="hidden")
    made = el("table", caption, el("thead", el("tr", heads)), _bodies(report, row), class_="scores summary")
    return join(above, _scroll("Summary of scores", made))


def terms(report: Report) -> Html:
    """The twelve terms, in numbers."""
    best = [best_of(report.methods, lambda m, i=index: m.terms[i]) for index in range(len(TERMS))]  # type: ignore[misc]

    def row(model: ReportModel) -> Html:
        cells = [
            _cell(term, model.key in best[index], words.term_name(index), pair=index % 2 == 0)
            for index, term in enumerate(model.terms)
        ]
        return el("tr", _head(model, note=False), cells, class_=model.part)

    top = [el("th", "Model", scope="col", rowspan=3)]
    top += [el("th", side.capitalize(), scope="colgroup", colspan=6, class_="pair") for side in SIDES]
    middle = [
        el(
            "th",
            f"{task} ",
            el("small", words.TASKS[task]),
            scope="colgroup",
            colspan=2,
            class_="pair",
        )
        for _ in SIDES
        for task in TASKS
    ]
    low = [
        el(
            "th",
            el(
                "abbr",
                _SHORT[TERMS[index].split(" ")[2]],
                title=f"{words.term_name(index)}: {words.term_meaning(index)}",
            ),
            scope="col",
            class_="number pair" if index % 2 == 0 else "number",
        )
        for index in range(len(TERMS))
    ]
    above = el(
        "p",
        "The twelve terms. Higher is better in every column: the forget terms are 1 minus what still comes back. ",
        "“regurg.” is regurgitation (completions), “know.” knowledge (questions). ",
        f"“{words.DASH}”: no rows of this kind were scored." if _missing(report) else None,
        class_="above",
    )
    caption = el("caption", "The twelve terms", class_="hidden")
    head = el("thead", el("tr", top), el("tr", middle), el("tr", low))
    return join(
        above, _scroll("The twelve terms", el("table", caption, head, _bodies(report, row), class_="scores terms"))
    )


def meanings() -> Html:
    """What every column means, for readers who cannot hover."""
    named = [(words.HEADS[name], text) for name, text in words.COLUMNS.items()]
    named += [(words.term_name(index).capitalize(), words.term_meaning(index)) for index in range(len(TERMS))]
    rows = [el("div", el("dt", name), el("dd", text)) for name, text in named]
    return el("details", el("summary", "What each column means"), el("dl", rows, class_="meanings"))


def best_of(models: Sequence[ReportModel], compared: Value) -> set[str]:
    """Keys of the models with the highest value as shown (three decimals), ties together; none if all are alike."""
    values = {model.key: round(compared(model), 3) for model in models if not math.isnan(compared(model))}
    if len(set(values.values())) < 2:
        return set()
    return {key for key, value in values.items() if value == max(values.values())}


def _bodies(report: Report, row: Callable[[ReportModel], Html]) -> Html:
    groups = [report.only("base"), report.methods, report.only("twin")]
    return join(*(el("tbody", [row(model) for model in group]) for group in groups if group))


def _head(model: ReportModel, *, note: bool = True) -> Html:
    role = {"base": "floor", "twin": "ceiling", "control": "control"}.get(model.part)
    tag = join(" ", el("span", role, class_="tag")) if role else None
    small = el("small", model.note) if note and model.note else None
    return el("th", el("bdi", model.label), tag, small, scope="row")


def _cell(value: float, best: bool, name: str | None = None, *, pair: bool = False) -> Html:
    kind = "number pair" if pair else "number"
    if math.isnan(value):
        title = "Does not apply, or was not measured."
        return el("td", el("span", words.DASH, title=title, class_="none"), class_=kind)
    text = words.score(value)
    return el("td", el("b", text, title="Best of the methods") if best else text, class_=kind, title=name)


def _marks(report: Report) -> str:
    if len(report.methods) < 2:
        return "Layers are counted from 0."
    bold = "Bold: the best of the methods to three decimals; ties share it, floor and ceiling do not compete."
    return f"Layers are counted from 0. {bold}"


def _missing(report: Report) -> bool:
    return any(math.isnan(term) for model in report.models for term in model.terms)


def _scroll(name: str, table: Html) -> Html:
    """A table that scrolls inside its own box where the page is narrow, also from the keyboard."""
    return el("div", table, class_="scroll", role="region", aria_label=name, tabindex="0")
