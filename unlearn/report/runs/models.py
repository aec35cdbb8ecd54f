"""Which runs are about one model, and what that model is beside the others: before unlearning, retain model, method, control.

A model is known by the path under which runs record it; where paths differ, by the fingerprint of its weights.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lm.errors import UserError
from lm.model import ModelSpec
from lm.old_configs import upgraded
from unlearn.report.records import Part
from unlearn.report.runs.folders import Run

_BUILTIN: dict[str, Part] = {"builtin": "reference", "builtin:retain_model": "retain_model"}
_CONTROLS: dict[str, Part] = {"chosen": "planned", "random": "control", "inverse": "control", "all": "all_layers"}
"""Which of a plan's layers were trained (`Scope.use`) -> what that makes of the model."""


@dataclass
class Subject:
    """A model and the runs about it.

    Attributes:
        path: as the first run records it.
        names: everything by which it is known: its paths, and the fingerprints of its weights.
        unlearning, evaluation: the run that made it and the one that scored it.
        others: attacks on it, traces in it, its depth.
    """

    path: str
    names: set[str]
    part: Part = "other"
    unlearning: Run | None = None
    evaluation: Run | None = None
    others: list[Run] = field(default_factory=list)

    @property
    def folders(self) -> list[Path]:
        """The run folders, that which made it first."""
        runs = [self.unlearning, self.evaluation, *self.others]
        return [run.folder for run in runs if run is not None]


def subjects(runs: Sequence[Run], retain_model: Iterable[Run] = ()) -> list[Subject]:
    """The models, those that an unlearning run made first; the runs of one model together.

    Args:
        runs: all runs, those of the retain model among them.
        retain_model: evaluations of a model that is said to be the retain model.

    Raises:
        UserError: two runs made, or two scored, the same model.
    """
    models: list[Subject] = []
    for run in runs:
        if run.kind == "unlearn":
            _add(models, run, {_spelled(f"{run.config['out']}/model"), _known(run.folder / "model")})
    for run in runs:
        if run.kind not in ("unlearn", "trace"):
            _add(models, run, model_names(run.config["model"], weights_of(run, "unlearned")))
    if not models:  # a trace alone is about the model that it traced
        for run in runs:
            _add(models, run, model_names(run.config["model"]))
    before, retain = named_by(runs)
    retain |= {name for run in retain_model for name in model_names(run.config["model"], weights_of(run, "unlearned"))}
    for model in models:
        model.part = _part(model, before, retain)
    return models


def model_names(spec: Any, weights: str | None = None) -> set[str]:
    """What a model that a config holds is known by: its path, as spelled and in full, and its fingerprint."""
    values: Mapping[str, Any] = upgraded(spec if isinstance(spec, Mapping) else {"path": spec}, ModelSpec)
    path = str(values.get("path") or "builtin")
    path = "builtin" if path == "builtin:memorized" else path
    extra = "".join(f"+{values[name]}" for name in ("adapter", "revision") if values.get(name))
    names = {f"{_spelled(path)}{extra}", f"{_known(Path(path))}{extra}"}
    return names | ({f"weights {weights}"} if weights else set())


def _spelled(path: str) -> str:
    return path if path.startswith("builtin") else os.path.normpath(path)


def _known(path: Path) -> str:
    return str(path.resolve()) if path.exists() else _spelled(str(path))


def weights_of(run: Run, name: str) -> str | None:
    """The fingerprint of the run's model, if its manifest holds one."""
    weights = run.manifest.get("weights")
    if isinstance(weights, Mapping):
        weights = weights.get(name)
    return weights if isinstance(weights, str) else None


def _add(models: list[Subject], run: Run, names: set[str]) -> None:
    """Put a run to the model that it is about: the one of that path, or else of those weights, or else a new one."""
    paths = {name for name in names if not name.startswith("weights ")}
    model = next((each for each in models if each.names & paths), None)
    model = model or next((each for each in models if each.names & names), None)
    if model is None:
        spec = run.config.get("model")
        path = str(spec.get("path")) if isinstance(spec, Mapping) else str(spec)
        model = Subject(path=str(run.folder / "model") if run.kind == "unlearn" else path, names=set())
        models.append(model)
    model.names |= names
    taken = {"unlearn": model.unlearning, "evaluate": model.evaluation}.get(run.kind)
    if taken is not None:
        done = "made" if run.kind == "unlearn" else "scored"
        raise UserError(f"{taken.folder} and {run.folder} both {done} the model {model.path}: give one of them")
    if run.kind == "unlearn":
        model.unlearning = run
    elif run.kind == "evaluate":
        model.evaluation = run
    else:
        model.others.append(run)


def named_by(runs: Sequence[Run]) -> tuple[set[str], set[str]]:
    """What runs call the model before unlearning, and the retain model."""
    before: set[str] = set()
    retain: set[str] = set()
    for run in runs:
        if run.kind == "unlearn":
            before |= model_names(run.config["model"], weights_of(run, "model"))
        if run.kind == "trace":
            before |= model_names(run.config["model"])
        if run.kind == "depth":
            before |= model_names(run.config["original"])
        if run.kind in ("attack", "depth"):
            retain |= model_names(run.config["retain_model"], weights_of(run, "retain_model"))
    return before, retain


def _named(axis: Any) -> str | None:
    """The class that a config chose for an axis; None in a run that is older than the axis."""
    name = axis.get("class_path") if isinstance(axis, Mapping) else axis
    return None if name is None else str(name).rpartition(".")[2]


def _part(model: Subject, before: set[str], retain: set[str]) -> Part:
    if model.unlearning is not None:
        if _named(model.unlearning.config.get("perturbation")) not in (None, "NoPerturbation"):
            return "wiped"
        scope = model.unlearning.config.get("scope") or {}
        return _CONTROLS.get(str(scope.get("use", "chosen")), "other") if scope.get("plan") else "other"
    if model.names & retain:
        return "retain_model"
    if model.names & before:
        return "reference"
    return next((part for name, part in _BUILTIN.items() if name in model.names), "other")
