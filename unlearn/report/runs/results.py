"""What the runs about a model came to, as the report's records: attacks, depth, what is left where it was stored."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lm.errors import UserError
from tracing.effects.before_after import difference
from tracing.effects.effects import Effects
from unlearn.attacks.comparison.audit import GROUPS, MEASURES
from unlearn.report.records import Attacked, AttackTrial, Audited, Depth, Estimate, ReportModel, Retraced
from unlearn.report.runs.folders import Run
from unlearn.report.runs.models import Subject


def traced_after(
    subject: Subject, model: ReportModel, trace: Run | None, evaluations: Mapping[str, Run], several: bool
) -> list[Retraced]:
    """What changed in the traces of a model, apart for the facts to forget and those to keep."""
    retraced = []
    for run in subject.others:
        if run.kind != "retrace":
            continue
        before, after = Effects.load(_before(run, trace)), Effects.load(run.folder / "effects.npz")
        forgotten = {row["id"] for each in evaluations.values() for row in each.rows("forget.jsonl")}
        confidence, seed = float(run.config.get("confidence", 0.95)), int(run.config.get("seed", 0))
        sides = {"Facts to forget": True, "Facts to keep": False} if forgotten else {"All facts": False}
        for name, side in sides.items():
            chosen = [at for at, fact in enumerate(before.facts) if (fact.id in forgotten) is side]
            if chosen:
                change = difference(before.some(chosen), after.some(chosen), confidence=confidence, seed=seed)
                retraced.append(Retraced(label=f"{name} in “{model.label}”" if several else name, found=change))
    return retraced


def _before(run: Run, trace: Run | None) -> Path:
    """The effects that a run compares with: those of the trace in the report if they are the same, else where it read them."""
    named = Path(str(run.config["before"]))
    for path in [*([trace.folder / "effects.npz"] if trace is not None else []), named / "effects.npz", named]:
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == run.manifest.get("before"):
            return path
    raise UserError(
        f"{run.folder} compares with the trace {named}, which is not there as it was: add that run, or leave this out"
    )


def attacks_on(subject: Subject, model: ReportModel) -> list[Attacked]:
    """What attacks on a model brought back."""
    attacks = []
    for run in subject.others:
        if run.kind == "attack":
            result = run.json("attack.json")
            chosen = run.config.get("attack")
            name = str(chosen.get("class_path") if isinstance(chosen, Mapping) else chosen).rpartition(".")[2]
            trials = tuple(_trial(trial) for trial in result["trials"])
            worst = result.get("worst")  # younger than the first attacks
            attacks.append(
                Attacked(
                    label=model.label,
                    attack=name,
                    unit=str(result["unit"]),
                    trials=trials,
                    worst=None if worst is None else _worst(worst, result["trials"]),
                    worst_sentence="" if worst is None else str(worst["sentence"]),
                    audit=_audit(result),
                )
            )
    return attacks


def with_attacks(model: ReportModel, attacks: Sequence[Attacked]) -> ReportModel:
    """The model with what the attacks on it came to, the largest of each; NaN where none tells."""
    gaps = [attacked.gap[0] for attacked in attacks if attacked.gap is not None]
    audits = [attacked.audit for attacked in attacks if attacked.audit is not None]
    left = [audit.residue[1][0] for audit in audits if audit.residue is not None]
    return replace(model, relearned=max(gaps, default=math.nan), residue_nats=max(left, default=math.nan))


def _worst(worst: Mapping[str, Any], trials: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    where = (worst["given"], worst["learning_rate"])
    place = [(trial["name"], trial["learning_rate"]) for trial in trials].index(where)
    return place, trials[place]["levels"].index(worst["steps"])


def _audit(result: Mapping[str, Any]) -> Audited | None:
    """The audit of the trials that leave most, or without a residue the first; attacks of before there were audits have none."""
    left = result.get("residue")
    where = None if left is None else (left["given"], left["learning_rate"])
    for trial in result["trials"]:
        audit = trial.get("audit")
        if audit is not None and where in (None, (trial["name"], trial["learning_rate"])):
            groups = audit["groups"]
            measured: dict[str, dict[str, tuple[tuple[Estimate, Estimate], ...]]] = {
                model: {
                    measure: tuple(
                        (_estimate(group[model][measure]["before"]), _estimate(group[model][measure]["after"]))
                        for group in groups.values()
                    )
                    for measure in MEASURES
                }
                for model in ("unlearned", "retain_model")
            }
            names = tuple((GROUPS[group], int(asked["people"])) for group, asked in groups.items())
            return Audited(
                sentence=str(audit["sentence"]),
                groups=names,
                unlearned=measured["unlearned"],
                retain_model=measured["retain_model"],
                residue=None if left is None else (_estimate(left["before"]), _estimate(left["after"])),
            )
    return None


def _estimate(numbers: Mapping[str, Any]) -> Estimate:
    mean, low, high = _numbers([numbers[name] for name in ("mean", "low", "high")])
    return mean, low, high


def _trial(trial: Mapping[str, Any]) -> AttackTrial:
    curves = trial["curves"]
    return AttackTrial(
        name=str(trial.get("title", trial["name"])),
        verdict=str(trial["verdict"]),
        sentence=str(trial.get("sentence") or f"{trial['name']}: {trial['why']} {trial['likelihood']}"),
        levels=tuple(float(level) for level in trial["levels"]),
        unlearned=_numbers(curves["unlearned"]["all"]),
        retain_model=_numbers(_of_retain_model(curves)["all"]),
        low=_numbers(trial["difference"]["low"]),
        high=_numbers(trial["difference"]["high"]),
    )


def depths_of(subject: Subject, model: ReportModel) -> list[Depth]:
    """How deep unlearning went in a model."""
    depths = []
    for run in subject.others:
        if run.kind == "depth":
            result = run.json("depth.json")
            lost = result["lost_by_layer"]
            depths.append(
                Depth(
                    label=model.label,
                    sentence=str(result["sentence"]),
                    unlearned=_numbers(lost["changed"]),
                    retain_model=_numbers(_of_retain_model(lost)),
                )
            )
    return depths


def _of_retain_model(values: Mapping[str, Any]) -> Any:
    """What is said of the retain model, also by a file from when it was called `never`."""
    return values["retain_model"] if "retain_model" in values else values["never"]


def number_of(value: Any) -> float:
    """A number of a JSON file; NaN for null and for what is none."""
    return float(value) if isinstance(value, int | float) else math.nan


def _numbers(values: Sequence[Any]) -> tuple[float, ...]:
    return tuple(map(number_of, values))
