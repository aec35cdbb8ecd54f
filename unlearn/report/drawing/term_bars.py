"""The twelve terms of a model as small bars, for a cell of a table."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from unlearn.evaluation.lume import TERMS
from unlearn.report import words
from unlearn.report.drawing.svg import drawing, el


def term_bars(terms: Sequence[float]) -> Markup:
    """The twelve terms as bars, forget and retain side by side; a term that does not apply is a short dotted line."""
    bar, gap, group, high = 8.0, 2.0, 7.0, 26.0
    parts = []
    width = 12 * bar + 11 * gap + group
    for index, term in enumerate(terms):
        side = TERMS[index].split(" ")[0]
        x = index * (bar + gap) + (group if side == "retain" else 0.0)
        title = el("title", f"{words.term_name(index)}: {words.score(term)}")
        if math.isnan(term):
            parts.append(el("line", title, class_="absent", x1=x, x2=x + bar, y1=high - 1, y2=high - 1))
            continue
        tall = max(high * term, 1.0)
        parts.append(el("rect", class_="ground", x=x, y=0, width=bar, height=high))
        parts.append(el("rect", title, class_=side, x=x, y=high - tall, width=bar, height=tall))
    described = "; ".join(f"{words.term_name(index)} {words.score(term)}" for index, term in enumerate(terms))
    return drawing(width, high, f"The twelve terms: {described}", *parts, class_="bars")
