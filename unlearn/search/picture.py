"""Forgetting against utility, as a PNG: every trial, the front, the budget, and where each method's repeats lie.

Drawn on a figure of its own (Agg, no pyplot state). Numbers are in `unlearn.search.result`.
"""

from __future__ import annotations

import io
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from unlearn.search import choice
from unlearn.search.result import MethodResult, SearchResult
from unlearn.search.scored import Scored

_COLORS = (
    "#d1495b",
    "#26467f",
    "#2a9d8f",
    "#e09f3e",
    "#7b5ea7",
    "#8c564b",
    "#1f8fc1",
    "#c2679f",
    "#7a8b2e",
    "#4d5a68",
)
_MARKS = ("o", "s", "^", "v", "P")
"""A method has a color; after ten of them the mark changes too."""
_INK, _SOFT, _PALE = "#1f2933", "#6b7785", "#c5ccd4"


def pareto(result: SearchResult) -> bytes:
    """The picture. Small marks are trials (paler outside the budget), the best ringed; large ones the mean of the repeats,
    with bars from the smallest to the largest. The gray steps are the front of all trials."""
    figure = Figure(figsize=(7.2, 4.4), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots()
    scored = [trial.scored for method in result.methods for trial in method.trials if trial.scored is not None]
    _front(axes, scored)
    axes.axvline(result.lowest, color=_SOFT, lw=1, ls="--")
    axes.annotate(
        f"budget: {result.config.budget:.0%} of the base's utility",
        (result.lowest, 0.02),
        xycoords=("data", "axes fraction"),
        xytext=(-5, 0),
        textcoords="offset points",
        rotation=90,
        ha="right",
        va="bottom",
        fontsize=8,
        color=_SOFT,
    )
    for place, method in enumerate(result.methods):
        mark = _MARKS[place // len(_COLORS) % len(_MARKS)]
        _method(axes, method, result.lowest, _COLORS[place % len(_COLORS)], mark)
    axes.plot(result.base.utility, result.base.quality, "X", color=_INK, ms=9, label="base model", ls="none")
    if result.retain_model is not None:
        axes.plot(
            result.retain_model.utility,
            result.retain_model.quality,
            "*",
            color=_INK,
            ms=13,
            label="retain model",
            ls="none",
        )
    names = {"utility": "utility: accuracy on the questions", "retain_terms": "utility: mean of the retain terms"}
    axes.set_xlabel(names[result.config.keeping], color=_INK)
    sought = {"forget_terms": "mean of the forget terms", "task_aggregate": "task aggregate"}
    axes.set_ylabel(f"quality: {sought[result.config.quality]}", color=_INK)
    failed = sum(trial.failed is not None for method in result.methods for trial in method.trials)
    axes.set_title(
        f"{result.config.trials} trials a method (small), the best ringed{f'; {failed} failed' if failed else ''}\n"
        "its settings over the seeds: mean (large), smallest and largest",
        loc="left",
        fontsize=8.5,
        color=_SOFT,
    )
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(0.06)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8.5)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _front(axes: Any, scored: list[Scored]) -> None:
    """Steps: what utility can be had at a quality at least so high."""
    points = [(run.utility, run.quality) for run in scored]
    kept = [points[place] for place in choice.front(points)]
    if kept:
        xs, ys = zip(*kept, strict=True)
        axes.step(xs, ys, where="pre", color=_PALE, lw=2, zorder=1, label="front of all trials")


def _method(axes: Any, method: MethodResult, lowest: float, color: str, mark: str) -> None:
    done = [trial.scored for trial in method.trials if trial.scored is not None]
    for inside in (True, False):
        some = [run for run in done if (run.utility >= lowest) is inside]
        axes.scatter(
            [run.utility for run in some],
            [run.quality for run in some],
            s=26,
            marker=mark,
            color=color,
            alpha=0.9 if inside else 0.35,
            linewidths=0,
            zorder=3,
        )
    chosen = None if method.best is None else method.trials[method.best].scored
    if chosen is not None:
        axes.scatter(
            [chosen.utility],
            [chosen.quality],
            s=95,
            marker=mark,
            facecolors="none",
            edgecolors=color,
            lw=1.2,
            zorder=3,
        )
    name = method.name.replace("_", " ")
    if not method.scored_repeats:
        axes.scatter([], [], s=26, marker=mark, color=color, label=f"{name} (no row)")
        return
    x, y = method.estimate("utility"), method.estimate("quality")
    axes.errorbar(
        x.mean,
        y.mean,
        xerr=[[x.mean - x.low], [x.high - x.mean]],
        yerr=[[y.mean - y.low], [y.high - y.mean]],
        fmt=mark,
        ms=9,
        color=color,
        mec="white",
        elinewidth=1,
        capsize=2,
        label=name,
        zorder=4,
    )
