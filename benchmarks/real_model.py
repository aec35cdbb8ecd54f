"""A real pretrained model, end to end: memorize people's data, trace, plan, unlearn in every way, score, print the table.

    python -m benchmarks.real_model --model FOLDER --lume FOLDER --mmlu FILE --out runs/real

FOLDER is any Hugging Face decoder (docs/results.md used SmolLM2-135M-Instruct) and the public LUME splits; `--tofu FOLDER
--people 10` takes TOFU's authors in their place, each answer a completion of its question. Every stage is
one of this project's scripts, run as its own process and printed as the command it is; a stage that is finished is not
run again, so an interrupted benchmark goes on where it was. The unlearning runs have equal steps and batches
(gradient ascent alone has only forget rows in them).
"""

from __future__ import annotations

import json
import shlex
import string
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from lm.config import script
from lm.data.rows import Row
from lm.errors import UserError
from lm.row_files import Half, halved, load_rows
from lm.run_folder import write_atomic, write_json

ROOT = Path(__file__).resolve().parents[1]
HALVES: dict[str, Half] = {"calibration": "first", "held_out": "second"}
"""Of the unseen people: those that something may be calibrated on, and those that are scored (benchmarks/compare_methods.py)."""
QUESTIONS = 20
"""About each author of TOFU, one after the other."""
LETTERS = string.ascii_lowercase


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What the benchmark needs, and how long it trains."""

    model: str
    """A pretrained model's folder or hub id."""
    lume: str | None = None
    """The folder with LUME's forget_train, retain_train and validation files."""
    tofu: str | None = None
    """Or that with TOFU's forget10, retain90 and holdout10 files."""
    mmlu: str | None = None
    """MMLU questions (JSON lines) for utility."""
    out: str = "runs/real"
    """Where every stage's run folder goes."""
    people: int = 20
    """LUME's Task2 people, or TOFU's authors, on each side: the first of the splits, with all their rows."""
    learn_epochs: int = 16
    """Epochs of memorizing."""
    learn_rate: float = 3e-4
    """Its learning rate."""
    steps: int = 40
    """Optimizer steps of every unlearning run."""
    rate: float = 6e-4
    """Learning rate of the runs that train the MLPs of some layers: at a sixth of it too little moved in 30 steps."""
    model_rate: float = 1e-4
    """Learning rate of the runs that train the whole model: at three times it ascent left no language in 30 steps."""
    batch: int = 24
    """Rows a step, forget and retain together."""
    plan_size: int = 6
    """Layers in the plan."""
    facts: int = 10
    """Known facts that are traced."""
    autocast: str = "bf16"
    """Type that training computes in over float32 weights: `no` where the machine has no fast bfloat16."""
    score_dtype: str = "bfloat16"
    """Type in which models are scored."""
    mmlu_per_subject: int = 2
    """MMLU questions of each subject."""
    only: tuple[str, ...] = ()
    """Run only these stages now (two calls can share the work); empty: all. The table comes when all are there."""

    def __post_init__(self) -> None:
        if (self.lume is None) == (self.tofu is None):
            raise UserError("give --lume FOLDER or --tofu FOLDER, one of them: whose people are memorized?")


@dataclass(frozen=True)
class Stage:
    """One script with its words, and the file or folder that says that it is done."""

    name: str
    script: str
    words: tuple[str, ...]
    result: str = "model"

    def command(self, out: Path) -> list[str]:
        """What a user would type after `python`."""
        return [f"scripts/{self.script}.py", *self.words, "--out", str(out / self.name)]


def methods(asked: Benchmark, plan: str) -> dict[str, list[str]]:
    """Every unlearning run by name, as the words that set it apart from the others."""
    planned = ["--trainer.learning_rate", str(asked.rate), "--scope.plan", plan]
    model = ["--trainer.learning_rate", str(asked.model_rate), "--scope.layers", "model"]
    joint = ["--objective", "Joint"]
    return {
        "joint_planned": [*planned, *joint],
        "joint_random": [*planned, "--scope.use", "random", *joint],
        "joint_inverse": [*planned, "--scope.use", "inverse", *joint],
        "joint_all": [*planned, "--scope.use", "all", *joint],
        "gradient_difference_planned": [*planned, "--objective", "GradientDifference"],
        "gradient_ascent": [*model, "--objective", "GradientAscent"],
        "gradient_difference": [*model, "--objective", "GradientDifference"],
        "kl_minimization": [*model, "--objective", "KLMinimization"],
        "npo": [*model, "--objective", "NPO"],
    }


