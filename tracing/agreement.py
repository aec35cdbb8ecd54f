"""Do two traces point to the same layers? The rank correlation of their layer scores, with an interval.

Two corruptions, two metrics or two ways to localise may each be wrong in a way of its own. Where they rank layers alike, that is
evidence beyond either alone; where they do not, neither should be quoted without the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

from lm.anatomy import Kind
from lm.errors import UserError
from tracing.arrays import Array
from tracing.choose import layer_scores
from tracing.effects import SUBJECT_ROLES, Effects
from tracing.statistics import check_confidence, interval, mean_over_facts, resample_counts, units, weighted_means


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Spearman's rank correlation of the layers' mean effects in two traces.

    Attributes:
        correlation: 1: the same order of layers, -1: the reverse; NaN where one of them has no order.
        low, high: the percentile bootstrap interval over facts (those of a group drawn together); NaN with a single group.
        facts: how many facts both traced.
    """

    kind: Kind
    correlation: float
    low: float
    high: float
    confidence: float
    facts: int
    layers: int

    def __str__(self) -> str:
        return (
            f"{self.kind}: rank correlation {self.correlation:.2f} ({self.confidence:.0%} interval {self.low:.2f} to "
            f"{self.high:.2f}) over {self.layers} layers and {self.facts} facts"
        )


def agreement(
    one: Effects,
    other: Effects,
    kind: Kind = "mlp",
    *,
    roles: Sequence[str] = SUBJECT_ROLES,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Agreement:
    """How alike two traces of the same model rank its layers, on the facts that both have.

    A layer's score is the mean over facts of its mean indirect effect over the tokens of `roles`; each resample draws the same
    facts for both. The metrics and corruptions may differ, since only ranks are compared.

    Raises:
        UserError: other numbers of layers, no such kind, or fewer than two facts in common.
    """
    check_confidence(confidence)
    if one.layers != other.layers:
        raise UserError(
            f"effects over {one.layers} and {other.layers} layers are of different models; trace one model twice."
        )
    places = {(fact.prompt, fact.subject): index for index, fact in enumerate(other.facts)}
    both = [
        (mine, places[fact.prompt, fact.subject])
        for mine, fact in enumerate(one.facts)
        if (fact.prompt, fact.subject) in places
    ]
    if len(both) < 2:
        raise UserError(
            f"the two traces have {len(both)} facts in common; trace the same ones (max_facts may cut others off)."
        )
    chosen = np.array(both)
    scores = [layer_scores(each, kind, roles)[chosen[:, place]] for place, each in enumerate((one, other))]
    groups = [one.facts[mine].group for mine, _ in both]
    low, high = np.array(np.nan), np.array(np.nan)  # of one group there is nothing to draw
    if len(set(units(groups).tolist())) > 1:
        drawn = [weighted_means(values, resample_counts(groups, resamples, seed)) for values in scores]
        low, high = interval(np.array([spearman(a, b) for a, b in zip(*drawn, strict=True)]), confidence)
    return Agreement(
        kind=kind,
        correlation=spearman(*(mean_over_facts(values) for values in scores)),
        low=float(low),
        high=float(high),
        confidence=confidence,
        facts=len(both),
        layers=one.layers,
    )


def spearman(one: Array, other: Array) -> float:
    """The correlation of two arrays' ranks, ties sharing the mean; NaN where one is constant or holds NaN."""
    if np.isnan(one).any() or np.isnan(other).any() or np.ptp(one) == 0 or np.ptp(other) == 0:
        return float("nan")
    return float(np.corrcoef(rankdata(one), rankdata(other))[0, 1])
