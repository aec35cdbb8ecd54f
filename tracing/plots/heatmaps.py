"""Heat maps of mean indirect effects, token role by layer, as PNG.

Drawn on a figure of their own (Agg, no pyplot state), on a light background, with one sequential color scale that
begins at zero and is shared by the panels: dark is more, pale is nothing, white was not measured. Numbers are in
`tracing.effects.table`; what a notebook calls is `tracing.plots.pictures`.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lm.errors import UserError
from lm.run_folder import write_atomic
from tracing.arrays import Array
from tracing.effects.effects import Effects
from tracing.effects.roles import SUBJECT_ROLES
from tracing.effects.summary import peak, put_back
from tracing.effects.table import EffectTable
from tracing.plan.layer_plan import layer_runs
from tracing.plots.glyphs import families, readable
from tracing.plots.lines import explained, line
from tracing.question.metrics import metric_label
from tracing.question.sweep import cut_windows

INK, SOFT, _MISSING, ACCENT = "#1f2933", "#6b7785", "#ffffff", "#d1495b"
_LINES = ("#26467f", "#d98a29")
LEAST = 2.1
"""Inches: what the label of a color bar needs."""
_MOST_TOKENS = 40
"""Rows of one fact's picture."""
# One hue, lightness falling evenly: readable in gray and by the color-blind.
SCALE = LinearSegmentedColormap.from_list(
    "indigo", ["#f1f4f9", "#cfdbed", "#a3badd", "#7293c6", "#476cab", "#26467f", "#0f2350"]
)
DOT = "\u00a0· "  # never begins a line
KIND_NAMES = {"resid": "whole stream after a block", "mlp": "MLP", "attn": "attention"}
ROLE_NAMES = {
    "before": "before the subject",
    "first_subject": "first subject token",
    "middle_subject": "middle subject tokens",
    "last_subject": "last subject token",
    "first_after": "first token after",
    "further": "further tokens",
    "last": "last token",
}


def heatmap(
    table: EffectTable, path: str | Path | None = None, *, band: Sequence[int] = (), tentative: bool = False
) -> bytes:
    """One table as a PNG; written to `path` as well, if there is one. `band`: the layers to outline."""
    data = figure([table], band=band, tentative=tentative)
    if path is not None:
        write_atomic(Path(path), data)
    return data


def figure(
    tables: Sequence[EffectTable],
    *,
    band: Sequence[int] = (),
    band_kinds: Sequence[str] | None = None,
    tentative: bool = False,
) -> bytes:
    """Tables side by side on one color scale, as PNG bytes.

    Args:
        tables: of the same roles and layers.
        band: the chosen layers, outlined and named.
        band_kinds: the kinds whose panels get the outline; None for all.
        tentative: draw the outline dashed, for layers that the evidence does not single out.

    Raises:
        UserError: no tables, or tables that do not belong together.
    """
    if not tables:
        raise UserError("there is no table to draw: give at least one")
    first = tables[0]
    if any((one.roles, one.mean.shape, one.metric) != (first.roles, first.mean.shape, first.metric) for one in tables):
        raise UserError("the tables to draw differ in roles, layers or metric: draw them apart")
    shown = [row for row, role in enumerate(first.roles) if any(one.facts[row] for one in tables)] or [0]
    layers = first.mean.shape[1]
    top = max(float(np.nanmax(np.where(np.isnan(one.mean), 0.0, one.mean))) for one in tables)
    norm = Normalize(0, top if top > 0 else 1.0)

    width = 3.3 + len(tables) * (1.1 + 0.135 * min(max(layers, 8), 40))
    caption = textwrap.wrap(_caption(tables, band, top, tentative), int(width * 15))
    maps, lines = max(0.5 + 0.3 * len(shown), LEAST), 1.3
    sheet = Figure(figsize=(width, 0.65 + maps + lines + 0.17 * len(caption)), dpi=200, facecolor="white")
    FigureCanvasAgg(sheet)
    sheet.set_layout_engine("constrained", w_pad=0.06, wspace=0.03)
    heights = {"height_ratios": [maps, lines]}
    grid: Any = sheet.subplots(2, len(tables), squeeze=False, gridspec_kw=heights)
    axes = grid[0]
    for axis, under, table in zip(axes, grid[1], tables, strict=True):
        panel(axis, table.mean[list(shown)], norm, KIND_NAMES[table.kind], table.window)
        hatch(axis, cut_windows(table.window, layers, table.kind), len(shown))
        axis.set_yticks([])
        _lines(under, table)
        if band_kinds is None or table.kind in band_kinds:
            outline(axis, band, len(shown), tentative)
    axes[0].set_yticks([row + 0.5 for row in range(len(shown))], [row_label(first, row) for row in shown])
    for axis in axes:
        axis.tick_params(axis="y", length=0, labelsize=9, labelcolor=INK)
    color_bar(sheet, axes, norm, "mean indirect effect", total=first.total_effect)
    text = sheet.supxlabel("\n".join(caption), fontsize=8.5, color=SOFT, x=0.012, ha="left")
    text.set_linespacing(1.35)
    buffer = io.BytesIO()
    sheet.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _lines(axis: Any, table: EffectTable) -> None:
    """Under a heat map, on a scale of its own, with intervals: the subject's row of the largest effect, and the last token."""
    subject = np.isin(table.roles, SUBJECT_ROLES)[:, None]
    found = peak(table.kind, table.roles, np.where(subject, table.mean, np.nan))
    rows = [found[0]] if found else []
    rows += [row for row, role in enumerate(table.roles) if role == "last" and table.facts[row]]
    for row, color in zip(rows, _LINES, strict=False):
        line(axis, table, row, color, ROLE_NAMES.get(table.roles[row], table.roles[row]))
    axis.axhline(0, color=SOFT, linewidth=0.8, zorder=0)
    axis.set_xlim(-0.5, table.mean.shape[1] - 0.5)
    axis.set_xticks([])
    axis.tick_params(axis="y", labelsize=8, colors=SOFT, length=2)
    for side in ("top", "right", "bottom"):
        axis.spines[side].set_visible(False)
    axis.spines["left"].set_color("#c5ccd3")
    if rows:
        axis.legend(fontsize=7.5, frameon=False, labelcolor=INK, handlelength=1.4, loc="best", borderaxespad=0.1)