def stages(asked: Benchmark, out: Path) -> list[Stage]:
    """Every stage, in an order in which each finds what it needs."""
    data, base = out / "data", str(out / "base" / "model")
    common = ["--model.dtype", "float32", "--trainer.autocast", asked.autocast, "--trainer.batch", str(asked.batch)]
    common += ["--trainer.micro_batch", str(asked.batch), "--trainer.save_every", "40"]
    sides = ["--forget", str(data / "forget.jsonl"), "--retain", str(data / "retain.jsonl")]
    halves = ["--forget", str(data / "retain_a.jsonl"), "--retain", str(data / "retain_b.jsonl")]
    learn = ["--model.path", asked.model, *common, "--objective", "Learn", "--scope.layers", "model"]
    learn += ["--trainer.learning_rate", str(asked.learn_rate), "--trainer.epochs", str(asked.learn_epochs)]
    trace = ["--model.path", base, "--facts", str(data / "facts.jsonl"), "--facts.max_facts", str(asked.facts)]
    trace += ["--kinds", "[mlp]", "--metric", "log_probability", "--positions", "subject_and_last"]
    trace += ["--plan.size", str(asked.plan_size)]
    again = ["--model.path", base, *common, *sides, "--trainer.steps", str(asked.steps)]
    trained = {"base": [*learn, *sides], "retain_only": [*learn, *halves]}
    trained |= {name: [*again, *words] for name, words in methods(asked, str(out / "trace" / "plan.json")).items()}
    planned = [Stage("base", "unlearn", tuple(trained["base"])), Stage("trace", "trace", tuple(trace), "plan.json")]
    planned += [Stage(name, "unlearn", tuple(words)) for name, words in trained.items() if name != "base"]
    planned += [scoring(asked, name, str(out / name / "model"), data) for name in trained]
    return sorted(planned, key=lambda stage: ["base", "trace", *trained].index(stage.name.removesuffix("-scores")))


def main(asked: Benchmark) -> None:
    out = Path(asked.out)
    prepare(asked, out / "data")
    todo = stages(asked, out)
    unknown = sorted({*asked.only} - {stage.name for stage in todo})
    if unknown:
        raise UserError(f"there is no stage {unknown[0]}; there are {', '.join(stage.name for stage in todo)}")
    for stage in todo:
        if not asked.only or stage.name in asked.only:
            run(stage, out)
    if all((out / stage.name / stage.result).exists() for stage in todo):
        for stage in todo:
            run(stage, out)  # nothing is left to run: this compares what is there with what was asked
        rows = [row(out, stage.name) for stage in todo if stage.script == "unlearn"]
        write_json(out / "table.json", rows)
        print(table(rows))


def run(stage: Stage, out: Path) -> None:
    """Run a stage unless it is done."""
    folder = out / stage.name
    words = stage.command(out)
    if (folder / stage.result).exists():
        if made_by(folder) != words:
            raise UserError(
                f"{folder} was made by other words ({shlex.join(made_by(folder))}): delete it, or give another out"
            )
        return
    resume = ["--resume", "true"] if (folder / "config.yaml").exists() else []
    print(f"\n== {shlex.join(['python', *words])}", flush=True)
    subprocess.run([sys.executable, *words, *resume], cwd=ROOT, check=True)


def made_by(folder: Path) -> list[str]:
    """The words that made what is in a run folder, as its manifest has them."""
    name, *words = json.loads((folder / "manifest.json").read_text())["command"]
    return [f"scripts/{name}", *words]


