"""Do two traces point to the same layers? The rank correlation of their layer scores, with an interval.

Two corruptions, two metrics or two ways to localize may each be wrong in a way of its own. Where they rank layers alike, that is
evidence beyond either alone; where they do not, neither should be quoted without the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

from lm.anatomy import Kind
from tracing.arrays import Array
from tracing.bootstrap import check_confidence, interval, mean_over_facts, resample_counts, units, weighted_means
from tracing.effects.effects import Effects
from tracing.effects.layer_scores import LayerScores, in_common
from tracing.effects.roles import SUBJECT_ROLES


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Spearman's rank correlation of the layers' mean effects in two traces.

    Attributes:
        correlation: 1: the same order of layers, -1: the reverse; NaN where one of them has no order.
        low, high: the percentile bootstrap interval over facts (those of a group drawn together); NaN with a single group. Facts
            drawn again are noisier means, which are less alike: it lies low, at times below the correlation itself.
        by_chance: the share of shuffled orders of the layers that are at least as alike; NaN where there is no order.
            Neighboring layers are alike of themselves, which shuffling destroys, so it is rather too small.
        facts: how many facts both traced.
    """

    kind: Kind
    correlation: float
    low: float
    high: float
    confidence: float
    by_chance: float
    facts: int
    layers: int

    @property
    def shown(self) -> bool:
        """Whether the two are shown to agree: the interval lies above zero, and at most 5 % of shuffled orders are as alike."""
        return self.low > 0 and self.by_chance <= 0.05

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
    """How alike two traces, or any two localizers, rank the layers of the same model, on the facts that both have.

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
        low, high = interval(_row_correlations(drawn[0], drawn[1]), confidence)
    means = [mean_over_facts(values) for values in scores]
    return Agreement(
        kind=kind,
        correlation=spearman(means[0], means[1]),
        low=float(low),
        high=float(high),
        confidence=confidence,
        by_chance=as_alike_by_chance(means[0], means[1], seed=seed),
        facts=len(groups),
        layers=both[0].layers,
    )


def spearman(one: Array, other: Array) -> float:
    """The correlation of two arrays' ranks, ties sharing the mean; NaN where one is constant or holds NaN."""
    return float(_row_correlations(one[None], other[None])[0])


def as_alike_by_chance(one: Array, other: Array, *, shuffles: int = 2000, seed: int = 0) -> float:
    """The share of shuffled orders of `other` whose rank correlation with `one` is at least its own, which counts as one of them.

    NaN where there is no correlation.
    """
    if np.isnan(spearman(one, other)):
        return float("nan")
    ranks, others = rankdata(one) - (len(one) + 1) / 2, rankdata(other)
    drawn = np.random.default_rng(seed).permuted(np.tile(others, (shuffles, 1)), axis=1) @ ranks
    return float((1 + (drawn >= others @ ranks - 1e-9).sum()) / (1 + shuffles))


def _row_correlations(one: Array, other: Array) -> Array:
    """(rows,): `spearman` of each row of one array with that of the other."""
    ranks = [rankdata(values, axis=1) - (values.shape[1] + 1) / 2 for values in (one, other)]
    length = np.sqrt((ranks[0] ** 2).sum(1) * (ranks[1] ** 2).sum(1))
    correlations = np.divide((ranks[0] * ranks[1]).sum(1), length, out=np.full(len(one), np.nan), where=length > 0)
    return np.where(np.isnan(one).any(1) | np.isnan(other).any(1), np.nan, correlations)
