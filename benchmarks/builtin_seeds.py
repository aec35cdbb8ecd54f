"""The built-in model over several seeds: the joint method, its controls and the baseline, with the spread.

    python -m benchmarks.builtin_seeds --demo configs/demo.yaml --seeds '[1, 2, 3]' --out runs/seeds

The seed orders the batches; the plan is traced once. Prints, and writes as table.md: mean (smallest to largest) a model.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lm.config import parse_config, script
from lm.run_folder import write_atomic, write_json
from unlearn.demo.config import DemoConfig
from unlearn.demo.entries import entries
from unlearn.demo.stage import find_layers, score_entry

ROOT = Path(__file__).resolve().parents[1]

COLUMNS = ("task_aggregate", "mia_auc", "utility", "final", "seconds")


@dataclass(frozen=True, kw_only=True)
class Seeds:
    """What is repeated."""

    demo: str = str(ROOT / "configs" / "demo.yaml")
    """The demo's config: model, trace, trainer, objectives."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Seeds of the batch order."""
    out: str = "runs/seeds"
    """The folder for every run."""


def main(asked: Seeds) -> None:
    config = parse_config(DemoConfig, ["--config", asked.demo])
    out = Path(asked.out)
    find_layers(config, out / "trace")
    found: dict[str, list[Mapping[str, Any]]] = {}
    for entry in entries(config, out / "trace" / "plan.json"):
        for seed in asked.seeds if entry.path is None else asked.seeds[:1]:
            one = replace(config, trainer=replace(config.trainer, seed=seed))
            found.setdefault(entry.key, []).append(score_entry(one, entry, out / f"seed-{seed}"))
    write_json(out / "results.json", found)
    text = table(found)
    write_atomic(out / "table.md", text + "\n")
    print(text)


def table(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Markdown: mean (smallest to largest) over the seeds, and utility as a share of the base model's."""
    base = statistics.fmean(run["utility"] for run in found["base"])
    head = ["model", "seeds", "task aggregate", "MIA AUC", "utility", "utility / base", "final", "seconds"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for key, runs in found.items():
        cells = {name: spread([run[name] for run in runs], 0 if name == "seconds" else 3) for name in COLUMNS}
        share = spread([run["utility"] / base for run in runs], 3)
        values = [cells["task_aggregate"], cells["mia_auc"], cells["utility"], share, cells["final"], cells["seconds"]]
        lines.append("| " + " | ".join([key, str(len(runs)), *values]) + " |")
    return "\n".join(lines)


def spread(values: Sequence[float], digits: int) -> str:
    """`mean (smallest to largest)`, or the one value."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


if __name__ == "__main__":
    script(main, Seeds, description=__doc__)