def scoring(asked: Benchmark, name: str, model: str, data: Path) -> Stage:
    """Score a model on the official terms that apply, in bfloat16 as officially."""
    words = ["--model.path", model, "--model.dtype", asked.score_dtype, "--batch_size", "64"]
    words += ["--forget", str(data / "forget.jsonl"), "--retain", str(data / "retain.jsonl")]
    words += ["--members", str(data / "forget.jsonl"), "--nonmembers", str(data / "unseen.jsonl")]
    words += ["--membership_task", "Task2"]
    if asked.mmlu:
        words += ["--utility", asked.mmlu, "--utility_style", "letter"]
        words += ["--utility_per_subject", str(asked.mmlu_per_subject)]
    else:
        words += ["--utility", "null"]
    return Stage(f"{name}-scores", "evaluate", tuple(words), "scores.json")


def prepare(asked: Benchmark, folder: Path) -> None:
    """The chosen rows as files: both sides, the retain side in halves, questions to trace, documents never trained on."""
    forget, retain, unseen = lume_people(asked) if asked.tofu is None else tofu_authors(Path(asked.tofu), asked.people)
    write_rows(folder / "forget.jsonl", forget)
    write_rows(folder / "retain.jsonl", retain)
    write_rows(folder / "retain_a.jsonl", retain[::2])
    write_rows(folder / "retain_b.jsonl", retain[1::2])
    write_rows(folder / "facts.jsonl", [*forget, *retain])
    write_rows(folder / "unseen.jsonl", unseen)
    for name, half in HALVES.items():
        write_rows(folder / f"{name}.jsonl", list(halved(unseen, "unseen.jsonl", half)))
    made = {"memorized": "base/model", "retain_model": "retain_only/model", "plan": "trace/plan.json"}
    write_json(folder.parent / "sources.json", {name: str(folder.parent / path) for name, path in made.items()})


def lume_people(asked: Benchmark) -> tuple[list[Row], list[Row], list[Row]]:
    """Forget and retain rows, and those of people who were never trained on: Task2 of both validation splits."""
    splits = {
        name: load_rows(str(Path(str(asked.lume)) / f"{name}.jsonl"))
        for name in ("forget_train", "retain_train", "forget_validation", "retain_validation")
    }
    forget, retain = (first_people(splits[f"{side}_train"], asked.people) for side in ("forget", "retain"))
    unseen = [*splits["forget_validation"], *splits["retain_validation"]]
    return forget, retain, [row for row in unseen if row.task == "Task2"]


def tofu_authors(folder: Path, count: int) -> tuple[list[Row], list[Row], list[Row]]:
    """The same of TOFU, in LUME's schema: the questions about an author are the completions of one document, a letter each.

    Raises:
        UserError: fewer authors than asked for.
    """
    columns = {"input": "question", "output": "answer"}
    sides: list[list[Row]] = []
    for name, most in (("forget10", count), ("retain90", count), ("holdout10", None)):
        rows = load_rows(str(folder / f"{name}.json"), columns=columns)
        authors = [rows[first : first + QUESTIONS] for first in range(0, len(rows), QUESTIONS)][:most]
        if most is not None and len(authors) < most:
            raise UserError(f"{folder}/{name}.json has {len(authors)} authors: give fewer --people")
        sides.append(
            [
                Row(f"{name}-{author:03d}sc{LETTERS[number]}", row.input, row.output, "Task2")
                for author, about in enumerate(authors)
                for number, row in enumerate(about)
            ]
        )
    forget, retain, unseen = sides
    return forget, retain, unseen


def first_people(rows: tuple[Row, ...], count: int) -> list[Row]:
    """All Task2 rows of the first `count` documents."""
    people = list(dict.fromkeys(row.document for row in rows if row.task == "Task2"))[:count]
    return [row for row in rows if row.document in people]


def write_rows(path: Path, rows: list[Row]) -> None:
    records = ({"id": r.id, "input": r.input, "output": r.output, "task": r.task} for r in rows)
    write_atomic(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def row(out: Path, name: str) -> dict[str, object]:
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
        "command": shlex.join(["python", *made_by(out / name)]),
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
