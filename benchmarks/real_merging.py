"""Unlearning by arithmetic on weights, on the model, rows and scores of benchmarks/real_methods.py: task vectors and TIES.

    python -m benchmarks.real_methods --real runs/real --out runs/real_methods
    python -m benchmarks.real_merging --methods runs/real_methods \
      --pairs '[[search/UNDIAL/trial-00, search/GeneralizedCrossEntropy/trial-01]]' --out runs/real_merging

Negation: the forget rows are learned once more, the same layers for as many steps of as many rows as every other method has,
and what that changed is taken away, once or more. TIES: two runs of the search that are already there are joined. A merge
itself trains nothing. Model, rows, steps and scoring are those of the search's own files. Every stage is one of this
project's scripts, printed as the command it is; a finished one is not run again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from benchmarks.real_model import Stage, run
from lm.config import script
from lm.errors import UserError
from lm.run_folder import write_atomic
from unlearn.search.scored import Measures


@dataclass(frozen=True, kw_only=True)
class Merging:
    """What is merged."""

    methods: str = "runs/real_methods"
    """The folder of benchmarks/real_methods.py: what is learned, how, how it is scored, and the runs that are joined."""
    rates: tuple[float, ...] = (3e-4, 1e-3)
    """Learning rates of learning."""
    weights: tuple[float, ...] = (-0.5, -1.0, -2.0)
    """What the task vector is multiplied by before it is added."""
    pairs: tuple[tuple[str, str], ...] = ()
    """Runs to join: two folders inside `methods`."""
    densities: tuple[float, ...] = (0.02, 0.05, 0.2)
    """Shares of the whole model's weights whose changes are kept."""
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
    """Every stage, in an order in which each finds what it needs. UserError for a search or a run of it that is not there."""
    methods, out = Path(asked.methods), Path(asked.out)
    search = methods / "search" / "config.yaml"
    if not search.exists():
        raise UserError(f"{search} is missing: run benchmarks/real_methods.py first, or name its folder as methods")
    settings = yaml.safe_load(search.read_text())["settings"]
    written = {name: value if isinstance(value, str) else json.dumps(value) for name, value in settings.items()}
    same = [word for name, value in written.items() for word in (f"--{name}", value)]
    found: list[Stage] = []
    for rate in asked.rates:
        learned = f"learn-{rate:g}"
        words = ["--config", str(methods / "unlearn.yaml"), *same, "--trainer.learning_rate", str(rate)]
        found.append(Stage(learned, "unlearn", (*words, "--objective", "Learn", "--retain_loss", "NoRetain")))
        for weight in asked.weights:
            how = ("--method", "TaskArithmetic", "--method.weights", f"[{weight}]")
            found += merge(asked, f"negation-{rate:g}-by{weight:g}", [out / learned / "model"], how)
    for number, pair in enumerate(asked.pairs, 1):
        models = [methods / name / "model" for name in pair]
        for model in models:
            if not model.exists():
                raise UserError(f"{model} is missing: name runs of {asked.methods} that have a model")
        for density in asked.densities:
            how = ("--method", "Ties", "--method.density", str(density))
            found += merge(asked, f"ties-{number}-of{density:g}", models, how)
    return found


def merge(asked: Merging, name: str, models: Sequence[Path], how: Sequence[str]) -> list[Stage]:
    """A merge and the scoring of its result, as the search scored its runs."""
    methods = Path(asked.methods)
    base = yaml.safe_load((methods / "unlearn.yaml").read_text())["model"]["path"]
    merging = ("--base", base, "--models", json.dumps([str(model) for model in models]), *how)
    result = str(Path(asked.out) / name / "model")
    scoring = ("--config", str(methods / "evaluate.yaml"), "--model.path", result)
    return [Stage(name, "merge", merging), Stage(f"{name}-scores", "evaluate", scoring, "scores.json")]


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
