"""Unlearning by arithmetic on weights, on the model, rows and scores of benchmarks/real_methods.py: task vectors and TIES.

    python benchmarks/real_methods.py --real runs/real --out runs/real_methods
    python benchmarks/real_merging.py --real runs/real --methods runs/real_methods \
      --pairs '[[search/UNDIAL/trial-00, search/Joint/trial-01]]' --out runs/real_merging

Negation: the forget rows are learnt once more, the same layers for as many steps of as many rows as every other method has,
and what that changed is taken away, once or more. TIES: two runs of the search that are already there are joined. A merge
itself trains nothing. Every stage is one of this project's scripts, printed as the command it is; a finished one is not run
again.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from benchmarks.real_model import Stage, run  # noqa: E402
from lm.config import script  # noqa: E402
from lm.errors import UserError  # noqa: E402
from lm.run import write_atomic  # noqa: E402
from unlearn.search.scored import Measures  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class Merging:
    """What is merged."""

    real: str = "runs/real"
    """The folder of benchmarks/real_model.py, with `base` and `trace` done."""
    methods: str = "runs/real_methods"
    """The folder of benchmarks/real_methods.py: the rows that are learnt and scored, and the runs that are joined."""
    steps: int = 20
    """Optimiser steps of learning the forget rows, as many as the other methods had."""
    batch: int = 24
    """Rows a step."""
    rates: tuple[float, ...] = (3e-4, 1e-3)
    """Learning rates of learning."""
    weights: tuple[float, ...] = (-0.5, -1.0, -2.0)
    """What the task vector is multiplied by before it is added."""
    pairs: tuple[tuple[str, str], ...] = ()
    """Runs to join: two folders inside `methods`."""
    densities: tuple[float, ...] = (0.2, 0.8)
    """Shares of their changes that are kept."""
    autocast: str = "bf16"
    """Type that training computes in over float32 weights."""
    score_dtype: str = "bfloat16"
    """Type in which models are scored."""
    out: str = "runs/real_merging"
    """The folder, with a run folder a stage."""


def main(asked: Merging) -> None:
    out, names = Path(asked.out), []
    for stage in stages(asked):
        run(stage, out)
        if stage.script == "evaluate":
            names.append(stage.name)
    text = table(out, names)
    write_atomic(out / "table.md", text + "\n")
    print(text)


def stages(asked: Merging) -> list[Stage]:
    """Every stage, in an order in which each finds what it needs. UserError for a run to join that is not there."""
    base, out = str(Path(asked.real) / "base" / "model"), Path(asked.out)
    found: list[Stage] = []
    for rate in asked.rates:
        learnt = f"learn-{rate:g}"
        words = [
            "--model.path",
            base,
            "--model.dtype",
            "float32",
            *rows(asked, "forget", "retain"),
            "--objective",
            "Learn",
        ]
        words += ["--retain_loss", "NoRetain", "--scope.plan", str(Path(asked.real) / "trace" / "plan.json")]
        words += ["--trainer.steps", str(asked.steps), "--trainer.batch", str(asked.batch)]
        words += ["--trainer.learning_rate", str(rate), "--trainer.autocast", asked.autocast]
        found.append(Stage(learnt, "unlearn", tuple(words)))
        for weight in asked.weights:
            how = ["--method", "TaskArithmetic", "--method.weights", f"[{weight}]"]
            found += merge(asked, f"negation-{rate:g}-by{weight:g}", base, [str(out / learnt / "model")], how)
    for number, pair in enumerate(asked.pairs, 1):
        models = [str(Path(asked.methods) / name / "model") for name in pair]
        for model in models:
            if not Path(model).exists():
                raise UserError(f"{model} is missing: name runs of {asked.methods} that have a model")
        for density in asked.densities:
            found += merge(
                asked,
                f"ties-{number}-of{density:g}",
                base,
                models,
                ["--method", "Ties", "--method.density", str(density)],
            )
    return found


def merge(asked: Merging, name: str, base: str, models: list[str], how: list[str]) -> list[Stage]:
    """A merge and the scoring of its result."""
    words = ["--base", base, "--models", json.dumps(models), *how]
    scoring = ["--model.path", str(Path(asked.out) / name / "model"), "--model.dtype", asked.score_dtype]
    scoring += [*rows(asked, "forget", "retain"), "--members", "null", "--nonmembers", "null", "--utility", "null"]
    scoring += ["--batch_size", "64"]
    return [
        Stage(name, "merge", tuple(words)),
        Stage(f"{name}-scores", "evaluate", tuple(scoring), "scores.json"),
    ]


def rows(asked: Merging, *sides: str) -> list[str]:
    """The rows of the other benchmark, as words."""
    return [word for side in sides for word in (f"--{side}", str(Path(asked.methods) / "data" / f"{side}.jsonl"))]


def table(out: Path, names: list[str]) -> str:
    """Markdown, a scored merge a row: forget terms and retain terms on average, as the search counts them."""
    measures = Measures(quality="forget_terms", keeping="retain_terms")
    lines = ["| merge | quality | utility |", "|---|---|---|"]
    for name in names:
        quality, utility = measures.of(json.loads((out / name / "scores.json").read_text()))
        lines.append(f"| {name.removesuffix('-scores')} | {quality:.3f} | {utility:.3f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    script(main, Merging, description=__doc__)
