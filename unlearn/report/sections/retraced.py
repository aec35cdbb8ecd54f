"""The section on what is left where it was stored: facts traced again after unlearning; before, after, and the change."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tracing.effects.table import EffectTable
from tracing.plan.layer_plan import LayerPlan
from tracing.question.metrics import metric_label
from unlearn.report import words
from unlearn.report.drawing.heat_maps import color_key, heat_map, largest
from unlearn.report.records import Report, Retraced
from unlearn.report.sections.figures import Figure, Numbers
from unlearn.report.sections.location import numbers


@dataclass(frozen=True, kw_only=True)
class KindAgain:
    """One kind of activation: the finding, the three maps, the change in numbers."""

    finding: str
    figures: tuple[Figure, ...]
    numbers: Numbers


@dataclass(frozen=True, kw_only=True)
class TracedAgain:
    """The section: its explanation, and for each set of facts its label and what was found kind by kind."""

    explanation: str
    sets: tuple[tuple[str, tuple[KindAgain, ...]], ...]


def traced_again(report: Report) -> TracedAgain | None:
    """What the section shows; None if nothing was traced again."""
    if not report.again:
        return None
    metric = metric_label(report.again[0].found.metric)
    explanation = (
        "The facts that were traced before unlearning, traced again in the model after it: the same prompts, the same corruption "
        "with noise of the same size, and no fact left out because it is no longer answered. A cell shows how much of the "
        f"{metric} putting one clean activation back brings; before and after share a color scale, the change has its own. "
        "Little left to bring back says that the answer is no longer carried there, not that it cannot be had in another way."
    )
    return TracedAgain(
        explanation=explanation, sets=tuple((again.label, _kinds(report, again)) for again in report.again)
    )


def _kinds(report: Report, again: Retraced) -> tuple[KindAgain, ...]:
    kinds = []
    for kind in again.found.kinds:
        before, after, change = (again.found.before[kind], again.found.after[kind], again.found.change[kind])
        top, most = largest([before, after]), largest([change])
        figures = (
            _figure("Before", "mean indirect effect before", before, top, report.plan),
            _figure("After", "mean indirect effect after", after, top, report.plan),
            _figure("Change", "change of the mean indirect effect", change, most, report.plan),
        )
        table = numbers([change], "The change in numbers", "after minus before, mean indirect effect by layer")
        kinds.append(KindAgain(finding=again.found.sentence(kind), figures=figures, numbers=table))
    return tuple(kinds)


def _figure(title: str, what: str, table: EffectTable, top: float, plan: LayerPlan | None) -> Figure:
    drawn = heat_map(
        table,
        top=top,
        band=() if plan is None else plan.layers,
        outlined=plan is not None,
        tentative=plan is not None and not plan.singled_out,
        what=what,
    )
    key = color_key(top, float(np.nanmin(table.mean, initial=0.0)))
    return Figure(title=title, note=f" {words.KINDS[table.kind]}", key=key, drawing=drawn)
