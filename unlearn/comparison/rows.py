"""From run folders to rows: which runs are one method, which model is the base and which the retain model, what failed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lm.config import as_of_today
from lm.errors import UserError
from unlearn.comparison.config import CompareConfig
from unlearn.comparison.failures import Failure, failures
from unlearn.comparison.measures import Measures, measures_of
from unlearn.config import UnlearnConfig
from unlearn.report.runs.collect import command_of, short_name
from unlearn.report.runs.folders import Run, find_runs
from unlearn.report.runs.models import Subject, model_names, named_by, subjects, weights_of
from unlearn.report.runs.stages import CONFIGS

Part = Literal["base", "retain_model", "method"]
_NAMES: dict[Part, str] = {"base": "before unlearning", "retain_model": "retain model"}
_FREE = ("out", "resume", "trackers")
"""Settings of a run from which no number follows."""


@dataclass(kw_only=True)
class Row:
    """One method, or a model to compare with.

    Attributes:
        name: what it is called.
        part: what it is.
        seeds: of each model that was made: its seeds, as text; empty for a model that no run made.
        folders: the runs of each.
        measures: the numbers of each.
        failed: runs of the same method that did not end: (seeds, why).
        commands: what makes and scores each again.
    """

    name: str
    part: Part
    seeds: list[str] = field(default_factory=list)
    folders: list[list[str]] = field(default_factory=list)
    measures: list[Measures] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)

    def values(self, column: str) -> list[float | None]:
        """Of each model, None where it is not known."""
        return [each.values.get(column) for each in self.measures]

    @property
    def worst_cell(self) -> str:
        """Of the model with the largest gap."""
        attacked = [each for each in self.measures if "worst_gap" in each.values]
        return max(attacked, key=lambda each: each.values["worst_gap"]).worst_cell if attacked else ""


@dataclass(frozen=True, kw_only=True)
class Found:
    """The rows, base and retain model first, and the evaluations and attacks behind them."""

    rows: tuple[Row, ...]
    evaluations: Mapping[str, Run]
    attacks: tuple[Run, ...]


def find_rows(config: CompareConfig) -> Found:
    """Read the runs.

    Raises:
        UserError: a folder that holds no run, two runs of one method with one seed, a label for what is not there.
    """
    failed = failures(config.runs)
    references = [name for name in (config.base, config.retain_model) if name is not None]
    runs = find_runs([*_with_runs(config.runs, failed), *references])
    models = subjects([run for run in runs if run.kind in ("unlearn", "evaluate", "attack")])
    parts = [_part(model, runs, config) for model in models]
    rows: dict[str, Row] = {}
    order = [*_NAMES, "method"]
    for model, part in sorted(zip(models, parts, strict=True), key=lambda each: order.index(each[1])):
        base, retain = (_beside(model, models, parts, of) for of in ("base", "retain_model"))
        settings = {} if model.unlearning is None else model.unlearning.config
        row = rows.setdefault(_key(settings, model.path), Row(name=_NAMES.get(part, _name(model)), part=part))
        seeds = _seeds(settings)
        if seeds in row.seeds and model.unlearning is not None:
            first = row.folders[row.seeds.index(seeds)][0]
            raise UserError(f"{first} and {model.folders[0]} are the same method with the same seed: give one of them")
        row.seeds.append(seeds)
        row.folders.append(list(map(str, model.folders)))
        row.measures.append(measures_of(model, base, retain, config.also))
        row.commands += [
            command_of(run) for run in (model.unlearning, model.evaluation, *model.others) if run is not None
        ]
        row.failed += [(seeds, each.why) for each in failed if each.folder.resolve() in _resolved(model)]
    known = {folder for model in models for folder in _resolved(model)}
    for failure in failed:
        if failure.folder.resolve() not in known:
            settings = failure.settings or {}
            name = _folder_name(failure.folder)
            row = rows.setdefault(_key(settings, str(failure.folder)), Row(name=name, part="method"))
            row.failed.append((_seeds(settings), failure.why))
            row.folders.append([str(failure.folder)])
    _label(list(rows.values()), config.labels or {})
    evaluations = {str(model.folders[0]): model.evaluation for model in models if model.evaluation is not None}
    attacks = tuple(run for run in runs if run.kind == "attack")
    return Found(rows=tuple(rows.values()), evaluations=evaluations, attacks=attacks)


def _with_runs(folders: Sequence[str], failed: Sequence[Failure]) -> list[str]:
    """The folders, without those in which all that there is has failed."""
    kept = []
    for name in folders:
        try:
            find_runs([name])
        except UserError:
            inside = Path(name).resolve()
            if not any(inside in (failure.folder.resolve(), *failure.folder.resolve().parents) for failure in failed):
                raise
        else:
            kept.append(name)
    return kept


def _part(model: Subject, runs: Sequence[Run], config: CompareConfig) -> Part:
    given = [(config.base, "base"), (config.retain_model, "retain_model")]
    for folder, part in given:
        if folder is not None and Path(folder).resolve() in _resolved(model):
            return part  # type: ignore[return-value]
    before, retain = named_by(runs)
    made = model.unlearning is not None and _class(model.unlearning.config.get("objective")) != "Learn"
    if model.names & retain and not made:
        return "retain_model"
    return "base" if model.names & before and not made else "method"


def _class(axis: object) -> str:
    name = axis.get("class_path") if isinstance(axis, Mapping) else axis
    return str(name).rpartition(".")[2]


def _beside(model: Subject, models: Sequence[Subject], parts: Sequence[Part], part: str) -> Subject | None:
    """The base or the retain model of a model: the one that its runs name, or else the only one."""
    known = [each for each, of in zip(models, parts, strict=True) if of == part]
    named: set[str] = set()
    if part == "base" and model.unlearning is not None:
        named = model_names(model.unlearning.config["model"], weights_of(model.unlearning, "model"))
    if part == "retain_model":
        for run in model.others:
            if run.kind == "attack":
                named |= model_names(run.config["retain_model"], weights_of(run, "retain_model"))
    own = [each for each in known if each.names & named]
    return own[0] if own else known[0] if len(known) == 1 else None


def _resolved(model: Subject) -> set[Path]:
    return {folder.resolve() for folder in model.folders}


def _key(settings: Mapping[str, Any], path: str) -> str:
    """What tells a method from others: its settings without the seeds; a model that no run made is known by its path."""
    if not settings:
        return path
    today = as_of_today(dict(settings), CONFIGS["unlearn"])
    return json.dumps(
        _without({name: value for name, value in today.items() if name not in _FREE}, "seed"), sort_keys=True
    )


def _without(value: Any, name: str) -> Any:
    if isinstance(value, Mapping):
        return {key: _without(inner, name) for key, inner in value.items() if key != name}
    return [_without(inner, name) for inner in value] if isinstance(value, list) else value


def _seeds(settings: Mapping[str, Any]) -> str:
    """All seeds in the settings of a run, as text: the trainer's alone where no other is given."""
    today = as_of_today(dict(settings), UnlearnConfig) if settings else {}
    seeds = [value for value in _named(today, "seed") if value is not None]
    return ", ".join(map(str, dict.fromkeys(seeds)))


def _named(value: Any, name: str) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key == name:
                yield inner
            else:
                yield from _named(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _named(inner, name)


def _name(model: Subject) -> str:
    return short_name(model) if model.unlearning is None else _folder_name(model.unlearning.folder)


def _folder_name(folder: Path) -> str:
    """A run's folder; of a folder that is named after a seed, the one it is in."""
    resolved = folder.resolve()
    return resolved.parent.name if resolved.name.startswith("seed-") else resolved.name


def _label(rows: Sequence[Row], labels: Mapping[str, str]) -> None:
    """Give rows the names that were given, and tell those apart that have one name."""
    given = {Path(folder).resolve(): label for folder, label in labels.items()}
    folders = [{Path(each).resolve() for group in row.folders for each in group} for row in rows]
    for folder in given:
        if not any(folder in own for own in folders):
            raise UserError(f"labels names {folder}, which is none of the runs: name the folder of a run in the table")
    for row, own in zip(rows, folders, strict=True):
        row.name = next((label for folder, label in given.items() if folder in own), row.name)
    names = [row.name for row in rows]
    for row in rows:
        if names.count(row.name) > 1:
            row.name = f"{row.name} ({row.folders[0][0]})"
