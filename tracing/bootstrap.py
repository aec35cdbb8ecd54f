"""Resampling facts: how far a mean over facts can be trusted.

Pure numpy, seeded by the caller. Facts that share a group (the questions about one person share their subject tokens
and their noise) are not independent, so whole groups are drawn; facts without a group are drawn one by one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lm.errors import UserError
from tracing.arrays import Array


def check_confidence(confidence: float) -> None:
    """Raise UserError unless 0 < confidence < 1."""
    if not 0 < confidence < 1:
        raise UserError(f"the confidence is {confidence}: give a number between 0 and 1 (0.95 is usual)")


def units(groups: Sequence[str]) -> npt.NDArray[np.int64]:
    """The number of the sampling unit of each fact: facts of one group share it, a fact without a group has its own."""
    numbers: dict[object, int] = {}
    keys: list[object] = [group or index for index, group in enumerate(groups)]
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)


def resample_counts(groups: Sequence[str], resamples: int, seed: int) -> Array:
    """How often each fact is drawn in each bootstrap resample: (resamples, facts)."""
    unit = units(groups)
    count = int(unit.max()) + 1
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    return drawn[:, unit].astype(np.float64)


def bootstrap(
    values: Array, groups: Sequence[str], *, confidence: float, resamples: int = 1000, seed: int = 0
) -> tuple[Array, Array]:
    """The percentile bootstrap interval of the means over facts, (facts, ...) -> (...) each; facts of a group are drawn together.

    NaN where fewer than two groups have a value: of one there is nothing to draw, and an interval of no width would look certain.
    """
    low, high = interval(weighted_means(values, resample_counts(groups, resamples, seed)), confidence)
    alone = _of_one_group(values, groups)
    return np.where(alone, np.nan, low), np.where(alone, np.nan, high)


def share_of(values: Array, total: Array | float) -> Array:
    """`values / total`; NaN where the total is not above zero, or too near it for a number: nothing is a share of nothing."""
    with np.errstate(all="ignore"):
        share = np.asarray(values / np.asarray(total, dtype=np.float64))
    return np.where((np.asarray(total) > 0) & np.isfinite(share), share, np.nan)


def shares(
    values: Array, totals: Array, groups: Sequence[str], *, confidence: float, resamples: int = 1000, seed: int = 0
) -> tuple[Array, Array, Array]:
    """(share, low, high), (...) each: the mean of the values, (facts, ...), over the mean of the same facts' totals, (facts,).

    A share of averages, not an average of shares: a fact of which the corruption took next to nothing has a share of any size,
    and would outweigh all others. The interval is the percentile bootstrap's of the ratio, groups of facts drawn together.

    NaN where the mean total is not above zero; intervals also where it is not in some resample, or only one group has a value.
    """
    taken = np.where(np.isnan(values), np.nan, totals.reshape(-1, *[1] * (values.ndim - 1)))
    share = share_of(mean_over_facts(values), mean_over_facts(taken))
    counts = resample_counts(groups, resamples, seed)
    means = weighted_means(values, counts)
    drawn = share_of(means, weighted_means(taken, counts))
    low, high = interval(drawn, confidence)
    unsure = np.isnan(share) | (np.isnan(drawn) & ~np.isnan(means)).any(axis=0) | _of_one_group(values, groups)
    return share, np.where(unsure, np.nan, low), np.where(unsure, np.nan, high)


def _of_one_group(values: Array, groups: Sequence[str]) -> npt.NDArray[np.bool_]:
    """(...): where fewer than two groups of facts have a value, (facts, ...)."""
    unit, present = units(groups), ~np.isnan(values)
    told = np.sum([present[unit == one].any(axis=0) for one in set(unit.tolist())], axis=0)
    return np.asarray(told < 2)


def weighted_means(values: Array, counts: Array) -> Array:
    """Means over facts for each resample, leaving out facts that have no value.

    Args:
        values: (facts, ...), NaN where a fact has none.
        counts: (resamples, facts).

    Returns:
        (resamples, ...), NaN where no drawn fact has a value.
    """
    flat = values.reshape(len(values), -1)
    present = ~np.isnan(flat)
    total = counts @ np.where(present, flat, 0.0)
    number = counts @ present.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        means: Array = total / number
    return means.reshape(len(counts), *values.shape[1:])


def mean_over_facts(values: Array) -> Array:
    """The mean over the facts that have a value: (facts, ...) -> (...), NaN where none has."""
    means: Array = weighted_means(values, np.ones((1, len(values))))[0]
    return means


def interval(samples: Array, confidence: float) -> tuple[Array, Array]:
    """The percentile interval over resamples (axis 0), leaving out resamples without a value; NaN where all lack it."""
    tail = 50 * (1 - confidence)
    empty = np.isnan(samples).all(axis=0)
    safe = np.where(empty, 0.0, samples)
    low, high = np.nanpercentile(safe, [tail, 100 - tail], axis=0)
    return np.where(empty, np.nan, low), np.where(empty, np.nan, high)
