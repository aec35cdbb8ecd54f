"""Do depth and relearning agree? For each model both numbers, and fact by fact the rank correlation, with its interval.

    python -m benchmarks.depth_and_relearning --depth runs/demo-depth --attack runs/demo-attack --models '[joint_planned]'

Reads what `scripts/depth.py` and `scripts/attack.py` wrote into DEPTH/MODEL and ATTACK/MODEL. Deep unlearning should bring back
little, so the correlation should be negative.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lm.config import script
from lm.errors import UserError
from tracing.bootstrap import interval, resample_counts
from tracing.effects.agreement import spearman


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Which runs."""

    depth: str = "runs/demo-depth"
    """The folder with a run of scripts/depth.py for each model."""
    attack: str = "runs/demo-attack"
    """The folder with a run of scripts/attack.py for each model."""
    models: tuple[str, ...] = ("joint_planned", "gradient_difference")
    """Names of both runs' folders."""


def rank_correlation(one: Sequence[float], other: Sequence[float], groups: Sequence[str]) -> tuple[float, float, float]:
    """Spearman's, with the 95 % percentile bootstrap interval; facts of a group are drawn together.

    No interval (NaN) if a resample has no order, as where almost nothing came back.
    """
    x, y = np.array(one), np.array(other)
    draws = resample_counts(groups, 1000, 0).astype(int)
    found = np.array([spearman(np.repeat(x, times), np.repeat(y, times)) for times in draws])
    low, high = (np.nan, np.nan) if np.isnan(found).any() else interval(found, 0.95)
    return spearman(x, y), float(low), float(high)


def _shown(mean: float, low: float, high: float) -> str:
    return f"{mean:.2f} ({low:.2f} to {high:.2f})" if not np.isnan(low) else "-"


def lines(model: str, depth: dict[str, Any], attack: dict[str, Any]) -> list[str]:
    """A table row for each of the attack's trials."""
    deep = {fact["id"]: fact for fact in depth["facts"] if fact["depth"] is not None}
    found = []
    for trial in attack["trials"]:
        rows = [row for row in trial["rows"] if row["id"] in deep]
        if not rows:
            raise UserError(f"{model}: depth and {trial['name']} have no fact in common: measure both on the same rows")
        depths = [deep[row["id"]]["depth"] for row in rows]
        groups = [row["document"] for row in rows]
        retain = "retain_model" if "retain_model" in rows[0] else "never"  # as attack.json called it at first
        scores = [float(np.mean(row["unlearned"][1:]) - np.mean(row[retain][1:])) for row in rows]
        logs = [row["unlearned_log"][-1] - row[f"{retain}_log"][-1] for row in rows]
        ranks = [_shown(*rank_correlation(depths, each, groups)) for each in (scores, logs)]
        excess = "{mean:.3f} ({low:.3f} to {high:.3f})".format(**trial["excess"])
        deepness = "{depth:.2f} ({low:.2f} to {high:.2f})".format(**depth)
        found.append(
            f"| {model} | {deepness} | {trial['name']} | {excess} | {trial['verdict']} | {len(rows)} | {' | '.join(ranks)} |"
        )
    return found


def main(config: Compared) -> None:
    print(
        "| model | depth | given | relearned beyond the retain model | verdict | facts "
        "| depth ~ relearned | depth ~ log-probability |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for model in config.models:
        read = [
            Path(folder) / model / f"{what}.json"
            for folder, what in ((config.depth, "depth"), (config.attack, "attack"))
        ]
        for path in read:
            if not path.is_file():
                raise UserError(f"{path} is not there: run scripts/{path.stem}.py --out {path.parent} first")
        print("\n".join(lines(model, *(json.loads(path.read_text(encoding="utf-8")) for path in read))))


if __name__ == "__main__":
    script(main, Compared, description=__doc__)
