"""The table and the curves of benchmarks/sae_claims.py. Numbers come from its result files and the runs' metric logs."""

from __future__ import annotations

import io
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from sae.trainer import TrainerConfig

COLUMNS = {
    "rate": ("rate", "g"),
    "dead_training": ("dead in training", "%"),
    "dead_exported": ("dead", "%"),
    "under_used": ("under-used", "%"),
    "nmse": ("NMSE", ".4f"),
    "l0": ("L0", ".2f"),
    "fvu_exported": ("FVU exported", ".4f"),
    "l0_exported": ("L0 exported", ".2f"),
    "mcc": ("MCC", ".3f"),
    "f1": ("F1", ".3f"),
    "ce_recovered": ("CE recovered", ".4f"),
    "aux_at_work": ("auxiliary at work", "%"),
}
"""Figure -> heading and format."""
_COLORS = ("#d1495b", "#26467f", "#2a9d8f", "#e09f3e", "#6b7785")
_SOFT = "#6b7785"


def table(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Markdown: mean (smallest to largest) over the seeds; only columns that there are figures for."""
    columns = [name for name in COLUMNS if any(name in run for runs in found.values() for run in runs.values())]
    head = ["autoencoder", "seeds", *(COLUMNS[name][0] for name in columns)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for method, runs in found.items():
        cells = [spread([run[name] for run in runs.values()], COLUMNS[name][1]) for name in columns]
        lines.append("| " + " | ".join([method, str(len(runs)), *cells]) + " |")
    return "\n".join(lines)


def by_rate(tried: Mapping[str, Mapping[float, Mapping[str, Mapping[str, float]]]]) -> str:
    """Markdown: the held-out error of each autoencoder at each rate, of the first seed."""
    rates = sorted({rate for runs in tried.values() for rate in runs})
    lines = [
        "| held-out NMSE at rate | " + " | ".join(f"{rate:g}" for rate in rates) + " |",
        "|---" * (len(rates) + 1) + "|",
    ]
    for method, runs in tried.items():
        cells = [spread([run["nmse"] for run in runs[rate].values()], ".4f") if rate in runs else "" for rate in rates]
        lines.append("| " + " | ".join([method, *cells]) + " |")
    return "\n".join(lines)


def spread(values: Sequence[float], form: str) -> str:
    """`mean (smallest to largest)`, or the one value."""
    mean, low, high = (_shown(value, form) for value in (statistics.fmean(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"


def curves(runs: Mapping[str, Sequence[Path]], trainer: TrainerConfig) -> bytes:
    """PNG: training error, dead share and held-out FVU over tokens; mean over an autoencoder's runs, shaded from smallest to
    largest."""
    panels = {
        "nmse": "training NMSE",
        "dead": "dead share in training",
        "held_out/fvu_exported": "held-out FVU, thresholds",
    }
    folders = {run for its in runs.values() for run in its}
    lines = {run: [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in folders}
    figure = Figure(figsize=(12, 3.6), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    for axes, (key, title) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for (name, its), color in zip(runs.items(), _COLORS, strict=False):
            series: dict[int, list[float]] = {}
            for run in its:
                for line in lines[run]:
                    if f"{name}/{key}" in line:
                        series.setdefault(line["step"], []).append(line[f"{name}/{key}"])
            _line(axes, series, trainer.batch_tokens, name.replace("_", " "), color)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("tokens (millions)", color=_SOFT)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if key == "dead":
            axes.set_ylim(bottom=0)
        else:
            axes.set_yscale("log")
    figure.axes[0].legend(frameon=False, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def _line(axes: Axes, series: Mapping[int, Sequence[float]], batch: int, label: str, color: str) -> None:
    steps = sorted(series)
    if not steps:
        return
    tokens = [step * batch / 1e6 for step in steps]
    mark = "o" if len(steps) < 20 else None
    axes.plot(tokens, [statistics.fmean(series[step]) for step in steps], color=color, label=label, lw=1.6, marker=mark)
    low, high = ([pick(series[step]) for step in steps] for pick in (min, max))
    axes.fill_between(tokens, low, high, color=color, alpha=0.15, lw=0)


def _shown(value: float, form: str) -> str:
    return f"{100 * value:.2f}%" if form == "%" else f"{value:{form}}"
