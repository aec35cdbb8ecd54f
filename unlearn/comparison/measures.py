"""The numbers of one model, by the names of the columns, read from its runs. A number that no run has is left out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unlearn.comparison.columns import COLUMNS
from unlearn.evaluation.lume import TERMS
from unlearn.report.runs.folders import Run
from unlearn.report.runs.models import Subject
from unlearn.report.runs.results import number_of

_RETAIN_TERMS = slice(len(TERMS) // 2, None)
_NAMES = {column.name for column in COLUMNS}


@dataclass(frozen=True, kw_only=True)
class Measures:
    """What is known of one model.

    Attributes:
        values: column -> number.
        worst_cell: where in the attack's grid the worst gap is; empty without an attack.
    """

    values: Mapping[str, float]
    worst_cell: str = ""


def measures_of(subject: Subject, base: Subject | None, retain: Subject | None, also: Sequence[str] = ()) -> Measures:
    """What is known of a model, beside the model before unlearning and the retain model.

    Args:
        subject: the model with its runs.
        base, retain: the others; None where they are not among the runs.
        also: further scores to read.
    """
    values = {
        **_scores(subject.evaluation, also),
        **_beside(subject.evaluation, base, retain),
        **_cost(subject.unlearning),
    }
    attacks = [run.json("attack.json") for run in subject.others if run.kind == "attack"]
    gaps = [attack["worst"] for attack in attacks if attack.get("worst") is not None]
    worst = max(gaps, key=lambda cell: float(cell["gap"]), default=None)
    if worst is not None:
        values["worst_gap"] = float(worst["gap"])
    left = [attack["residue"] for attack in attacks if attack.get("residue") is not None]
    most = max(left, key=lambda residue: float(residue["after"]["mean"]), default=None)
    if most is not None:
        values |= {f"residue_{when}": number_of(most[when]["mean"]) for when in ("before", "after")}
    known = {name: value for name, value in values.items() if not math.isnan(value)}
    return Measures(values=known, worst_cell="" if worst is None else _cell(worst))


def _scores(evaluation: Run | None, also: Sequence[str]) -> dict[str, float]:
    if evaluation is None:
        return {}
    scores = evaluation.json("scores.json")
    values = {
        name: number_of(scores[name]) for name in (*sorted(_NAMES), *also) if name in scores and name != "seconds"
    }
    terms = [number_of(term) for term in scores.get("terms", ())][_RETAIN_TERMS]
    applying = [term for term in terms if not math.isnan(term)]
    return values | ({"lowest_retain_term": min(applying)} if applying else {})


def _beside(evaluation: Run | None, base: Subject | None, retain: Subject | None) -> dict[str, float]:
    """What follows from two evaluations that asked the same."""
    values = {}
    if _asked_same(evaluation, base, "questions"):
        before = _score(base, "utility")
        if before > 0:
            values["utility_share"] = number_of(evaluation.json("scores.json").get("utility")) / before  # type: ignore[union-attr]
    if _asked_same(evaluation, retain, "documents"):
        scores = evaluation.json("scores.json")  # type: ignore[union-attr]
        if "mia_auc_gap" not in scores:  # an evaluation that was not told of the retain model's
            values["mia_auc_gap"] = abs(number_of(scores.get("mia_auc")) - _score(retain, "mia_auc"))
    return values


def _asked_same(evaluation: Run | None, other: Subject | None, what: str) -> bool:
    """Whether both were asked the same questions, or of the same documents; runs that do not say are taken at their word."""
    if evaluation is None or other is None or other.evaluation is None:
        return False
    asked = [(run.manifest.get("data") or {}).get(what) for run in (evaluation, other.evaluation)]
    return asked[0] == asked[1] or None in asked


def _score(subject: Subject | None, name: str) -> float:
    assert subject is not None
    assert subject.evaluation is not None
    return number_of(subject.evaluation.json("scores.json").get(name))


def _cost(unlearning: Run | None) -> dict[str, float]:
    if unlearning is None:
        return {}
    manifest = unlearning.manifest
    gpu = number_of(manifest.get("peak_gpu_bytes"))
    return {
        "seconds": number_of(manifest.get("train_seconds")),
        "memory": number_of(manifest.get("peak_memory_bytes")) / 2**30,
        "gpu_memory": gpu / 2**30 if gpu else math.nan,
        "tokens": number_of(manifest.get("tokens")),
    }


def _cell(worst: Mapping[str, Any]) -> str:
    rate = worst.get("learning_rate")
    parts = [str(worst["given"]).replace("_", " "), "" if rate is None else f"rate {rate:g}", f"{worst['steps']} steps"]
    return ", ".join(filter(None, parts))
