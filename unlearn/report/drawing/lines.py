"""The unlearned model beside the retain model as two lines, over the steps of an attack or over layers.

What is not a number is a gap, never a zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from markupsafe import Markup

from unlearn.report import words
from unlearn.report.drawing.scales import apart, path, step_ticks, value_ticks
from unlearn.report.drawing.svg import drawing, el, number

LEFT, RIGHT, TOP, HIGH, WIDTH = 46.0, 98.0, 20.0, 150.0, 440.0
NAMES = {"forget": "unlearned", "retain": "retain model"}
"""The class that gives a line its color, and what it is called."""


def two_lines(
    at: Sequence[float],
    unlearned: Sequence[float],
    retain_model: Sequence[float],
    *,
    unit: str,
    description: str,
    top: float | None = None,
    band: tuple[Sequence[float], Sequence[float]] | None = None,
) -> Markup:
    """The drawing.

    Args:
        at: where each pair of numbers stands on the horizontal axis, whole numbers in rising order.
        unlearned, retain_model: as many numbers.
        unit: what the horizontal axis counts.
        description: what is drawn; how both lines go is added.
        top: the end of the vertical axis; None takes what the numbers need.
        band: ends of the interval of the difference, shaded above and below the retain model's line.
    """
    values = [value for value in (*unlearned, *retain_model, 0.0) if math.isfinite(value)]
    high, low = max(values) if top is None else top, min(values)
    high = high if high > low else low + 1.0
    right = WIDTH - RIGHT

    def x(place: float) -> float:
        return LEFT + (right - LEFT) * (place - at[0]) / max(at[-1] - at[0], 1)

    def y(value: float) -> float:
        return TOP + HIGH * (1 - min(max((value - low) / (high - low), 0.0), 1.0))

    parts = []
    for tick in value_ticks(low, high):
        parts.append(el("line", class_="grid", x1=LEFT, x2=right, y1=y(tick), y2=y(tick)))
        parts.append(el("text", f"{tick:g}".replace("-", "\u2212"), class_="end", x=LEFT - 7, y=y(tick) + 4))
    for step in step_ticks(int(at[0]), int(at[-1]), most=6):
        parts.append(el("text", str(step), class_="middle", x=x(step), y=TOP + HIGH + 18))
    parts.append(el("text", unit, class_="middle", x=(LEFT + right) / 2, y=TOP + HIGH + 34))
    if band is not None:
        parts += _band(at, retain_model, band, x, y)
    ends, told = [], []
    for name, line in (("forget", unlearned), ("retain", retain_model)):
        places = [(x(place), y(value)) if math.isfinite(value) else None for place, value in zip(at, line, strict=True)]
        parts.append(el("path", class_=f"line {name}", d=path(places)))
        for place, value, point in zip(at, line, places, strict=True):
            if point is not None:
                title = el("title", f"{NAMES[name]}, {unit} {place:g}: {words.small(value)}")
                parts.append(el("circle", title, class_=name, cx=point[0], cy=point[1], r=2.8))
        known = [value for value in line if math.isfinite(value)]
        if known:
            ends.append((name, y(known[-1]), known[-1]))
            told.append(f"{NAMES[name]} from {words.small(known[0])} to {words.small(known[-1])}")
    tops = apart([place for _, place, _ in ends], 28)
    lift = max(0.0, max(tops, default=0.0) - (TOP + HIGH - 12))
    for (name, _, value), place in zip(ends, tops, strict=True):
        parts.append(el("text", NAMES[name], class_=f"strong {name}", x=right + 8, y=place - lift + 1))
        parts.append(el("text", words.small(value), class_=name, x=right + 8, y=place - lift + 15))
    return drawing(WIDTH, TOP + HIGH + 40, f"{description}: {'; '.join(told)}.", *parts)


def _band(
    at: Sequence[float],
    line: Sequence[float],
    band: tuple[Sequence[float], Sequence[float]],
    x: Callable[[float], float],
    y: Callable[[float], float],
) -> list[Markup]:
    """The interval of the difference around the retain model's line; nothing where an end is missing."""
    known = [
        (place, value + low, value + high)
        for place, value, low, high in zip(at, line, *band, strict=True)
        if math.isfinite(value + low + high)
    ]
    if len(known) < 2:
        return []
    around = [(x(place), y(high)) for place, _, high in known] + [
        (x(place), y(low)) for place, low, _ in reversed(known)
    ]
    return [
        el("polygon", class_="band", points=" ".join(f"{number(round(a, 2))},{number(round(b, 2))}" for a, b in around))
    ]
