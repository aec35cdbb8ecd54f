"""The section on what is left where it was stored: facts traced again after unlearning; before, after, and the change."""

from __future__ import annotations

import numpy as np

from tracing.effects.table import EffectTable
from tracing.plan.layer_plan import LayerPlan
from tracing.question.metrics import metric_label
from unlearn.report import words
from unlearn.report.charts import color_key, heat_map, largest
from unlearn.report.location import numbers
from unlearn.report.markup import Html, el, join
from unlearn.report.records import Report, Retraced


def traced_again(report: Report) -> Html | None:
    """The whole section but its heading; None if nothing was traced again."""
    if not report.again:
        return None
    metric = metric_label(report.again[0].found.metric)
    explanation = el(
        "p",
        "The facts that were traced before unlearning, traced again in the model after it: the same prompts, the same corruption "
        "with noise of the same size, and no fact left out because it is no longer answered. A cell shows how much of the "
        f"{metric} putting one clean activation back brings; before and after share a color scale, the change has its own. "
        "Little left to bring back says that the answer is no longer carried there, not that it cannot be had in another way.",
    )
    return join(explanation, *(_one(report, one) for one in report.again))


def _one(report: Report, again: Retraced) -> Html:
    parts = [el("h3", again.label)]
    for kind in again.found.kinds:
        tables = (again.found.before[kind], again.found.after[kind], again.found.change[kind])
        top, most = largest(tables[:2]), largest(tables[2:])
        figures = [
            _figure(title, what, table, scale, report.plan)
            for title, what, table, scale in (
                ("Before", "mean indirect effect before", tables[0], top),
                ("After", "mean indirect effect after", tables[1], top),
                ("Change", "change of the mean indirect effect", tables[2], most),
            )
        ]
        parts += [
            el("p", again.found.sentence(kind), class_="finding"),
            el("div", figures, class_="figures three"),
            numbers([tables[2]], "The change in numbers", "after minus before, mean indirect effect by layer"),
        ]
    return join(*parts)


def _figure(title: str, what: str, table: EffectTable, top: float, plan: LayerPlan | None) -> Html:
    low = float(np.nanmin(table.mean, initial=0.0))
    caption = el("figcaption", el("b", title), f" {words.KINDS[table.kind]}", color_key(top, low))
    drawn = heat_map(
        table,
        top=top,
        band=() if plan is None else plan.layers,
        outlined=plan is not None,
        tentative=plan is not None and not plan.singled_out,
        what=what,
    )
    return el("figure", caption, drawn)
