"""Training curves as inline SVG: forget and retain cross-entropy on a logarithmic scale, and the retain weight below.

One drawing a method, all on the same scales, so that they can be compared by eye. A number that is missing, NaN or
not positive is a gap, never a zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from unlearn.report import words
from unlearn.report.drawing.scales import apart, log_range, path, step_ticks, thin
from unlearn.report.drawing.svg import drawing, el

LEFT, RIGHT, TOP, HIGH, STRIP, BETWEEN = 46.0, 60.0, 8.0, 150.0, 40.0, 18.0
_SIDES = {"forget_ce": "forget", "retain_ce": "retain"}
_LOWEST = 1e-4  # nats; a smaller cross-entropy is drawn on this line


@dataclass(frozen=True, kw_only=True)
class Scales:
    """What all drawings share: their width, first and last step, the range of log10 cross-entropy, the largest weight."""

    width: float
    first: int
    last: int
    bottom: float
    top: float
    weight: float

    @property
    def right(self) -> float:
        """Where the plot ends."""
        return self.width - RIGHT

    def x(self, step: float) -> float:
        """Where a step is."""
        return LEFT + (self.right - LEFT) * (step - self.first) / max(self.last - self.first, 1)

    def y(self, value: float) -> float:
        """Where a cross-entropy is."""
        share = (math.log10(max(value, _LOWEST)) - self.bottom) / (self.top - self.bottom)
        return TOP + HIGH * (1 - min(max(share, 0.0), 1.0))

    def strip(self, weight: float) -> float:
        """Where a retain weight is, in the strip below."""
        return TOP + HIGH + BETWEEN + STRIP * (1 - weight / self.weight)


def training_lines(log: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """The lines of a metric log that hold a cross-entropy, as plain numbers; what is no number becomes NaN."""
    lines = []
    for line in log:
        if any(name in line for name in _SIDES):
            kept = {name: _number(line.get(name)) for name in ("step", *_SIDES, "alpha")}
            if math.isfinite(kept["step"]):
                lines.append(kept)
    return sorted(lines, key=lambda line: line["step"])


def shared_scales(logs: Sequence[Sequence[Mapping[str, float]]], *, width: float = 400.0) -> Scales | None:
    """Scales that hold every log; None if no log has a positive cross-entropy."""
    lines = [line for log in logs for line in log]
    values = [max(line[name], _LOWEST) for line in lines for name in _SIDES if _positive(line[name])]
    if not values:
        return None
    weights = [line["alpha"] for line in lines if _positive(line["alpha"])]
    bottom, top = log_range(min(values), max(values))
    steps = [int(line["step"]) for line in lines]
    return Scales(
        width=width, first=min(steps), last=max(steps), bottom=bottom, top=top, weight=max(weights, default=1.0)
    )


def curves(label: str, log: Sequence[Mapping[str, float]], scales: Scales) -> Markup:
    """One method's drawing."""
    lines = thin([dict(line) for line in log])
    parts = _grid(scales)
    ends: list[tuple[str, float, float]] = []
    described = []
    for name, side in _SIDES.items():
        known = [line for line in lines if _positive(line[name])]
        if not known:
            described.append(f"{side} cross-entropy not measured")
            continue
        places = [(scales.x(line["step"]), scales.y(line[name])) if _positive(line[name]) else None for line in lines]
        parts.append(el("path", class_=f"line {side}", d=path(places)))
        if len(known) == 1:
            parts.append(el("circle", class_=side, cx=scales.x(known[0]["step"]), cy=scales.y(known[0][name]), r=2.5))
        ends.append((side, scales.y(known[-1][name]), known[-1][name]))
        described.append(f"{side} cross-entropy from {words.small(known[0][name])} to {words.small(known[-1][name])}")
    tops = apart([place for _, place, _ in ends], 26)
    lowest = max(tops, default=0.0)
    lift = max(0.0, lowest - (TOP + HIGH - 10))
    for (side, _, value), place in zip(ends, tops, strict=True):
        parts.append(el("text", side, class_=f"strong {side}", x=scales.right + 7, y=place - lift + 1))
        parts.append(el("text", words.small(value), class_=side, x=scales.right + 7, y=place - lift + 15))
    strip, text = _weight(lines, scales)
    height = TOP + HIGH + BETWEEN + STRIP + 24
    return drawing(scales.width, height, f"{label}: {'; '.join(described)}; {text}.", *parts, *strip)


def _grid(scales: Scales) -> list[Markup]:
    parts = []
    every = 1 if scales.top - scales.bottom <= 6 else 2
    for exponent in range(math.ceil(scales.bottom), math.floor(scales.top) + 1):
        y = scales.y(10.0**exponent)
        parts.append(el("line", class_="grid", x1=LEFT, x2=scales.right, y1=y, y2=y))
        if exponent % every == 0:
            name = f"{10.0**exponent:g}" if -4 <= exponent <= 4 else f"1e{exponent}"
            parts.append(el("text", name, class_="end", x=LEFT - 7, y=y + 4))
    bottom = TOP + HIGH + BETWEEN + STRIP
    for step in step_ticks(scales.first, scales.last):
        parts.append(el("text", str(step), class_="middle", x=scales.x(step), y=bottom + 16))
    parts.append(el("text", "step", class_="end", x=LEFT - 7, y=bottom + 16))
    return parts


def _weight(lines: Sequence[Mapping[str, float]], scales: Scales) -> tuple[list[Markup], str]:
    """The strip of the retain weight, and what it says in words."""
    base = scales.strip(0)
    parts = [el("line", class_="axis", x1=LEFT, x2=scales.right, y1=base, y2=base)]
    parts.append(el("text", "α", class_="end", x=LEFT - 7, y=base - STRIP / 2 + 4))
    known = [line for line in lines if math.isfinite(line["alpha"]) and line["alpha"] >= 0]
    if not any(line["alpha"] for line in known):
        parts.append(el("text", "no retain term", x=LEFT + 6, y=base - 8))
        return parts, "no retain term"
    places = [
        (scales.x(line["step"]), scales.strip(line["alpha"])) if math.isfinite(line["alpha"]) else None
        for line in lines
    ]
    parts.append(el("path", class_="line soft", d=path(places)))
    parts.append(
        el("text", words.small(known[-1]["alpha"]), x=scales.right + 7, y=scales.strip(known[-1]["alpha"]) + 4)
    )
    return parts, f"retain weight α from {words.small(known[0]['alpha'])} to {words.small(known[-1]['alpha'])}"


def _positive(value: float) -> bool:
    return math.isfinite(value) and value > 0


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
