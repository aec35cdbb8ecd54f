"""Pictures that compare traces: before and after a model was changed, and with paths severed.

How they are drawn is `tracing.plots.heatmaps`; the numbers are `tracing.effects.before_after` and `tracing.effects.cells`.
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
from matplotlib.ticker import PercentFormatter

from lm.anatomy import Kind
from lm.errors import UserError
from tracing.effects.before_after import Difference
from tracing.effects.effects import Effects
from tracing.effects.summary import put_back
from tracing.plots.glyphs import families, readable
from tracing.plots.heatmaps import (
    INK,
    KIND_NAMES,
    LEAST,
    ROLE_NAMES,
    SCALE,
    SOFT,
    color_bar,
    counted,
    hatch,
    outline,
    panel,
    row_label,
)
from tracing.plots.lines import explained, line
from tracing.question.metrics import metric_label
from tracing.question.sweep import cut_windows

# Two hues of falling lightness away from zero: less is ochre, more is indigo; readable by the color-blind.
_BOTH_WAYS = LinearSegmentedColormap.from_list(
    "ochre and indigo", ["#6b3d06", "#a9681b", "#d9a765", "#f6f4f0", "#a3badd", "#476cab", "#0f2350"]
)
_LINES = ("#26467f", "#d1495b", "#a9681b", "#6b7785")


def difference_figure(found: Difference, kind: Kind, *, band: Sequence[int] = ()) -> bytes:
    """Before and after on one scale, and after minus before on one of its own, token role by layer, as PNG bytes.
    `band`: layers to outline."""
    if kind not in found.change:
        raise UserError(f"{kind!r} was not traced both times: use one of {', '.join(found.kinds)}")
    tables = [found.before[kind], found.after[kind], found.change[kind]]
    rows = [row for row in range(len(tables[0].roles)) if tables[0].facts[row]] or [0]
    layers = tables[0].mean.shape[1]
    top = max(_largest(table.mean, signed=True) for table in tables[:2])
    most = _largest(tables[2].mean)
    norms = [Normalize(0, top), Normalize(0, top), Normalize(-most, most)]
    width = 3.3 + 3 * (1.25 + 0.135 * min(max(layers, 8), 40))
    caption = textwrap.wrap(
        f"{KIND_NAMES[kind]}: change in the {metric_label(found.metric)} when "
        f"{put_back([kind], tables[0].window)} is put back"
        f"\u00a0· {counted(found.facts)}, the same before and after, shares of the total effect before\u00a0· "
        f"{found.sentence(kind)}",
        int(width * 15),
    )
    sheet = Figure(
        figsize=(width, 0.65 + max(0.5 + 0.3 * len(rows), LEAST) + 0.17 * len(caption)), dpi=200, facecolor="white"
    )
    FigureCanvasAgg(sheet)
    sheet.set_layout_engine("constrained", w_pad=0.06, wspace=0.03)
    axes: Any = sheet.subplots(1, 3, sharey=True, squeeze=False)[0]
    scales = (SCALE, SCALE, _BOTH_WAYS)
    for axis, table, norm, scale, title in zip(
        axes, tables, norms, scales, ("before", "after", "after − before"), strict=True
    ):
        panel(axis, table.mean[rows], norm, title, table.window, scale)
        hatch(axis, cut_windows(table.window, layers, kind), len(rows))
        outline(axis, band, len(rows), tentative=False)
        axis.tick_params(axis="y", length=0, labelsize=9, labelcolor=INK)
    axes[0].set_yticks([row + 0.5 for row in range(len(rows))], [row_label(tables[0], row) for row in rows])
    color_bar(sheet, axes[:2], norms[0], "mean indirect effect", total=tables[0].total_effect)
    color_bar(sheet, axes[2:], norms[2], "change", _BOTH_WAYS)
    return _png(sheet, caption)


def severed_figure(runs: Mapping[str, Effects], *, kind: Kind = "resid", role: str = "last_subject") -> bytes:
    """The mean effect at one token role by layer, a line a run with its interval, as PNG bytes: see `tracing.plot_severed`.

    Args:
        runs: name -> effects, as of `trace(..., sever=None)`, `sever="mlp"` and `sever="attn"`; at most four.
    """
    if not 1 <= len(runs) <= len(_LINES):
        raise UserError(f"{len(runs)} runs are to be drawn: give 1 to {len(_LINES)}")
    sheet = Figure(figsize=(6.4, 3.3), dpi=200, facecolor="white")
    FigureCanvasAgg(sheet)
    sheet.set_layout_engine("constrained")
    axis: Any = sheet.subplots()
    facts, certain = set(), False
    for (name, effects), color in zip(runs.items(), _LINES, strict=False):
        table = effects.table(kind, roles=[role])
        layer = np.arange(effects.layers)
        line(axis, table, 0, color, readable(name))
        facts.add(len(effects.facts))
        certain = certain or not bool(np.isnan(table.low).all())
    axis.axhline(0, color=SOFT, linewidth=0.8)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.tick_params(labelsize=8, colors=SOFT)
    axis.set_xticks(layer[:: max(1, len(layer) // 12)])
    axis.set_xlabel("layer", fontsize=8.5, color=SOFT)
    axis.set_ylabel("mean indirect effect", fontsize=8.5, color=SOFT)
    totals = [float(effects.total.mean()) for effects in runs.values()]
    if totals[0] > 0 and np.allclose(totals, totals[0], rtol=1e-3):  # else a share is another number for each run
        shares = axis.secondary_yaxis("right", functions=(lambda one: one / totals[0], lambda one: one * totals[0]))
        shares.yaxis.set_major_formatter(PercentFormatter(1))
        shares.tick_params(labelsize=8, colors=SOFT)
        shares.spines["right"].set_visible(False)
        shares.set_ylabel("share of the total effect", fontsize=8.5, color=SOFT)
    axis.set_title(f"{KIND_NAMES[kind]}, {ROLE_NAMES.get(role, role)}", fontsize=10.5, color=INK, loc="left", pad=7)
    axis.legend(frameon=False, prop={"size": 8.5, "family": families(*map(readable, runs))}, labelcolor=INK)
    metric = next(iter(runs.values())).metric
    many = " or ".join(map(str, sorted(facts)))
    spread = "bands: 95 % intervals" if certain else "no intervals: of one group of facts there are none"
    caption = [f"Change in the {metric_label(metric)}\u00a0· {counted(many)}\u00a0· {spread}"]
    if table.window > 1:
        caption.append(explained(table.window))
    return _png(sheet, caption)


def _largest(values: Any, *, signed: bool = False) -> float:
    known = values[~np.isnan(values)]
    top = float((known if signed else np.abs(known)).max(initial=0.0))
    return top if top > 0 else 1.0


def _png(sheet: Figure, caption: Sequence[str]) -> bytes:
    text = sheet.supxlabel("\n".join(caption), fontsize=8.5, color=SOFT, x=0.012, ha="left")
    text.set_linespacing(1.35)
    buffer = io.BytesIO()
    sheet.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
