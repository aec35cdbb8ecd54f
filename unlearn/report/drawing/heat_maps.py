"""Drawings as inline SVG: heat maps of effects, layer scores, and the twelve terms as small bars.

Colors come from the page's style sheet (`var(--forget)` ...), so the same drawing serves light, dark and paper. Every
cell and bar has a `<title>` with its numbers; every drawing has a one-sentence description.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from tracing.effects.table import EffectTable
from tracing.question.sweep import cut_windows
from unlearn.report import words
from unlearn.report.drawing.scales import layer_ticks
from unlearn.report.drawing.svg import drawing, el

WIDTH, LEFT, RIGHT, ROW = 440.0, 132.0, 8.0, 22.0
_PLOT = WIDTH - LEFT - RIGHT


def shown_roles(table: EffectTable) -> list[int]:
    """Rows with at least one fact."""
    return [row for row in range(len(table.roles)) if table.facts[row] and not np.isnan(table.mean[row]).all()]


def largest(tables: Sequence[EffectTable]) -> float:
    """The largest absolute mean effect of the tables; 1 if there is none."""
    top = max((float(np.nanmax(np.abs(table.mean), initial=0.0)) for table in tables), default=0.0)
    return top if top > 0 else 1.0


def heat_map(
    table: EffectTable,
    *,
    top: float,
    band: Sequence[int],
    outlined: bool,
    tentative: bool,
    what: str = "mean indirect effect",
) -> Markup:
    """One table: rows are token roles, columns layers; the strength of a cell is its share of `top`.

    The band is marked on the layer axis, and outlined across the rows if `outlined`; dashed if `tentative`. `what` the numbers
    are is said in the description.
    """
    rows, layers = shown_roles(table), table.mean.shape[1]
    wide = _PLOT / layers
    height = ROW * len(rows)
    parts = [el("rect", class_="ground", x=LEFT, y=2, width=_PLOT, height=height)]
    for index, row in enumerate(rows):
        y = 2 + index * ROW
        name = words.ROLES.get(table.roles[row], table.roles[row])
        parts.append(el("text", name, class_="end", x=LEFT - 8, y=y + 15))
        for layer in range(layers):
            value = float(table.mean[row, layer])
            if math.isnan(value):
                continue
            share = min(abs(value) / top, 1.0)
            parts.append(
                el(
                    "rect",
                    el("title", _cell_title(table, row, layer, name)),
                    class_="minus" if value < 0 else "plus",
                    x=LEFT + layer * wide,
                    y=y,
                    width=max(wide - 0.8, wide * 0.8),
                    height=ROW - 0.8,
                    fill_opacity=round(share, 3),
                )
            )
    parts += _layer_axis(layers, 2 + height, () if outlined else band)
    if outlined:
        parts += _outline(band, layers, 2, height, tentative)
    described = f"{words.KINDS[table.kind]}: {what} by token role and layer; {_peak(table, rows)}"
    return drawing(WIDTH, height + 40, described, *parts)


def layer_scores(evidence: Mapping[str, Any], band: Sequence[int], *, rows: int, tentative: bool) -> Markup | None:
    """The score of each layer with its interval, from a plan's evidence, as tall as `rows` rows of a heat map; None if
    the evidence holds no scores."""
    means = [float(value) for value in evidence.get("layer_scores", ())]
    if not means or not any(math.isfinite(value) for value in means):
        return None
    lows = [float(value) for value in evidence.get("layer_low", means)]
    highs = [float(value) for value in evidence.get("layer_high", means)]
    finite = [value for value in (*means, *lows, *highs, 0.0) if math.isfinite(value)]
    low, high = min(finite), max(finite)
    height, wide = rows * ROW, _PLOT / len(means)
    scale = (height - 12) / ((high - low) or 1.0)

    def y(value: float) -> float:
        return 8 + (high - value) * scale

    parts = []
    for layer, (mean, under, over) in enumerate(zip(means, lows, highs, strict=True)):
        if not math.isfinite(mean):
            continue
        x = LEFT + layer * wide
        spread = f" (interval {words.small(under)} to {words.small(over)})"
        bar = el(
            "rect",
            el("title", f"layer {layer}: {words.small(mean)}{spread}"),
            class_="plus" if layer in band else "plus faint",
            x=x + wide * 0.18,
            y=min(y(mean), y(0)),
            width=wide * 0.64,
            height=max(abs(y(mean) - y(0)), 0.5),
        )
        parts.append(bar)
        if math.isfinite(under) and math.isfinite(over):
            middle = x + wide / 2
            parts.append(el("line", class_="whisker", x1=middle, x2=middle, y1=y(over), y2=y(under)))
    parts.append(el("line", class_="axis", x1=LEFT, x2=LEFT + _PLOT, y1=y(0), y2=y(0)))
    for value in (0.0, max(means, key=lambda mean: -math.inf if math.isnan(mean) else mean)):
        parts.append(el("text", words.small(value), class_="end", x=LEFT - 8, y=y(value) + 4))
    parts += _layer_axis(len(means), 2 + height, ())
    parts += _outline(band, len(means), 2, height, tentative)
    return drawing(WIDTH, height + 40, "Score of each layer with its interval; the chosen layers are outlined.", *parts)


def color_key(top: float, low: float) -> Markup:
    """What the strength of a cell means, from 0 to `top`, and down to `low` where that is clearly below 0."""
    steps, wide, high = 12, 11.0, 9.0
    below = math.ceil(steps * -low / top - 1e-9) if low < -0.02 * top else 0
    shares = [("minus", share) for share in range(below, 0, -1)] + [("plus", share) for share in range(steps + 1)]
    total, zero = wide * len(shares), wide * (below + 0.5)
    parts = [el("rect", class_="ground", x=0, y=0, width=total, height=high)]
    for index, (side, share) in enumerate(shares):
        opacity = round(share / steps, 3)
        parts.append(el("rect", class_=side, x=index * wide, y=0, width=wide, height=high, fill_opacity=opacity))
    bottom = words.small(-top * below / steps)
    labels = [(0.0, "start", bottom), (total, "end", words.small(top))]
    if below:
        parts.append(el("line", class_="axis", x1=zero, x2=zero, y1=0, y2=high + 2))
    if below > 4:
        labels.append((zero, "middle", "0"))
    parts += [el("text", text, class_=anchor, x=x, y=high + 12) for x, anchor, text in labels]
    described = f"Color scale from {bottom} to {words.small(top)}"
    return drawing(total, high + 15, described, *parts, class_="key", fixed=True)


def _layer_axis(layers: int, y: float, band: Sequence[int]) -> list[Markup]:
    wide = _PLOT / layers
    parts = [
        el("text", str(layer), class_="middle", x=LEFT + (layer + 0.5) * wide, y=y + 18)
        for layer in layer_ticks(layers)
    ]
    for first, last in words.runs(band):
        x = LEFT + first * wide
        parts.append(el("rect", class_="mark", x=x, y=y + 2.5, width=(last - first + 1) * wide - 0.8, height=2.5))
    return [*parts, el("text", "layer", class_="end", x=LEFT - 8, y=y + 18)]


def _outline(band: Sequence[int], layers: int, y: float, height: float, tentative: bool) -> list[Markup]:
    wide = _PLOT / layers
    return [
        el(
            "rect",
            class_="outline tentative" if tentative else "outline",
            x=LEFT + first * wide - 0.6,
            y=y - 0.8,
            width=(last - first + 1) * wide + 0.4,
            height=height + 0.8,
        )
        for first, last in words.runs(band)
    ]


def beside(table: EffectTable, row: int, layer: int) -> list[str]:
    """What belongs to a number of a table: its interval, its share of the total effect, and whether its window is cut."""
    low, high, share = (float(values[row, layer]) for values in (table.low, table.high, table.share))
    said = []
    if not (math.isnan(low) or math.isnan(high)):
        said.append(f"{table.confidence:.0%} interval {words.small(low)} to {words.small(high)}")
    if not math.isnan(share):
        said.append(f"{words.percent(share)} of what the corruption took")
    if layer in cut_windows(table.window, table.mean.shape[1], table.kind):
        each = words.small(float(table.per_layer[row, layer]))
        said.append(f"only {table.layers_restored[layer]} of {table.window} layers restored, {each} each")
    return said


def _cell_title(table: EffectTable, row: int, layer: int, name: str) -> str:
    value = words.small(float(table.mean[row, layer]))
    return ", ".join([f"{name}, layer {layer}: {value}", *beside(table, row, layer), f"{int(table.facts[row])} facts"])


def _peak(table: EffectTable, rows: Sequence[int]) -> str:
    if not rows:
        return "no fact was traced."
    values = np.where(np.isnan(table.mean), -np.inf, np.abs(table.mean))
    row, layer = np.unravel_index(int(values.argmax()), values.shape)
    name = words.ROLES.get(table.roles[row], table.roles[row])
    return f"largest at {name}, layer {layer}: {words.small(float(table.mean[row, layer]))}."
