"""The section on where it is stored: heat maps, the plan with its rule and controls, and the numbers behind them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tracing.effects.table import EffectTable
from tracing.plan.layer_plan import LayerPlan
from tracing.question.metrics import metric_label
from tracing.question.sweep import cut_windows
from unlearn.report import words
from unlearn.report.charts import beside, color_key, heat_map, largest, layer_scores, shown_roles
from unlearn.report.markup import Html, el, join
from unlearn.report.records import Report

_ORDER = ("resid", "mlp", "attn")


def where(report: Report) -> Html:
    """The whole section but its heading."""
    tables = [report.tables[kind] for kind in _ORDER if kind in report.tables]
    if report.plan is None and not tables:
        return el("p", "Nothing was traced for this report, and no layers were planned.")
    parts = [_explanation(tables[0], report.plan)] if tables else []
    if report.plan is not None:
        parts.append(el("p", report.plan.verdict, class_="finding"))
    figures = _maps(tables, report.plan)
    scores = _scores(report.plan, rows=max([4, *(len(shown_roles(table)) for table in tables)]))
    if figures or scores is not None:
        parts.append(el("div", figures, scores, class_="figures two"))
    if report.plan is not None:
        parts.append(_plan(report.plan))
    if tables:
        parts.append(numbers(tables, "The effects in numbers", "mean indirect effect by layer"))
    return join(parts)


def _explanation(table: EffectTable, plan: LayerPlan | None) -> Html:
    metric = metric_label(table.metric)
    outlined = " The outline marks the chosen layers" if plan is not None else ""
    if plan is not None:
        outlined += (
            "."
            if plan.singled_out or not plan.evidence
            else "; it is dashed because the evidence does not single them out."
        )
    return el(
        "p",
        f"The subject of each prompt is {_corrupted(table.sigma)}, and one clean activation is put "
        f"back at a time. A cell shows how much of the {metric} that brings back, as a mean over "
        f"{_facts(table.total_facts)}; {_taken(table.total_effect)}. Stronger color is more.{outlined} This shows "
        "where an answer is carried, not where training works best.",
    )


def _maps(tables: Sequence[EffectTable], plan: LayerPlan | None) -> list[Html]:
    """One figure a kind. The stream has its own color scale; MLP and attention, which are parts of it, share one."""
    out = []
    for table in tables:
        if not shown_roles(table):
            continue
        group = [one for one in tables if (one.kind == "resid") == (table.kind == "resid")]
        top = largest(group)
        low = min(float(np.nanmin(one.mean, initial=0.0)) for one in group)
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
        caption = el("figcaption", el("b", words.KINDS[table.kind]), window, color_key(top, low))
        out.append(el("figure", caption, drawn))
    return out


def _scores(plan: LayerPlan | None, *, rows: int) -> Html | None:
    if plan is None:
        return None
    drawn = layer_scores(plan.evidence, plan.layers, rows=rows, tentative=not plan.singled_out)
    if drawn is None:
        return None
    kind = str(plan.evidence.get("kind", ""))
    confidence = plan.evidence.get("confidence")
    interval = f", with {float(confidence):.0%} intervals" if isinstance(confidence, float) else ""
    names = {"mlp": "MLP", "attn": "attention", "both": "MLP and attention", "resid": "whole stream"}
    note = el("small", f"{names.get(kind, kind)} effect at the subject{interval}")
    return el("figure", el("figcaption", el("b", "Layer score"), note), drawn)


def _plan(plan: LayerPlan) -> Html:
    modules = words.listing([words.MODULES.get(module, module) for module in plan.modules])
    rows = [("Chosen", f"{modules} of {words.layer_name(plan.layers)}"), ("Rule", plan.rule)]
    for name, layers in plan.controls.items():
        rows.append((f"Control “{name}”", words.layer_name(layers)))
    used, left = plan.provenance.get("facts_used"), plan.provenance.get("facts_left_out")
    if used is not None:
        rows.append(("Facts", f"{_facts(len(used))} used, {len(left or ())} left out{_reasons(left)}"))
    rows += [("Note", str(caveat)) for caveat in plan.evidence.get("caveats", ())]
    return el("dl", [el("div", el("dt", name), el("dd", text)) for name, text in rows], class_="facts")


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


def numbers(tables: Sequence[EffectTable], summary: str, what: str) -> Html:
    """The same as tables, for those who cannot see colors or want to copy."""
    out = []
    for table in tables:
        layers = table.mean.shape[1]
        head = [el("th", "Token role", scope="col")] + [
            el("th", str(i), scope="col", class_="number") for i in range(layers)
        ]
        body = [
            el(
                "tr",
                el(
                    "th",
                    f"{words.ROLES.get(table.roles[row], table.roles[row])} ({_facts(int(table.facts[row]))})",
                    scope="row",
                ),
                [_cell(table, row, layer) for layer in range(layers)],
            )
            for row in shown_roles(table)
        ]
        caption = el("caption", f"{words.KINDS[table.kind]}: {what}")
        made = el("table", caption, el("thead", el("tr", head)), el("tbody", body), class_="plain")
        out.append(el("div", made, class_="scroll", role="region", aria_label=words.KINDS[table.kind], tabindex="0"))
    return el("details", el("summary", summary), out)


def _cell(table: EffectTable, row: int, layer: int) -> Html:
    title = ", ".join(beside(table, row, layer)) or None
    return el("td", words.small(float(table.mean[row, layer])), class_="number", title=title)


def _is_planned(kind: str, plan: LayerPlan) -> bool:
    """Whether the plan trains this kind; whole blocks are shown by the stream."""
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
