"""The curves as a PNG: one panel for what the attacker had, two lines, the band of the difference. No pyplot state."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from unlearn.attacks.curves import Comparison

_UNLEARNED, _RETAIN, _INK = "#d1495b", "#26467f", "#1f2933"


def curves_picture(comparisons: Sequence[Comparison], unit: str) -> bytes:
    """Mean scores by level, those of the two models; shaded above the retain model, the interval of the difference."""
    figure = Figure(figsize=(3.1 * len(comparisons) + 0.5, 3.2), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    panels: Any = figure.subplots(1, len(comparisons), sharey=True, squeeze=False)[0]
    for axes, comparison in zip(panels, comparisons, strict=True):
        retain = comparison.mean(comparison.retain_model)
        _, low, high = comparison.difference()
        axes.fill_between(comparison.levels, retain + low, retain + high, color=_UNLEARNED, alpha=0.18, lw=0)
        axes.plot(
            comparison.levels, comparison.mean(comparison.unlearned), "o-", color=_UNLEARNED, ms=4, label="unlearned"
        )
        axes.plot(comparison.levels, retain, "s-", color=_RETAIN, ms=4, label="retain model")
        axes.set_title(f"{comparison.name.replace('_', ' ')}: {comparison.verdict}", fontsize=9, color=_INK)
        axes.set_xlabel(unit, fontsize=8)
        axes.tick_params(labelsize=8)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    panels[0].set_ylim(-0.02, 1.02)
    panels[0].set_ylabel("of the forgotten, said right", fontsize=8)
    panels[0].legend(fontsize=8, frameon=False, loc="upper left")
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()