def fact_figure(effects: Effects, fact: int) -> bytes:
    """One fact, token by layer, a panel a kind, on one color scale, as PNG bytes. Raises UserError if there is no such fact."""
    if not 0 <= fact < len(effects.facts):
        raise UserError(f"there is no fact {fact}: these effects hold 0 to {len(effects.facts) - 1}")
    cells = {kind: effects.indirect(kind)[fact] for kind in effects.kinds}
    start, end = effects.subject_spans[fact]
    tokens = effects.tokens[fact]
    rows = _token_rows(np.concatenate(list(cells.values()), axis=1), range(start, end))
    top = max(float(np.nanmax(np.where(np.isnan(one), 0.0, one))) for one in cells.values())
    norm = Normalize(0, top if top > 0 else 1.0)
    width = 2.9 + len(cells) * (1.1 + 0.135 * min(max(effects.layers, 8), 40))
    sheet = Figure(
        figsize=(width, max(1.1 + 0.22 * len(rows), LEAST + 0.5)), dpi=200, facecolor="white", layout="constrained"
    )
    FigureCanvasAgg(sheet)
    axes: Any = sheet.subplots(1, len(cells), sharey=True, squeeze=False)[0]
    for axis, (kind, values) in zip(axes, cells.items(), strict=True):
        window = 1 if kind == "resid" else effects.window
        panel(axis, np.stack([_largest(values[list(row)]) for row in rows]), norm, KIND_NAMES[kind], window)
        hatch(axis, cut_windows(window, effects.layers, kind), len(rows))
    words = [
        f"… {len(row)} tokens" if len(row) > 1 else readable(tokens[row[0]]) + (" *" if start <= row[0] < end else "")
        for row in rows
    ]
    axes[0].set_yticks([row + 0.5 for row in range(len(rows))], words, fontfamily=families(*words))
    axes[0].tick_params(axis="y", length=0, labelsize=8, labelcolor=INK)
    for axis in axes[1:]:
        axis.tick_params(axis="y", length=0)
    total = float(effects.total[fact])
    color_bar(sheet, axes, norm, "indirect effect", total=total)
    caption = f"{readable(effects.facts[fact].label)}: what each cell brings back of {total:.3g} lost; * is the subject"
    caption += "" if total > 0 else "; no shares: the corruption took nothing"
    caption += "; of several tokens in a row (…) the largest effect" if any(len(row) > 1 for row in rows) else ""
    text = sheet.supxlabel(
        "\n".join(textwrap.wrap(caption, int(width * 15))),
        fontsize=8.5,
        color=SOFT,
        x=0.012,
        ha="left",
        fontfamily=families(caption),
    )
    text.set_linespacing(1.35)
    buffer = io.BytesIO()
    sheet.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _token_rows(cells: Array, subject: range) -> list[tuple[int, ...]]:
    """The tokens, (tokens, cells), that get a row each, and those that share one: neighbors that bring nothing back, or the
    least where there are too many. The subject and the last token stand alone; what was not measured is left out."""
    effect = np.where(np.isnan(cells), 0.0, np.abs(cells)).max(axis=1)
    there = [token for token in range(len(cells)) if not np.isnan(cells[token]).all()]
    alone = {*subject, len(cells) - 1}
    others = sorted(
        (token for token in there if token not in alone and effect[token] > 0), key=lambda one: -effect[one]
    )
    alone |= set(others[: max(_MOST_TOKENS - len(alone), 0)])
    rows: list[tuple[int, ...]] = []
    for token in there:
        if token not in alone and rows and rows[-1][-1] == token - 1 and rows[-1][0] not in alone:
            rows[-1] += (token,)
        else:
            rows.append((token,))
    return rows


