"""Every unlearning method on a real model, at equal steps and at an equal price: which forgets most?

    python -m benchmarks.real_model   --model FOLDER --lume FOLDER --out runs/real --only '[base, trace]'
    python -m benchmarks.real_methods --real runs/real --out runs/real_methods

`--real` is the folder of benchmarks/real_model.py: the model that has memorized LUME's people, the rows, the traced plan. Every
method trains the same weights (the MLPs of the planned layers) for as many steps of as many rows, once at each of a few
learning rates, with its published settings otherwise; the rate counts that forgets most within the budget of what the retain
terms may lose. The leading methods are run again with other seeds. It is `unlearn.search` on a grid: resumable
(`--resume true`), with every run's folder.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.real_model import first_people, write_rows
from lm.config import dump_yaml, script
from lm.errors import UserError, did_you_mean
from lm.model import ModelSpec
from lm.row_files import load_rows
from lm.run_folder import write_atomic
from tracing import LayerPlan
from unlearn.alternates.stage import ALTERNATES
from unlearn.config import UnlearnConfig
from unlearn.evaluation.config import EvaluateConfig
from unlearn.search import Method, Range, SearchConfig, run_search
from unlearn.search.table import every_trial, table, terms

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What is compared, and how long each run trains."""

    real: str = "runs/real"
    """The folder of benchmarks/real_model.py, with `base` and `trace` done."""
    out: str = "runs/real_methods"
    """The folder of the search."""
    people: int = 10
    """People of each side, of those that the model memorized: their rows are trained on and scored."""
    steps: int = 20
    """Optimizer steps of every run."""
    batch: int = 24
    """Rows a step, forget and retain together."""
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    """The learning rates that every method is tried at."""
    budget: float = 0.1
    """Share of the retain terms (completions and answers) that a run may cost."""
    repeat: int = 5
    """So many methods are run again, with each of `seeds`."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Of the repeats: order of the rows, random tokens, refusals."""
    only: tuple[str, ...] = ()
    """Only these methods; empty: all."""
    autocast: str = "bf16"
    """Type that training computes in over float32 weights: `no` where the machine has no fast bfloat16."""
    score_dtype: str = "bfloat16"
    """Type in which models are scored."""
    resume: bool = False
    """Go on with the comparison in `out`."""


def settings(layer: int, alternates: Path) -> dict[str, dict[str, Any]]:
    """What sets each method apart: dotted settings of the unlearning config. `layer`: whose output RMU steers."""
    named = {"objective": "DPO", "alternates": "AlternateFile", "alternates.path": str(alternates)}
    plain = ("GradientAscent", "GradientDifference", "KLMinimization", "Joint", "NPO", "SimNPO", "WGA", "SatImp")
    plain += ("GeneralizedCrossEntropy", "UNDIAL", "CEU", "PDU")
    found: dict[str, dict[str, Any]] = {name: {"objective": name} for name in plain}
    found["IdkDPO"] = {"objective": "DPO", "alternates": "Refusals"}
    found["AltPO"] = named
    found["IdkNLL"] = {"objective": "LearnAlternate", "alternates": "Refusals"}
    found["RandomTokens"] = {"objective": "LearnAlternate", "alternates": "RandomTokens"}
    found["FLAT"] = {"objective": "FLAT", "alternates": "Refusals"}
    for name in ("RMU", "AdaptiveRMU"):
        found[name] = {"objective": name, "objective.layer": layer}
    found["Sequential"] = {"objective": "GradientDifference", "trainer.pairing": "sequential", "trainer.epochs": 1}
    return found


def main(asked: Comparison) -> None:
    out, real = Path(asked.out), Path(asked.real)
    base, plan = real / "base" / "model", real / "trace" / "plan.json"
    for path in (base, plan):
        if not path.exists():
            raise UserError(f"{path} is missing: run benchmarks/real_model.py with --only '[base, trace]' first")
    for side in ("forget", "retain"):
        rows = load_rows(real / "data" / f"{side}.jsonl")
        write_rows(out / "data" / f"{side}.jsonl", first_people(rows, asked.people))
    invented = out / "alternates"
    methods = settings(max(LayerPlan.load(plan).layers), invented / ALTERNATES)
    for name in asked.only:
        if name not in methods:
            raise UserError(f"there is no method {name}{did_you_mean(name, methods)}")
    chosen = {name: fixed for name, fixed in methods.items() if not asked.only or name in asked.only}
    if "Sequential" in chosen and asked.batch % 8:
        raise UserError(
            f"batch is {asked.batch}: Sequential has 7 retain rows for each forget row; give a multiple of 8"
        )
    if "AltPO" in chosen and not has_all(invented / ALTERNATES, out / "data" / "forget.jsonl"):
        invent(str(base), out / "data" / "forget.jsonl", invented)
    config = search(asked, chosen, base, plan)
    result = run_search(config)
    print("\n\n".join((terms(result), table(result), every_trial(result))))


def has_all(alternates: Path, rows: Path) -> bool:
    """Whether each row has other answers already."""
    if not alternates.exists():
        return False
    found = {json.loads(line)["id"] for line in alternates.read_text().splitlines()}
    return found >= {row.id for row in load_rows(rows)}


def invent(model: str, rows: Path, out: Path) -> None:
    """Have the model invent other answers, for AltPO. What it knows by heart it says again and again: it is asked often."""
    shutil.rmtree(out, ignore_errors=True)  # of a run that broke off
    words = ["scripts/alternates.py", "--model.path", model, "--rows", str(rows), "--per_row", "1", "--out", str(out)]
    subprocess.run([sys.executable, *words, "--attempts", "20", "--temperature", "1.5"], cwd=ROOT, check=True)


def search(asked: Comparison, methods: dict[str, dict[str, Any]], base: Path, plan: Path) -> SearchConfig:
    """The comparison as a search; writes the two configs that it starts from."""
    out = Path(asked.out)
    rows = {side: str(out / "data" / f"{side}.jsonl") for side in ("forget", "retain")}
    model = ModelSpec(path=str(base), dtype="float32")
    unlearn, evaluate = out / "unlearn.yaml", out / "evaluate.yaml"
    write_atomic(unlearn, dump_yaml(UnlearnConfig(model=model, **rows)))
    scoring = EvaluateConfig(
        model=ModelSpec(path=str(base), dtype=asked.score_dtype),
        **rows,
        members=None,
        nonmembers=None,
        utility=None,
        batch_size=64,
    )
    write_atomic(evaluate, dump_yaml(scoring))
    rate = {"trainer.learning_rate": Range(choice=asked.rates)}
    return SearchConfig(
        unlearn=str(unlearn),
        evaluate=str(evaluate),
        settings={
            "scope.plan": str(plan),
            "trainer.steps": asked.steps,
            "trainer.batch": asked.batch,
            "trainer.autocast": asked.autocast,
            "trainer.save_every": 1000,
            "trainer.estimate": False,
        },
        methods=tuple(Method(name=name, settings=fixed, space=rate) for name, fixed in methods.items()),
        trials=len(asked.rates),
        sampler="grid",
        seeds=asked.seeds,
        repeat=asked.repeat,
        budget=asked.budget,
        keeping="retain_terms",
        out=str(out / "search"),
        resume=asked.resume,
    )


if __name__ == "__main__":
    script(main, Comparison, description=__doc__)
