"""A real pretrained model, end to end: memorise people's data, trace, plan, unlearn in every way, score, print the table.

    python benchmarks/real_model.py --model FOLDER --lume FOLDER --mmlu FILE --out runs/real

FOLDER is any Hugging Face decoder (docs/results.md used SmolLM2-135M-Instruct) and the public LUME splits. Every stage is
one of this project's scripts, run as its own process and printed as the command it is; a stage that is finished is not
run again, so an interrupted benchmark goes on where it was. The unlearning runs have equal steps, batches and rates.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lm.config import script  # noqa: E402
from lm.rows import Row  # noqa: E402
from lm.run import write_atomic, write_json  # noqa: E402
from unlearn.data import load_rows  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What the benchmark needs, and how long it trains."""

    model: str
    """A pretrained model's folder or hub id."""
    lume: str
    """The folder with LUME's forget_train, retain_train and validation files."""
    mmlu: str | None = None
    """MMLU questions (JSON lines) for utility."""
    out: str = "runs/real"
    """Where every stage's run folder goes."""
    people: int = 20
    """Task2 people on each side, the first of the train splits, with all their rows."""
    learn_epochs: int = 16
    """Epochs of memorising."""
    learn_rate: float = 3e-4
    """Its learning rate."""
    steps: int = 40
    """Optimiser steps of every unlearning run."""
    rate: float = 1e-4
    """Their learning rate."""
    batch: int = 24
    """Rows a step, forget and retain together."""
    plan_size: int = 6
    """Layers in the plan."""
    facts: int = 10
    """Known facts that are traced."""
    mmlu_per_subject: int = 2
    """MMLU questions of each subject."""


JOINT = ["--objective", "Joint"]
"""The methods: name -> the words that differ."""


def methods(plan: str) -> dict[str, list[str]]:
    """Every unlearning run by name, as the words that set it apart from the others."""
    planned = ["--scope.plan", plan]
    return {
        "joint_planned": [*planned, *JOINT],
        "joint_random": [*planned, "--scope.use", "random", *JOINT],
        "joint_inverse": [*planned, "--scope.use", "inverse", *JOINT],
        "joint_all": [*planned, "--scope.use", "all", *JOINT],
        "gradient_ascent": ["--scope.layers", "model", "--objective", "GradientAscent"],
        "gradient_difference": ["--scope.layers", "model", "--objective", "GradientDifference"],
        "kl_minimisation": ["--scope.layers", "model", "--objective", "KLMinimisation"],
        "npo": ["--scope.layers", "model", "--objective", "NPO"],
    }


def main(asked: Benchmark) -> None:
    out = Path(asked.out)
    commands: dict[str, str] = {}
    data = prepare(asked, out / "data")
    common = ["--model.dtype", "float32", "--trainer.autocast", "bf16", "--trainer.batch", str(asked.batch)]
    common += ["--trainer.micro_batch", "6", "--trainer.save_every", "40"]
    learn = ["--model.path", asked.model, *common, "--objective", "Learn", "--scope.layers", "model"]
    learn += ["--trainer.learning_rate", str(asked.learn_rate), "--trainer.epochs", str(asked.learn_epochs)]
    sides = ["--forget", str(data / "forget.jsonl"), "--retain", str(data / "retain.jsonl")]
    halves = ["--forget", str(data / "retain_a.jsonl"), "--retain", str(data / "retain_b.jsonl")]
    models = {
        "base": stage(out, commands, "base", "unlearn", [*learn, *sides]),
        "retain_only": stage(out, commands, "retain_only", "unlearn", [*learn, *halves]),
    }
    evaluate(asked, out, data, models)
    trace = ["--model.path", str(models["base"]), "--facts", str(data / "facts.jsonl"), "--max_facts", str(asked.facts)]
    trace += ["--plan.size", str(asked.plan_size), "--metric", "log_probability", "--positions", "subject_and_last"]
    plan = stage(out, commands, "trace", "trace", trace, result="plan.json")
    for name, words in methods(str(plan)).items():
        again = ["--model.path", str(models["base"]), *common, *sides, *words]
        again += ["--trainer.learning_rate", str(asked.rate), "--trainer.steps", str(asked.steps)]
        models[name] = stage(out, commands, name, "unlearn", again)
        evaluate(asked, out, data, {name: models[name]})
    rows = [row(out, name, commands) for name in models]
    write_json(out / "table.json", rows)
    print(table(rows))