def _largest(values: Array) -> Array:
    """(layers,): of (tokens, layers) the effect that is furthest from zero; NaN where no token has one."""
    far = np.abs(np.where(np.isnan(values), -1.0, values)).argmax(axis=0) if len(values) > 1 else 0
    picked: Array = np.take_along_axis(values, np.atleast_1d(far)[None], axis=0)[0] if len(values) > 1 else values[0]
    return picked


def color_bar(
    sheet: Figure, axes: Any, norm: Normalize, label: str, scale: Colormap = SCALE, *, total: float = 0.0
) -> None:
    """What the colors of these panels mean; beside each number its share of the total effect, if that is above zero."""
    bar: Any = sheet.colorbar(
        ScalarMappable(norm, scale), ax=list(axes), pad=0.012, fraction=0.09 / len(axes), aspect=16
    )
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, colors=SOFT, length=2)
    if total > 0:
        digits = 0 if (norm.vmax or 0.0) >= 0.1 * total else 1
        bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:.3g} ({value / total:.{digits}%})")
        label += "\n(share of the total effect)"
    bar.set_label(label, fontsize=8.5, color=SOFT)


def hatch(axis: Any, layers: Sequence[int], rows: int) -> None:
    """Mark layers whose windows are cut."""
    for layer in layers:
        axis.add_patch(Rectangle((layer, 0), 1, rows, fill=False, hatch="////", edgecolor="white", linewidth=0))


def panel(axis: Any, mean: Array, norm: Normalize, title: str, window: int, scale: Colormap = SCALE) -> None:
    """One heat map, (rows, layers), rows unnamed."""
    rows, layers = mean.shape
    values = np.ma.masked_invalid(mean)
    scale = scale.with_extremes(bad=_MISSING)
    axis.pcolormesh(values, cmap=scale, norm=norm, edgecolors="white", linewidth=0.6)
    for side in axis.spines.values():
        side.set_visible(False)
    axis.set_xlim(0, layers)
    axis.set_ylim(rows, 0)
    step = next(step for step in (1, 2, 4, 5, 10, 20, 50) if layers / step <= 12 or step == 50)
    axis.set_xticks([layer + 0.5 for layer in range(0, layers, step)], [str(layer) for layer in range(0, layers, step)])
    axis.tick_params(axis="x", length=0, labelsize=8, colors=SOFT)
    around = f", {window} layers around; hatched: fewer" if window > 1 else ""
    axis.set_xlabel(f"layer{around}", fontsize=8.5, color=SOFT)
    axis.set_title(title, fontsize=10.5, color=INK, loc="left", pad=7)


def outline(axis: Any, band: Sequence[int], rows: int, tentative: bool) -> None:
    """Frame the chosen layers."""
    style = "--" if tentative else "-"
    for start, end in layer_runs(band):
        box = Rectangle((start, 0), end - start, rows, fill=False, edgecolor=ACCENT, linewidth=1.8, linestyle=style)
        box.set_clip_on(False)
        axis.add_patch(box)


def counted(facts: int | str) -> str:
    """`1 fact`, `12 facts`, on one line."""
    return f"{facts}\u00a0fact{'' if str(facts) == '1' else 's'}"


def row_label(table: EffectTable, row: int) -> str:
    """A token role, with how many facts have it if not all do."""
    count = int(table.facts[row])
    few = f" ({count} fact{'s' if count != 1 else ''})" if count < table.total_facts else ""
    return ROLE_NAMES.get(table.roles[row], table.roles[row]) + few


def _caption(tables: Sequence[EffectTable], band: Sequence[int], top: float, tentative: bool) -> str:
    table = tables[0]
    kinds, window = [one.kind for one in tables], max(one.window for one in tables)
    parts = [
        f"Change in the {metric_label(table.metric)} when {put_back(kinds, window)} is put back",
        counted(table.total_facts),
        "subject replaced by other names"
        if table.sigma is None
        else f"subject blurred by noise, σ = {table.sigma:.3g}",
    ]
    if band:
        names = ", ".join(f"{a}–{b - 1}" if b - a > 1 else str(a) for a, b in layer_runs(band))
        parts.append(f"outlined{' (not singled out)' if tentative else ''}: layers {names}")
    cut = [one for one in tables if cut_windows(one.window, one.mean.shape[1], one.kind)]
    alone = all(np.isnan(one.low).all() for one in tables)
    means = "means" if not alone else "of one fact" if table.total_facts == 1 else "of one group of facts"
    spread = ", without intervals" if alone else f" with their {table.confidence:.0%} intervals"
    parts.append(f"lines: {means}{spread}, each panel on its own scale")
    if cut:
        parts.append(explained(cut[0].window))
    if not table.total_effect > 0:
        parts.append("no shares: on average the corruption took nothing")
    if top <= 0:
        parts.append("no effect is above zero")
    elif any(np.nanmin(np.where(np.isnan(one.mean), 0.0, one.mean)) < -0.02 * top for one in tables):
        parts.append("effects below zero are palest")
    return DOT.join(parts)
