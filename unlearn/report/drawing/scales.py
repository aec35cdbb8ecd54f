"""Where things go in a chart: axis ticks, a logarithmic scale, and lines that stop at gaps. Pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from matplotlib.ticker import MaxNLocator

from unlearn.report.drawing.svg import number

Point = tuple[float, float]


def layer_ticks(layers: int, most: int = 12) -> list[int]:
    """The layers to label: all of them, or every second, fourth, ..."""
    step = next((step for step in (1, 2, 4, 5, 8, 10, 16, 20, 50) if layers / step <= most), 100)
    return list(range(0, layers, step))


def step_ticks(first: int, last: int, most: int = 5) -> list[int]:
    """Round whole numbers from `first` to `last`, about `most` of them."""
    ticks = MaxNLocator(nbins=most, integer=True, steps=[1, 2, 5, 10]).tick_values(first, max(last, first))
    return [int(tick) for tick in ticks if first <= tick <= last]


def value_ticks(low: float, high: float, most: int = 4) -> list[float]:
    """Round numbers from `low` to `high`, about `most` of them."""
    ticks = MaxNLocator(nbins=most, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    return [float(tick) for tick in ticks if low - 1e-9 <= tick <= high + 1e-9]


def log_range(low: float, high: float) -> tuple[float, float]:
    """log10 of the ends of an axis that holds two positive numbers and at least two powers of ten."""
    bottom, top = math.log10(low) - 0.08, math.log10(high) + 0.08
    if math.floor(top) - math.ceil(bottom) < 1:
        bottom, top = math.floor(bottom), math.ceil(top)
    return bottom, top


def path(points: Sequence[Point | None]) -> str:
    """An SVG path through the points, broken where one is None."""
    out, pen = [], False
    for point in points:
        if point is not None:
            out.append(f"{'L' if pen else 'M'}{number(round(point[0], 2))} {number(round(point[1], 2))}")
        pen = point is not None
    return "".join(out)


def apart(places: Sequence[float], gap: float) -> list[float]:
    """Places of labels, moved down where needed so that they are at least `gap` apart, in the given order."""
    order = sorted(range(len(places)), key=lambda index: (places[index], index))
    out = list(places)
    for before, after in pairwise(order):
        out[after] = max(out[after], out[before] + gap)
    return out


def thin(items: Sequence[dict[str, float]], most: int = 600) -> list[dict[str, float]]:
    """Every n-th item and the last, so that no more than about `most` are drawn."""
    stride = max(1, math.ceil(len(items) / most))
    kept = list(items[::stride])
    return kept if not items or kept[-1] is items[-1] else [*kept, items[-1]]
