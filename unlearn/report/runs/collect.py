"""A report from run folders: models with their scores, where it was stored, what came back, and what to type again."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lm.errors import UserError
from tracing.effects.effects import Effects
from tracing.effects.table import EffectTable
from tracing.plan.layer_plan import LayerPlan
from unlearn.evaluation.lume import TERMS
from unlearn.evaluation.result import MEASURES
from unlearn.report.records import Part, Report, ReportModel
from unlearn.report.runs.answers import shown_answers
from unlearn.report.runs.caveats import caveats, facts_about
from unlearn.report.runs.folders import Run, find_runs, left_out
from unlearn.report.runs.models import Subject, subjects
from unlearn.report.runs.results import attacks_on, depths_of, number_of, traced_after, with_attacks

TITLE = "What was forgotten"
QUESTION = (
    "What does a model still say of the rows that it should forget, and of those that it should keep: where was it stored, is it "
    "gone, and how do we know?"
)
_LABELS: dict[Part, str] = {"reference": "Before unlearning", "retain_model": "Retain model"}
_NOTES: dict[Part, str] = {
    "reference": "The reference model, which knows everything: the floor.",
    "retain_model": "It never saw the forget rows: the honest ceiling.",
    "planned": "the layers that tracing chose",
    "control": "control: as many other layers",
    "all_layers": "control: all layers",
    "wiped": "weights perturbed first, then healed",
}
_KEPT = ("terms", "seconds", "model", *MEASURES)


@dataclass(frozen=True, kw_only=True)
class Naming:
    """What a model is called, and what it is beside the others. What is None is told from the runs."""

    key: str | None = None
    label: str | None = None
    note: str | None = None
    part: Part | None = None


def collect(
    folders: Sequence[str | Path],
    *,
    names: Mapping[str, Naming] | None = None,
    retain_model: str | Path | None = None,
) -> Report:
    """The report of these runs.

    Args:
        folders: run folders, or folders of run folders.
        names: a run folder -> what the model that it is about is called.
        retain_model: the folder with the evaluation of a retain model, if no run says which one it is.

    Raises:
        UserError: a folder that holds nothing to report, runs that contradict each other, a name for a run that is not there.
    """
    retain = find_runs([retain_model] if retain_model is not None else [])
    runs = find_runs([*folders, *([retain_model] if retain_model is not None else [])])
    models = subjects(runs, retain)
    named = _names(models, {Path(name).resolve(): naming for name, naming in (names or {}).items()})
    entries = [(subject, _model(subject, naming)) for subject, naming in zip(models, named, strict=True)]
    attacks = [attacks_on(subject, model) for subject, model in entries]
    entries = [(subject, with_attacks(model, on_it)) for (subject, model), on_it in zip(entries, attacks, strict=True)]
    trace = _only_trace(runs)
    plan, effects = _traced(trace)
    evaluations = {model.key: subject.evaluation for subject, model in entries if subject.evaluation is not None}
    several = sum(run.kind == "retrace" for run in runs) > 1
    report = Report(
        title=TITLE,
        question=QUESTION,
        model_name=_model_name(models, trace),
        plan=plan,
        tables=_tables(plan, effects),
        models=tuple(model for _, model in entries),
        answers=shown_answers(evaluations),
        again=tuple(
            retraced
            for subject, model in entries
            for retraced in traced_after(subject, model, trace, evaluations, several)
        ),
        attacks=tuple(attacked for on_it in attacks for attacked in on_it),
        depths=tuple(depth for subject, model in entries for depth in depths_of(subject, model)),
        commands=(*(command_of(run) for run in runs), shlex.join(["palimpsest", "report", *map(str, folders)])),
        left_out=tuple(map(str, left_out(folders))),
    )
    return replace(report, caveats=caveats(report, evaluations), facts=facts_about(report, entries, runs))


def _names(models: Sequence[Subject], given: Mapping[Path, Naming]) -> list[Naming]:
    """What was given for each model. Raises UserError where a name is for a folder that is no run here."""
    known = {folder.resolve() for model in models for folder in model.folders}
    for folder in given:
        if folder not in known:
            raise UserError(f"labels names {folder}, which is none of the runs: name the folder of a run about a model")
    return [
        next((given[folder.resolve()] for folder in model.folders if folder.resolve() in given), Naming())
        for model in models
    ]


def _model(subject: Subject, naming: Naming) -> ReportModel:
    part = naming.part or subject.part
    scores: Mapping[str, Any] = subject.evaluation.json("scores.json") if subject.evaluation is not None else {}
    manifest = subject.unlearning.manifest if subject.unlearning is not None else {}
    config = subject.unlearning.config if subject.unlearning is not None else {}
    whole = (config.get("scope") or {}).get("layers") == "model"
    seconds = [float(each) for each in (manifest.get("train_seconds"), scores.get("seconds")) if each is not None]
    return ReportModel(
        key=naming.key or str(subject.folders[0]),
        label=naming.label or _LABELS.get(part) or short_name(subject),
        note=_note(subject, part) if naming.note is None else naming.note,
        part=part,
        terms=tuple(number_of(term) for term in scores.get("terms", [None] * len(TERMS))),
        **{name: number_of(scores.get(name)) for name in MEASURES},
        others={name: number_of(value) for name, value in scores.items() if name not in _KEPT},
        seconds=sum(seconds) if seconds else math.nan,
        layers=None if whole or not manifest.get("layers") else tuple(manifest["layers"]),
        log=_log(subject.unlearning),
    )


def short_name(subject: Subject) -> str:
    """The folder that the model lies in, without the `model` that every run calls it."""
    path = subject.unlearning.folder if subject.unlearning is not None else Path(subject.path)
    return path.parent.name if path.name == "model" and path.parent.name else path.name or str(path)


def _note(subject: Subject, part: Part) -> str:
    if subject.unlearning is None:
        return _NOTES.get(part, "" if subject.path.startswith("builtin") else subject.path)
    objective = subject.unlearning.config.get("objective")
    name = str(objective.get("class_path") if isinstance(objective, Mapping) else objective).rpartition(".")[2]
    return f"{name}, {_NOTES[part]}" if part in _NOTES else name


def _log(run: Run | None) -> list[dict[str, Any]]:
    if run is None or not (run.folder / "metrics.jsonl").exists():
        return []
    return [line for line in run.rows("metrics.jsonl") if isinstance(line, dict)]


def _model_name(models: Sequence[Subject], trace: Run | None) -> str:
    """The model under study: the one before unlearning."""
    path = next((model.path for model in models if model.part == "reference"), None)
    spec = next((model.unlearning.config["model"] for model in models if model.unlearning is not None), None)
    spec = spec if spec is not None else trace.config["model"] if trace is not None else None
    if path is None and isinstance(spec, Mapping):
        path = str(spec.get("path"))
    path = path or models[0].path
    return "the built-in model" if path.startswith("builtin") else path


def _only_trace(runs: Sequence[Run]) -> Run | None:
    traces = [run for run in runs if run.kind == "trace"]
    if len(traces) > 1:
        raise UserError(f"{traces[0].folder} and {traces[1].folder} are both traces: give one of them")
    return traces[0] if traces else None


def _traced(trace: Run | None) -> tuple[LayerPlan | None, Effects | None]:
    if trace is None:
        return None, None
    path = trace.folder / "effects.npz"
    return LayerPlan.load(trace.folder / "plan.json"), Effects.load(path) if path.exists() else None


def _tables(plan: LayerPlan | None, effects: Effects | None) -> dict[str, EffectTable]:
    if plan is None or effects is None:
        return {}
    settings = {name: plan.evidence[name] for name in ("confidence", "aggregation") if name in plan.evidence}
    return {kind: effects.table(kind, **settings) for kind in effects.kinds}


def command_of(run: Run) -> str:
    out = f"runs/again/{run.folder.resolve().name}"
    return shlex.join(["palimpsest", run.kind, "--config", str(run.folder / "config.yaml"), "--out", out])
