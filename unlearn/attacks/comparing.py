"""From answers to numbers: the curves of both models, and the audit of three groups, as means over trials. No model here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lm.data.rows import Row
from lm.errors import UserError
from unlearn.attacks.answers import Answer
from unlearn.attacks.base import Attack, Trial
from unlearn.attacks.comparison.audit import MEASURES, MODELS, Audit, Group, People
from unlearn.attacks.comparison.curves import Comparison, mean_over_trials
from unlearn.attacks.others import Others

UNLEARNED, RETAIN = MODELS
Curve = dict[str, list[Answer]]
"""Row id -> its answer at each level; of a row beside the forgotten ones, before the attack and at its end."""


@dataclass(frozen=True)
class Done:
    """A trial, and the curves of each model in it."""

    trial: Trial
    curves: Mapping[str, Curve]


def curve_of(trial: Trial, before: Curve, later: Sequence[Sequence[Answer]]) -> Curve:
    """The curve of one model: what it answered before, and at each level above 0.

    Raises:
        UserError: an attack that did not ask the rows beside the forgotten ones.
    """
    by_id = [{answer.id: answer for answer in level} for level in later]
    missing = [row.id for row in trial.beside if row.id not in by_id[-1]]
    if missing:
        raise UserError(
            f"the attack did not ask row {missing[0]}, which is beside the forgotten ones (Trial.beside), at its last level: let "
            "it do so, or leave unseen out"
        )
    asked = {row.id: [*before[row.id], *(level[row.id] for level in by_id)] for row in trial.asked}
    return asked | {row.id: [*before[row.id], by_id[-1][row.id]] for row in trial.beside}


def compare(
    attack: Attack, forget: Sequence[Row], done: Sequence[Done], *, margin: float, confidence: float
) -> Comparison:
    """The curves of both models in the trials of one name and variant, means over the trials; NaN for a retain model that is not
    there."""
    rows = _asked(forget, done)
    trial = done[0].trial
    return Comparison(
        name=trial.name,
        variant=trial.variant,
        learning_rate=trial.learning_rate,
        levels=attack.levels,
        ids=tuple(row.id for row in rows),
        documents=tuple(row.document for row in rows),
        kinds=tuple(str(row.kind) for row in rows),
        unlearned=_mean(done, rows, UNLEARNED, "score", len(attack.levels)),
        retain_model=_mean(done, rows, RETAIN, "score", len(attack.levels)),
        unlearned_log=_mean(done, rows, UNLEARNED, "log_probability", len(attack.levels)),
        retain_model_log=_mean(done, rows, RETAIN, "log_probability", len(attack.levels)),
        given=sum(len(each.trial.given) for each in done) / len(done),
        told=sum(each.trial.told for each in done) / len(done),
        margin=margin,
        confidence=confidence,
    )


def audit_of(
    comparison: Comparison, forget: Sequence[Row], others: Others, done: Sequence[Done], *, confidence: float
) -> Audit | None:
    """The audit of the same trials; None where nobody was asked beside the forgotten."""
    beside = {row.id for each in done for row in each.trial.beside}
    groups: dict[Group, list[Row]] = {
        "forgotten": _asked(forget, done),
        "retained": [row for row in others.retained if row.id in beside],
        "unseen": [row for row in others.unseen if row.id in beside],
    }
    cells = [{(row.task, row.kind) for row in groups[name]} for name in ("forgotten", "unseen")]
    if not cells[0] & cells[1]:
        return None
    return Audit(
        title=comparison.title,
        groups={name: _people(done, rows, len(comparison.levels)) for name, rows in groups.items()},
        confidence=confidence,
    )


def _people(done: Sequence[Done], rows: Sequence[Row], levels: int) -> People:
    def ends(model: str, measure: str) -> Any:
        if not rows:
            return np.empty((0, 2))
        return _mean(done, rows, model, measure, levels)[:, [0, -1]]

    return People(
        documents=tuple(row.document for row in rows),
        cells=tuple((row.task, str(row.kind)) for row in rows),
        values={model: {measure: ends(model, measure) for measure in MEASURES} for model in MODELS},
    )


def _asked(forget: Sequence[Row], done: Sequence[Done]) -> list[Row]:
    asked = {row.id for each in done for row in each.trial.asked}
    return [row for row in forget if row.id in asked]


def _mean(done: Sequence[Done], rows: Sequence[Row], model: str, what: str, levels: int) -> Any:
    """(rows, levels of their curves): for each row the mean over the trials that asked it."""
    if model not in done[0].curves:
        return np.full((len(rows), levels), np.nan)
    trials = [
        {row: [getattr(answer, what) for answer in answers] for row, answers in each.curves[model].items()}
        for each in done
    ]
    return mean_over_trials(trials, [row.id for row in rows])
