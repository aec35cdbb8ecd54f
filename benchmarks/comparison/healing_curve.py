"""How far unlearned models were healed after so many tokens: the divergence from the untouched model, run by run.

    python -m benchmarks.comparison.healing_curve --runs runs/compare_real --out runs/healing.png

Reads the metric logs of runs that were perturbed (benchmarks/compare_methods.py, or `palimpsest unlearn` by hand). The
divergence is the retain term of each step's rows before that step, nats a token, of retain rows and general text
together; it is averaged over a tenth of the run. Steps are of like size, so tokens are those of the whole run times the
share of its steps.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean

from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from lm.config import script
from lm.errors import UserError
from lm.run_folder import write_atomic

PARTS = 10


@dataclass(frozen=True, kw_only=True)
class HealingCurve:
    """Which runs, and where the picture goes."""

    runs: str = "runs/compare"
    """A folder of run folders, at any depth."""
    out: str = "runs/healing.png"
    """The picture."""

    def __post_init__(self) -> None:
        if Path(self.out).suffix != ".png":
            raise UserError(f"out is {self.out}: give a file that ends in .png")


@dataclass(frozen=True)
class Healing:
    """One run.

    Attributes:
        name: its folder.
        tokens: (parts,) put through the model by the middle of each part.
        divergence: (parts,) mean nats a token in that part.
        total: of the whole run.
    """

    name: str
    tokens: tuple[float, ...]
    divergence: tuple[float, ...]
    total: float


def main(asked: HealingCurve) -> None:
    root = Path(asked.runs)
    found = [read(path.parent, root) for path in sorted(root.rglob("metrics.jsonl")) if _perturbed(path.parent)]
    if not found:
        raise UserError(f"{root} holds no finished run with a perturbation: give the folder of some")
    write_atomic(Path(asked.out), picture(found))
    print(table(found))


def read(folder: Path, root: Path) -> Healing:
    """The curve of a run folder."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").split("\n") if line]
    losses = [line["retain_loss"] for line in lines if "retain_loss" in line]
    total = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["tokens"]
    return parts(str(folder.relative_to(root)), losses, total)


def parts(name: str, losses: Sequence[float], tokens: float, count: int = PARTS) -> Healing:
    """Of each of `count` parts of a run the mean; fewer where there are fewer steps.

    Args:
        losses: (steps,) the divergence at each step, nats a token.
        tokens: of the whole run.
    """
    count = min(count, len(losses))
    cuts = [round(part * len(losses) / count) for part in range(count + 1)]
    spans = list(pairwise(cuts))
    per_step = tokens / len(losses)
    return Healing(
        name=name,
        tokens=tuple((first + last) / 2 * per_step for first, last in spans),
        divergence=tuple(fmean(losses[first:last]) for first, last in spans),
        total=tokens,
    )


def table(found: Sequence[Healing]) -> str:
    """Markdown, a row a run."""
    heads = [f"{100 * (2 * part + 1) // (2 * PARTS)} %" for part in range(PARTS)]
    lines = [f"| run | tokens | {' | '.join(heads)} |", "|" + "---|" * (PARTS + 2)]
    for run in found:
        cells = [f"{value:.3f}" for value in run.divergence] + [""] * (PARTS - len(run.divergence))
        lines.append(f"| {run.name} | {run.total:,.0f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(found: Sequence[Healing]) -> bytes:
    """PNG: divergence against tokens, both on logarithmic axes; runs that differ in the last folder alone have one color."""
    figure = Figure(figsize=(8.4, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    methods = list(dict.fromkeys(str(Path(run.name).parent) for run in found))
    labeled: set[str] = set()
    for run in found:
        method = str(Path(run.name).parent)
        color = colormaps["tab20" if len(methods) > 10 else "tab10"](methods.index(method) % 20)
        label = "_" if method in labeled else method
        axes.plot(run.tokens, run.divergence, marker="o", markersize=3, lw=1.2, color=color, label=label)
        labeled.add(method)
    axes.set(xscale="log", yscale="log", xlabel="tokens of healing", ylabel="KL(untouched || model), nats a token")
    axes.xaxis.set_minor_formatter(NullFormatter())  # else they lie upon each other
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150)
    return file.getvalue()


def _perturbed(folder: Path) -> bool:
    """Whether a finished run in `folder` perturbed its model."""
    file = folder / "manifest.json"
    if not file.is_file():
        return False
    manifest: Mapping[str, object] = json.loads(file.read_text(encoding="utf-8"))
    return bool(manifest.get("perturbed")) and bool(manifest.get("tokens"))


if __name__ == "__main__":
    script(main, HealingCurve, description=__doc__)
