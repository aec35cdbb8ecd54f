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
from tracing.arrays import Array
from tracing.effects import SUBJECT_ROLES, Effects
from tracing.scores import LayerScores, in_common
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
    one: Effects | LayerScores,
    other: Effects | LayerScores,
    kind: Kind = "mlp",
    *,
    roles: Sequence[str] = SUBJECT_ROLES,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Agreement:
    """How alike two traces, or any two localisers, rank the layers of the same model, on the facts that both have.

    A layer's score is the mean over facts; of `Effects`, of a fact's mean indirect effect over the tokens of `roles`. Each
    resample draws the same facts for both. Metrics, corruptions and units may differ, since only ranks are compared.

    Raises:
        UserError: other numbers of layers, no such kind, or fewer than two facts in common.
    """
    check_confidence(confidence)
    both = in_common([each if isinstance(each, LayerScores) else each.scores(roles) for each in (one, other)])
    scores, groups = [each.of(kind) for each in both], both[0].groups
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
        facts=len(groups),
        layers=both[0].layers,
    )


def spearman(one: Array, other: Array) -> float:
    """The correlation of two arrays' ranks, ties sharing the mean; NaN where one is constant or holds NaN."""
    if np.isnan(one).any() or np.isnan(other).any() or np.ptp(one) == 0 or np.ptp(other) == 0:
        return float("nan")
    return float(np.corrcoef(rankdata(one), rankdata(other))[0, 1])
