"""The curves as a PNG: a panel for each way of attacking, two lines, the band of the difference. No pyplot state."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from unlearn.attacks.comparison.curves import Comparison
from unlearn.attacks.comparison.worst import Worst

_UNLEARNED, _RETAIN, _INK = "#d1495b", "#26467f", "#1f2933"


def curves_picture(comparisons: Sequence[Comparison], unit: str, worst: Worst | None = None) -> bytes:
    """Mean scores by level, those of the two models; shaded above the retain model, the interval of the difference.

    A column for what the attacker had, a row for each way of attacking with it; at the worst level of all, its gap.
    """
    names = list(dict.fromkeys(each.name for each in comparisons))
    ways = list(dict.fromkeys(each.variant for each in comparisons))
    size = (3.1 * len(names) + 0.5, 2.7 * len(ways) + 0.5)
    figure = Figure(figsize=size, dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    panels: Any = figure.subplots(len(ways), len(names), sharex=True, sharey=True, squeeze=False)
    empty = {(row, column) for row in range(len(ways)) for column in range(len(names))}
    for place, comparison in enumerate(comparisons):
        row, column = ways.index(comparison.variant), names.index(comparison.name)
        empty.discard((row, column))
        axes = panels[row][column]
        _curves(axes, comparison)
        if worst is not None and worst.place == place:
            _mark(axes, comparison, worst)
        if row == len(ways) - 1:
            axes.set_xlabel(unit, fontsize=8)
    for row, column in empty:
        panels[row][column].set_axis_off()
    for row, way in enumerate(ways):
        panels[row][0].set_ylabel((f"{way}\n" if way else "") + "of the forgotten, said right", fontsize=8)
    panels[0][0].set_ylim(-0.02, 1.02)
    panels[0][0].legend(fontsize=8, frameon=False, loc="best")
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _curves(axes: Any, comparison: Comparison) -> None:
    retain = comparison.mean(comparison.retain_model)
    _, low, high = comparison.difference()
    levels = comparison.levels
    axes.fill_between(levels, retain + low, retain + high, color=_UNLEARNED, alpha=0.18, lw=0)
    axes.plot(levels, comparison.mean(comparison.unlearned), "o-", color=_UNLEARNED, ms=4, label="unlearned")
    axes.plot(levels, retain, "s-", color=_RETAIN, ms=4, label="retain model")
    axes.set_title(f"{comparison.name.replace('_', ' ')}: {comparison.verdict}", fontsize=9, color=_INK)
    axes.tick_params(labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _mark(axes: Any, comparison: Comparison, worst: Worst) -> None:
    level = comparison.levels.index(worst.steps)
    ends = [float(comparison.mean(values)[level]) for values in (comparison.retain_model, comparison.unlearned)]
    axes.plot([worst.steps] * 2, ends, color=_INK, lw=1.2, zorder=1)
    axes.annotate(
        f"worst: {worst.gap:+.3f}",
        (worst.steps, sum(ends) / 2),
        xytext=(-5, 0),
        textcoords="offset points",
        ha="right",
        va="center",
        fontsize=8,
        color=_INK,
    )