def prepare(asked: Benchmark, folder: Path) -> Path:
    """The chosen rows as files: both sides, the retain side in halves, questions to trace, documents never trained on."""
    splits = {name: load_rows(Path(asked.lume) / f"{name}.jsonl") for name in ("forget_train", "retain_train")}
    unseen = [
        row
        for name in ("forget_validation", "retain_validation")
        for row in load_rows(Path(asked.lume) / f"{name}.jsonl")
    ]
    forget, retain = (first_people(splits[f"{side}_train"], asked.people) for side in ("forget", "retain"))
    write_rows(folder / "forget.jsonl", forget)
    write_rows(folder / "retain.jsonl", retain)
    write_rows(folder / "retain_a.jsonl", retain[::2])
    write_rows(folder / "retain_b.jsonl", retain[1::2])
    write_rows(folder / "facts.jsonl", [*forget, *retain])
    write_rows(folder / "unseen.jsonl", [row for row in unseen if row.task == "Task2"])
    return folder


def first_people(rows: tuple[Row, ...], count: int) -> list[Row]:
    """All Task2 rows of the first `count` documents."""
    people = list(dict.fromkeys(row.document for row in rows if row.task == "Task2"))[:count]
    return [row for row in rows if row.document in people]


def write_rows(path: Path, rows: list[Row]) -> None:
    records = ({"id": r.id, "input": r.input, "output": r.output, "task": r.task} for r in rows)
    write_atomic(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def evaluate(asked: Benchmark, out: Path, data: Path, models: dict[str, Path]) -> None:
    """Score each model on the official terms that apply, in bfloat16 as officially."""
    for name, folder in models.items():
        words = ["--model.path", str(folder), "--model.dtype", "bfloat16", "--batch_size", "64"]
        words += ["--forget", str(data / "forget.jsonl"), "--retain", str(data / "retain.jsonl")]
        words += [
            "--members",
            str(data / "forget.jsonl"),
            "--nonmembers",
            str(data / "unseen.jsonl"),
            "--membership_task",
            "Task2",
        ]
        if asked.mmlu:
            words += [
                "--utility",
                asked.mmlu,
                "--utility_style",
                "letter",
                "--utility_per_subject",
                str(asked.mmlu_per_subject),
            ]
        else:
            words += ["--utility", "null"]
        stage(out, {}, f"{name}-scores", "evaluate", words, result="scores.json")


def stage(
    out: Path, commands: dict[str, str], name: str, what: str, words: list[str], *, result: str = "model"
) -> Path:
    """Run one script unless its result is there; returns the result's path."""
    folder = out / name
    words = [f"scripts/{what}.py", *words, "--out", str(folder)]
    commands[name] = shlex.join(["python", *words])
    if not (folder / result).exists():
        resume = ["--resume", "true"] if (folder / "config.yaml").exists() else []
        print(f"\n== {commands[name]}", flush=True)
        subprocess.run([sys.executable, *words, *resume], cwd=ROOT, check=True)
    return folder / result


def row(out: Path, name: str, commands: dict[str, str]) -> dict[str, object]:
    """One line of the table, from the run folders."""
    manifest = json.loads((out / name / "manifest.json").read_text())
    scores = json.loads((out / f"{name}-scores" / "scores.json").read_text())
    return {
        "name": name,
        "layers": manifest["layers"],
        "modules": manifest["modules"],
        "steps": manifest["steps"],
        "train_seconds": manifest["train_seconds"],
        "tokens_per_second": manifest["tokens_per_second"],
        "peak_memory_gib": manifest["peak_memory_bytes"] / 2**30,
        **{key: scores[key] for key in ("terms", "task_aggregate", "mia_auc", "mia_score", "utility", "final")},
        "command": commands[name],
    }


def table(rows: list[dict[str, object]]) -> str:
    """Markdown: the four terms of Task2, the aggregates, and the cost."""
    head = [
        "run",
        "forget SC",
        "forget QA",
        "retain SC",
        "retain QA",
        "aggregate",
        "MIA AUC",
        "MMLU",
        "s",
        "tok/s",
        "GiB",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for r in rows:
        terms = r["terms"]
        assert isinstance(terms, list)
        values = [terms[2], terms[3], terms[8], terms[9], r["task_aggregate"], r["mia_auc"], r["utility"]]
        cells = ["-" if value is None else f"{value:.3f}" for value in values]
        cost = [f"{r['train_seconds']:.0f}", f"{r['tokens_per_second']:.0f}", f"{r['peak_memory_gib']:.1f}"]
        lines.append("| " + " | ".join([str(r["name"]), *cells, *cost]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    script(main, Benchmark, description=__doc__)
