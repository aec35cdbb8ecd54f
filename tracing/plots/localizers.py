"""A picture of several localizers: the scores of each by layer, and how alike they rank layers, as PNG.

Drawn as `tracing.plots.heatmaps` draws: a figure of its own, light, in colors that stay apart in gray and for the
color-blind. Units differ, so every panel has its own scale. Numbers are in `tracing.effects.layer_scores` and
`tracing.combine`.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure

from lm.anatomy import Kind
from tracing.bootstrap import units
from tracing.effects.layer_scores import LayerScores
from tracing.plan.combined import Agreements
from tracing.plan.layer_plan import LayerPlan, layer_runs
from tracing.plots.heatmaps import ACCENT, DOT, INK, KIND_NAMES, SOFT, counted

_LINES: dict[Kind, tuple[str, str]] = {"mlp": ("#26467f", "o"), "attn": ("#d98a29", "s"), "resid": ("#5a7d5a", "^")}
_DIVERGING = LinearSegmentedColormap.from_list("apart", ["#d1495b", "#f3d9dc", "#ffffff", "#cfdbed", "#26467f"])


def overview(
    found: Mapping[str, LayerScores],
    agreements: Agreements,
    plan: LayerPlan,
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> bytes:
    """A panel a localizer, and a matrix of rank correlations for each kind that the plan looks at, as PNG bytes.

    Args:
        found: what `agreements` and `plan` were made of.
        confidence, seed: of the bands, which are bootstrap intervals of the mean over facts.
    """
    kinds = plan_kinds(plan)
    shown: list[Kind] = [kind for kind in agreements.pairs if kind != "resid" or kind in kinds]
    rows = -(-len(found) // 2)
    wide = 0.55 * len(found) + 1.8
    width = 6.2 + wide * len(kinds)
    caption = textwrap.wrap(_caption(plan, found, confidence), int(width * 15))
    sheet = Figure(figsize=(width, 0.45 + 1.7 * rows + 0.2 * len(caption)), dpi=200, facecolor="white")
    FigureCanvasAgg(sheet)
    sheet.set_layout_engine("constrained", w_pad=0.06, h_pad=0.05, wspace=0.04, hspace=0.02)
    grid = sheet.add_gridspec(rows, 2 + len(kinds), width_ratios=[3.1, 3.1] + [wide] * len(kinds))
    for place, (name, scores) in enumerate(found.items()):
        axis = sheet.add_subplot(grid[place // 2, place % 2])
        _profile(axis, name, scores, shown, plan, confidence, seed)
        if place == 0:
            axis.legend(fontsize=7.5, frameon=False, labelcolor=INK, handlelength=1.6, borderaxespad=0.1)
        if place + 2 >= len(found):
            axis.set_xlabel("layer", fontsize=8.5, color=SOFT)
    for place, kind in enumerate(kinds):
        _matrix(sheet.add_subplot(grid[:, 2 + place]), agreements, kind)
    text = sheet.supxlabel("\n".join(caption), fontsize=8.5, color=SOFT, x=0.012, ha="left")
    text.set_linespacing(1.35)
    buffer = io.BytesIO()
    sheet.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def plan_kinds(plan: LayerPlan) -> tuple[Kind, ...]:
    """The kinds of score that a plan was drawn from."""
    return ("mlp", "attn") if plan.evidence["kind"] == "both" else (plan.evidence["kind"],)


def _profile(
    axis: Any, name: str, scores: LayerScores, kinds: Sequence[Kind], plan: LayerPlan, confidence: float, seed: int
) -> None:
    """The means over facts by layer, a line a kind, with bands; the plan's layers shaded."""
    layers = np.arange(scores.layers)
    for start, end in layer_runs(plan.layers):
        axis.axvspan(start - 0.5, end - 0.5, color=ACCENT, alpha=0.1, linewidth=0)
    axis.axhline(0, color=SOFT, linewidth=0.6)
    for kind in kinds:
        color, mark = _LINES[kind]
        low, high = scores.interval(kind, confidence=confidence, seed=seed)
        axis.fill_between(layers, low, high, color=color, alpha=0.18, linewidth=0)
        axis.plot(
            layers,
            scores.mean(kind),
            mark,
            linestyle="-",
            color=color,
            linewidth=1.3,
            markersize=3,
            label=KIND_NAMES[kind],
        )
    axis.set_xlim(-0.5, scores.layers - 0.5)
    step = next(step for step in (1, 2, 4, 5, 10, 20, 50) if scores.layers / step <= 12 or step == 50)
    axis.set_xticks(range(0, scores.layers, step))
    axis.tick_params(labelsize=7.5, colors=SOFT, length=2)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color("#c5ccd3")
    unit = textwrap.wrap(scores.unit, 54, max_lines=2, placeholder=" …")
    axis.set_title(name, fontsize=9.5, color=INK, loc="left", pad=4 + 9 * len(unit))
    axis.text(0, 1.03, "\n".join(unit), transform=axis.transAxes, fontsize=6.5, color=SOFT, va="bottom")


def _matrix(axis: Any, agreements: Agreements, kind: Kind) -> None:
    """Every pair's rank correlation; bold where agreement is shown."""
    names, values = agreements.names, agreements.matrix(kind)
    lower = np.where(np.tri(len(names), k=-1, dtype=bool), values, np.nan)
    axis.pcolormesh(
        np.ma.masked_invalid(lower[1:, :-1]), cmap=_DIVERGING, norm=Normalize(-1, 1), edgecolors="white", linewidth=1
    )
    for column, one in enumerate(names[:-1]):
        for row, other in enumerate(names[1:]):
            if row >= column:
                pair = agreements.pairs[kind][one, other]
                told = "–" if np.isnan(pair.correlation) else f"{pair.correlation:.2f}"
                ink = "white" if abs(pair.correlation) > 0.75 else INK
                weight = "bold" if pair.shown else "normal"
                axis.text(column + 0.5, row + 0.5, told, ha="center", va="center", fontsize=8, color=ink, weight=weight)
    axis.set_xlim(0, len(names) - 1)
    axis.set_ylim(len(names) - 1, 0)
    axis.set_xticks(np.arange(len(names) - 1) + 0.5, names[:-1], rotation=35, ha="right", rotation_mode="anchor")
    axis.set_yticks(np.arange(len(names) - 1) + 0.5, names[1:])
    axis.tick_params(length=0, labelsize=8, labelcolor=INK)
    for side in axis.spines.values():
        side.set_visible(False)
    axis.set_aspect("equal", anchor="N")
    axis.set_title(f"rank correlation, {KIND_NAMES[kind]}", fontsize=9.5, color=INK, loc="left", pad=8)


def _caption(plan: LayerPlan, found: Mapping[str, LayerScores], confidence: float) -> str:
    counts = sorted({len(one.facts) for one in found.values()})
    names = ", ".join(f"{start}–{end - 1}" if end - start > 1 else str(start) for start, end in layer_runs(plan.layers))
    many = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    spread = any(int(units([fact.group for fact in one.facts]).max()) > 0 for one in found.values())
    told = f" with their {confidence:.0%} intervals" if spread else ", one group of facts and so without intervals"
    return DOT.join(
        [
            f"Means over {counted(many)}{told}",
            f"shaded: layers {names}, first by mean rank{'' if plan.singled_out else ' (not singled out)'}",
            "bold: shown to agree, by facts and against shuffled layers",
        ]
    )
