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
        raise UserError(f"the confidence is {confidence}; give a number between 0 and 1 (0.95 is usual).")


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
    unit, present = units(groups), ~np.isnan(values)
    told = np.sum([present[unit == one].any(axis=0) for one in set(unit.tolist())], axis=0)
    return np.where(told < 2, np.nan, low), np.where(told < 2, np.nan, high)


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
