"""Effects at one token role as a line over layers; windows that an end of the model cuts short are marked and set right."""

from __future__ import annotations

from typing import Any

import numpy as np

from tracing.effects.table import EffectTable
from tracing.question.sweep import cut_windows


def line(axis: Any, table: EffectTable, row: int, color: str, label: str | None = None) -> None:
    """The means of a row with their interval. Where a window is cut the marker is hollow, and a quiet dashed line shows the mean
    per layer restored, times the layers of a whole window: what that would bring, were all its layers like those there."""
    layers = np.arange(table.mean.shape[1])
    cut = np.isin(layers, cut_windows(table.window, len(layers), table.kind))
    axis.plot(layers, table.mean[row], color=color, linewidth=1.8, label=label, zorder=2)
    axis.fill_between(layers, table.low[row], table.high[row], color=color, alpha=0.15, linewidth=0)
    for which, inside in ((~cut, color), (cut, "white")):
        axis.plot(
            layers[which], table.mean[row, which], "o", color=color, markersize=3.5, markerfacecolor=inside, zorder=3
        )
    if cut.any():
        axis.plot(layers, table.per_layer[row] * table.window, "--", color=color, linewidth=0.9, alpha=0.7, zorder=1)


def explained(window: int) -> str:
    """What hollow markers and dashes mean."""
    return f"hollow: fewer than {window} layers restored · dashed: per layer restored, times {window}"
