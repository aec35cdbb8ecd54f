"""The three-way audit: what one model makes of people it forgot, people it kept, and people it never saw. Pure numpy.

What is forgotten should look like what was never seen, before an attack and after it. The two are compared within each task and
kind of rows, since a phone number is harder to guess than a town; and what the retain model, which saw neither, makes of them is
taken away. Badge: **reconstruction**: the field compares retained, forgotten and never-seen; this measure of it is the project's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from tracing.arrays import Array
from tracing.bootstrap import interval, resample_counts, units, weighted_means
from unlearn.attacks.comparison.curves import plain

Group = Literal["forgotten", "retained", "unseen"]
GROUPS: dict[Group, str] = {"forgotten": "forgotten", "retained": "retained", "unseen": "never seen"}
Measure = Literal["log_probability", "score"]
MEASURES: dict[Measure, str] = {"log_probability": "nats a token", "score": "score"}
MODELS = {"unlearned": "unlearned", "retain_model": "retain model"}
WHEN = ("before", "after")
_RESAMPLES = 1000
Estimate = tuple[float, float, float]
"""A mean and the ends of its interval."""


@dataclass(frozen=True, kw_only=True, eq=False)
class People:
    """Rows of one group, asked before the attack and at its end.

    Attributes:
        documents, cells: of each row the person, and its task and kind.
        values: model -> measure -> (rows, 2): before and after; NaN for a model that is not there.
    """

    documents: tuple[str, ...]
    cells: tuple[tuple[str, str], ...]
    values: Mapping[str, Mapping[Measure, Array]]


@dataclass(frozen=True)
class Residue:
    """How much likelier forgotten answers are than never-seen ones, in nats a token, at one time.

    Attributes:
        mean: of the unlearned model, less the same of the retain model.
        low, high: the interval of `mean` over people; NaN where a side has fewer than two.
        unlearned, retain_model: the two differences.
    """

    mean: float
    low: float
    high: float
    unlearned: float
    retain_model: float

    def to_json(self) -> dict[str, float | None]:
        """As plain data; null for what is not defined."""
        return dict(zip(vars(self), plain(vars(self).values()), strict=True))


@dataclass(frozen=True, kw_only=True, eq=False)
class Audit:
    """Three groups of people under one attack.

    Every mean is taken within each task and kind, and then over these, weighted by how many forgotten rows each has: all three
    groups are weighted alike. A task and kind without a never-seen row is left out.

    Attributes:
        title: what the attacker had (`Comparison.title`).
        groups: the rows of each.
        confidence, seed: of the intervals over people, whose rows are drawn together, the groups each by itself.
    """

    title: str
    groups: Mapping[Group, People]
    confidence: float = 0.95
    seed: int = 0

    @cached_property
    def weights(self) -> dict[tuple[str, str], int]:
        """How many forgotten rows there are of each task and kind that never-seen rows have too."""
        cells = self.groups["forgotten"].cells
        return {cell: cells.count(cell) for cell in sorted(set(cells) & set(self.groups["unseen"].cells))}

    @property
    def left_out(self) -> int:
        """How many forgotten rows are of a task and kind without a never-seen row."""
        return len(self.groups["forgotten"].cells) - sum(self.weights.values())

    def mean(self, group: Group, model: str, measure: Measure, when: int) -> Estimate:
        """(mean, low, high) of a group's rows; `when` is 0 before the attack and 1 after it."""
        by_cell = self._by_cell(group, self.groups[group].values[model][measure][:, when])
        return self._estimate(by_cell, [group])

    def residue(self, when: int) -> Residue:
        """Forgotten less never seen, of the unlearned model less the retain model."""
        own = [self._difference(model, when) for model in MODELS]
        mean, low, high = self._estimate(own[0] - own[1], ["forgotten", "unseen"])
        return Residue(mean, low, high, *(self._over_cells(each[:1]).item() for each in own))

    def _difference(self, model: str, when: int) -> Array:
        forgotten, unseen = (
            self._by_cell(group, self.groups[group].values[model]["log_probability"][:, when])
            for group in ("forgotten", "unseen")
        )
        return forgotten - unseen

    def _by_cell(self, group: Group, values: Array) -> Array:
        """(1 + resamples, cells): the mean within each, first of all rows, then of each resample; NaN where none is drawn."""
        people = self.groups[group]
        means = []
        for cell in self.weights:
            chosen = np.array([each == cell for each in people.cells], dtype=bool)
            if not chosen.any():
                means.append(np.full(1 + _RESAMPLES, np.nan))
                continue
            drawn = np.concatenate([np.ones((1, len(chosen))), self._counts[group]])
            means.append(weighted_means(values[chosen], drawn[:, chosen]))
        return np.stack(means, axis=1)

    @cached_property
    def _counts(self) -> dict[Group, Array]:
        """How often each row of a group is drawn: (resamples, rows)."""
        return {
            group: resample_counts(people.documents, _RESAMPLES, self.seed + place)
            for place, (group, people) in enumerate(self.groups.items())
            if people.documents
        }

    def _over_cells(self, by_cell: Array) -> Array:
        """(draws, cells) -> (draws,): cells without a value are left out."""
        weights = np.where(np.isnan(by_cell), 0.0, np.array(list(self.weights.values()), dtype=np.float64))
        with np.errstate(invalid="ignore"):
            means: Array = (weights * np.nan_to_num(by_cell)).sum(axis=1) / weights.sum(axis=1)
        return means

    def _estimate(self, by_cell: Array, groups: Sequence[Group]) -> Estimate:
        means = self._over_cells(by_cell)
        if any(self.people(group) < 2 for group in groups) or np.isnan(means[0]):
            return float(means[0]), np.nan, np.nan
        low, high = interval(means[1:], self.confidence)
        return float(means[0]), float(low), float(high)

    def people(self, group: Group) -> int:
        """How many documents a group has."""
        documents = self.groups[group].documents
        return int(units(documents).max()) + 1 if documents else 0

    @property
    def sentence(self) -> str:
        """What the audit found, in two sentences."""
        before, after = self.residue(0), self.residue(1)
        scores = [self.mean(group, "unlearned", "score", 1)[0] for group in GROUPS]
        said = ", ".join(
            f"{score:.2f} for the {name}"
            for score, name in zip(scores, GROUPS.values(), strict=True)
            if not np.isnan(score)
        )
        right = f"Its score is then {said}."
        title = self.title.replace("_", " ")
        own = f"After the attack ({title}) forgotten answers are {_likelier(after.unlearned)} than those of people it never saw"
        if np.isnan(after.mean):
            return f"{own}; how much of that is the rows' doing, only a retain model could tell. {right}"
        beside = f" (the retain model: {after.retain_model:+.2f})"
        return f"{own}{beside}: a residue of {self._said(after)}; before it, {self._said(before)}. {right}"

    def _said(self, residue: Residue) -> str:
        known = not np.isnan(residue.low)
        ends = f" ({self.confidence:.0%} interval {residue.low:+.2f} to {residue.high:+.2f})" if known else ""
        return f"{residue.mean:+.2f}{ends}"

    def table(self) -> str:
        """Each group's means before and after, of both models, as text."""
        models = [model for model in MODELS if model == "unlearned" or not self._alone]
        heads = [f"{MODELS[model]}, {when}" for model in models for when in WHEN]
        lines = [" " * 26 + "".join(f"{head:>26}" for head in heads)]
        for measure, unit in MEASURES.items():
            for group, name in GROUPS.items():
                cells = [_cell(self.mean(group, model, measure, when)) for model in models for when in (0, 1)]
                lines.append(f"{f'{unit}, {name}':>26}" + "".join(f"{cell:>26}" for cell in cells))
        return "\n".join(lines)

    @property
    def _alone(self) -> bool:
        return bool(np.isnan(self.groups["forgotten"].values["retain_model"]["score"]).all())

    def to_json(self) -> dict[str, Any]:
        """Everything as plain data; null for what is not defined."""
        groups = {
            group: {
                "rows": len(people.cells),
                "people": self.people(group),
                **{
                    model: {
                        measure: {
                            when: dict(
                                zip(("mean", "low", "high"), plain(self.mean(group, model, measure, at)), strict=True)
                            )
                            for at, when in enumerate(WHEN)
                        }
                        for measure in MEASURES
                    }
                    for model in MODELS
                },
            }
            for group, people in self.groups.items()
        }
        residue = {when: self.residue(at).to_json() for at, when in enumerate(WHEN)}
        return {"groups": groups, "residue": residue, "left_out": self.left_out, "sentence": self.sentence}


def _likelier(nats: float) -> str:
    return f"{abs(nats):.2f} nats a token {'likelier' if nats >= 0 else 'less likely'}"


def _cell(estimate: Estimate) -> str:
    mean, low, high = estimate
    if np.isnan(mean):
        return "-"
    return f"{mean:.2f}" + ("" if np.isnan(low) else f" ({low:.2f} to {high:.2f})")
