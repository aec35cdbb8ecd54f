"""From the demo's run folders to the records of its report: which answers to show, which caveats hold, what to type."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm.run_folder import RunFolder
from tracing.effects.before_after import difference
from tracing.effects.effects import Effects
from tracing.plan.layer_plan import LayerPlan
from unlearn.demo.entries import Entry
from unlearn.report import Answer, Report, ReportModel, Retraced

QUESTION = (
    "A small language model has memorized invented stories, people's personal data and biographies. "
    "Half of them must be forgotten, the other half kept. Where are they stored, can they be taken out there, "
    "and what is left of them afterwards?"
)
CAVEATS = (
    "The model is tiny and the world is invented: numbers here show that the method and the measuring work, not how a "
    "large model will behave.",
    "Tracing shows where an answer is carried, not where training works best. The controls are the test of the choice.",
    "The membership score looks at whole documents, prompt and answer; only answers are trained to be forgotten, so a "
    "model can answer nothing and still know a document's beginning.",
    "Each method ran once here, with one seed; benchmarks/builtin_seeds.py repeats it over seeds and prints the spread.",
    "Nothing on this page attacks the result: relearning and paraphrases are separate tests.",
)
_SHOWN = {"Task1": 1, "Task2": 3, "Task3": 1}


def demo_report(
    out: Path,
    plan: LayerPlan,
    effects: Effects,
    after: Effects,
    forgotten: Collection[str],
    entries: Sequence[Entry],
    models: Mapping[str, Mapping[str, Any]],
) -> Report:
    """The report of a finished demo in `out`: effects before and after, and the ids of the rows that were to be forgotten."""
    manifest = RunFolder(out / "joint_planned").manifest
    return Report(
        title="What was forgotten",
        model_name="the built-in model",
        question=QUESTION,
        plan=plan,
        tables={
            kind: effects.table(kind, confidence=plan.evidence["confidence"], aggregation=plan.evidence["aggregation"])
            for kind in effects.kinds
        },
        models=tuple(_model(out, entry, models[entry.key]) for entry in entries),
        answers=_answers(out, [entry.key for entry in entries]),
        again=_again(effects, after, forgotten, plan.evidence["confidence"]),
        caveats=CAVEATS,
        commands=("make demo", f"python scripts/demo.py --config {out}/demo.yaml --out runs/again"),
        facts={
            "date": manifest["finished"],
            "commit": str(manifest["git"]),
            "python": manifest["python"],
            "torch": manifest["versions"]["torch"],
            "transformers": manifest["versions"]["transformers"],
            "seed of the batches": str(manifest["seed"]),
            "forget rows (sha256)": manifest["data"]["forget"],
            "retain rows (sha256)": manifest["data"]["retain"],
            "machine": f"{manifest['platform']}, {manifest['devices']['processes']} process, "
            f"{manifest['devices']['threads']} threads",
        },
    )


def _again(before: Effects, after: Effects, forgotten: Collection[str], confidence: float) -> tuple[Retraced, ...]:
    """What changed, apart for the facts to forget and those to keep."""
    sides = (("Facts to forget", True), ("Facts to keep", False))
    places = {
        name: [at for at, fact in enumerate(before.facts) if (fact.id in forgotten) is side] for name, side in sides
    }
    return tuple(
        Retraced(label=name, found=difference(before.some(some), after.some(some), confidence=confidence))
        for name, some in places.items()
        if some
    )


def _model(out: Path, entry: Entry, found: Mapping[str, Any]) -> ReportModel:
    trained = out / entry.key
    layers = tuple(RunFolder(trained).manifest["layers"]) if trained.exists() else None
    whole = entry.scope is not None and entry.scope.layers == "model"
    return ReportModel(
        key=entry.key,
        label=entry.label,
        note=entry.note,
        terms=tuple(found["terms"]),
        task_aggregate=found["task_aggregate"],
        mia_auc=found["mia_auc"],
        mia_score=found["mia_score"],
        utility=found["utility"],
        final=found["final"],
        seconds=found["seconds"],
        layers=None if whole else layers,
        log=RunFolder(trained).metrics() if trained.exists() else (),
    )


def _answers(out: Path, keys: Sequence[str]) -> tuple[Answer, ...]:
    """A few rows of each task and side, the first ones, with what every model said."""
    shown: list[Answer] = []
    for side in ("forget", "retain"):
        said = {key: _rows(out / "scores" / key / f"{side}.jsonl") for key in keys}
        taken: dict[str, set[str]] = {}
        for place, row in enumerate(said[keys[0]]):
            documents = taken.setdefault(row["task"], set())
            document = row["id"][:-3]
            if document not in documents and len(documents) < _SHOWN[row["task"]]:
                documents.add(document)
            elif document not in documents or row["task"] != "Task2" or row["id"][-1] not in "12":
                continue
            shown.append(
                Answer(
                    prompt=row["input"],
                    truth=row["expected_output"],
                    task=row["task"],
                    side="forget" if side == "forget" else "retain",
                    said={key: rows[place]["model_output"] for key, rows in said.items()},
                )
            )
    return tuple(shown)


def _rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
