"""The section on where it is stored: heat maps, the plan with its rule and controls, and the numbers behind them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tracing.effects.table import EffectTable
from tracing.plan.layer_plan import LayerPlan
from tracing.question.metrics import metric_label
from tracing.question.sweep import cut_windows
from unlearn.report import words
from unlearn.report.drawing.heat_maps import beside, color_key, heat_map, largest, layer_scores, shown_roles
from unlearn.report.records import Report
from unlearn.report.sections.figures import Figure, Numbers, NumberTable

_ORDER = ("resid", "mlp", "attn")


@dataclass(frozen=True, kw_only=True)
class Location:
    """The section: all of it may be empty where nothing was traced."""

    explanation: str | None
    finding: str | None
    figures: tuple[Figure, ...]
    plan: tuple[tuple[str, str], ...]
    numbers: Numbers | None


def location(report: Report) -> Location | None:
    """What the section shows; None if nothing was traced and no layers were planned."""
    plan = report.plan
    tables = [report.tables[kind] for kind in _ORDER if kind in report.tables]
    if plan is None and not tables:
        return None
    figures = _maps(tables, plan)
    scores = _scores(plan, rows=max([4, *(len(shown_roles(table)) for table in tables)]))
    return Location(
        explanation=_explanation(tables[0], plan) if tables else None,
        finding=plan.verdict if plan is not None else None,
        figures=tuple(figures if scores is None else [*figures, scores]),
        plan=tuple(_plan(plan)) if plan is not None else (),
        numbers=numbers(tables, "The effects in numbers", "mean indirect effect by layer") if tables else None,
    )


def _explanation(table: EffectTable, plan: LayerPlan | None) -> str:
    metric = metric_label(table.metric)
    outlined = " The outline marks the chosen layers" if plan is not None else ""
    if plan is not None:
        outlined += (
            "."
            if plan.singled_out or not plan.evidence
            else "; it is dashed because the evidence does not single them out."
        )
    return (
        f"The subject of each prompt is {_corrupted(table.sigma)}, and one clean activation is put "
        f"back at a time. A cell shows how much of the {metric} that brings back, as a mean over "
        f"{_facts(table.total_facts)}; {_taken(table.total_effect)}. Stronger color is more.{outlined} This shows "
        "where an answer is carried, not where training works best."
    )


def _maps(tables: Sequence[EffectTable], plan: LayerPlan | None) -> list[Figure]:
    """One figure a kind. The residual stream has its own color scale; MLP and attention, which are parts of it, share one."""
    figures = []
    for table in tables:
        if not shown_roles(table):
            continue
        group = [other for other in tables if (other.kind == "resid") == (table.kind == "resid")]
        top = largest(group)
        low = min(float(np.nanmin(other.mean, initial=0.0)) for other in group)
        band = plan.layers if plan is not None else ()
        drawn = heat_map(
            table,
            top=top,
            band=band,
            outlined=plan is not None and _is_planned(table.kind, plan),
            tentative=plan is not None and not plan.singled_out,
        )
        window = f", {table.window} layers around each restored together" if table.window > 1 else ""
        cut = cut_windows(table.window, table.mean.shape[1], table.kind)
        window += f", fewer at {words.layer_name(cut)}" if cut else ""
        figures.append(Figure(title=words.KINDS[table.kind], note=window, key=color_key(top, low), drawing=drawn))
    return figures


def _scores(plan: LayerPlan | None, *, rows: int) -> Figure | None:
    if plan is None:
        return None
    drawn = layer_scores(plan.evidence, plan.layers, rows=rows, tentative=not plan.singled_out)
    if drawn is None:
        return None
    kind = str(plan.evidence.get("kind", ""))
    confidence = plan.evidence.get("confidence")
    interval = f", with {float(confidence):.0%} intervals" if isinstance(confidence, float) else ""
    names = {"mlp": "MLP", "attn": "attention", "both": "MLP and attention", "resid": "residual stream"}
    return Figure(title="Layer score", small=f"{names.get(kind, kind)} effect at the subject{interval}", drawing=drawn)


def _plan(plan: LayerPlan) -> list[tuple[str, str]]:
    modules = words.listing([words.MODULES.get(module, module) for module in plan.modules])
    rows = [("Chosen", f"{modules} of {words.layer_name(plan.layers)}"), ("Rule", plan.rule)]
    for name, layers in plan.controls.items():
        rows.append((f"Control “{name}”", words.layer_name(layers)))
    used, left = plan.provenance.get("facts_used"), plan.provenance.get("facts_left_out")
    if used is not None:
        rows.append(("Facts", f"{_facts(len(used))} used, {len(left or ())} left out{_reasons(left)}"))
    return [*rows, *(("Note", str(caveat)) for caveat in plan.evidence.get("caveats", ()))]


def _reasons(left: object) -> str:
    """The reasons for leaving facts out, most frequent first, without their numbers where there are many."""
    if not isinstance(left, dict) or not left:
        return ""
    counts: dict[str, int] = {}
    for reason in left.values():
        counts[str(reason)] = counts.get(str(reason), 0) + 1
    common = sorted(counts.items(), key=lambda each: (-each[1], each[0]))[:3]
    more = f"; {len(counts) - 3} other reasons" if len(counts) > 3 else ""
    return f" ({'; '.join(f'{count} × {reason}' for reason, count in common)}{more})"


def numbers(tables: Sequence[EffectTable], summary: str, what: str) -> Numbers:
    """The same as tables, for those who cannot see colors or want to copy."""
    return Numbers(summary=summary, tables=tuple(_table(table, what) for table in tables))


def _table(table: EffectTable, what: str) -> NumberTable:
    layers = range(table.mean.shape[1])
    return NumberTable(
        caption=f"{words.KINDS[table.kind]}: {what}",
        label=words.KINDS[table.kind],
        columns=("Token role", *map(str, layers)),
        rows=tuple(
            (
                f"{words.ROLES.get(table.roles[row], table.roles[row])} ({_facts(int(table.facts[row]))})",
                tuple(_cell(table, row, layer) for layer in layers),
            )
            for row in shown_roles(table)
        ),
    )


def _cell(table: EffectTable, row: int, layer: int) -> tuple[str, str]:
    return words.small(float(table.mean[row, layer])), ", ".join(beside(table, row, layer))


def _is_planned(kind: str, plan: LayerPlan) -> bool:
    """Whether the plan trains this kind; whole blocks are shown by the residual stream."""
    return kind in plan.modules or ("all" in plan.modules and kind == "resid")


def _facts(count: int) -> str:
    return f"{count} fact{'s' if count != 1 else ''}"


def _taken(total: float) -> str:
    if not total > 0:
        return "the corruption itself took nothing on average"
    return f"the corruption took {words.small(total)} on average"


def _corrupted(sigma: float | None) -> str:
    return (
        "replaced by another of as many tokens" if sigma is None else f"blurred with noise (σ = {words.small(sigma)})"
    )
