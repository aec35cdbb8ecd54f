"""Do layers stand out at all? Permutation tests that shuffle the layers within every group of facts.

**The null hypothesis**: in each group of facts (one person's questions; a fact without a group stands alone), independently of
the others, the layers are exchangeable: whichever scores the group has, each way to deal them to the layers was equally likely.
No layer is then preferred. Under it the chance of a p-value of at most a is at most a, exactly, whatever the scores'
distribution and however many layers or sets of layers there were to look at, for whatever is looked at is looked at again in each
shuffle. (Of the p-values of single layers: the chance that *any* of them is; Westfall and Young's single-step maximum.)

Layers of equal mean but very unequal spread are not this null. What is compared is therefore divided by its standard error over
groups, which keeps the level roughly; with fewer than some twenty groups not quite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from tracing.arrays import Array
from tracing.bootstrap import units
from tracing.plan.rules import Rule

_AT_ONCE = 100  # shuffles


def layer_p_values(profiles: Array, *, shuffles: int, seed: int) -> Array:
    """The p-value of each layer for standing above the mean of the layers, adjusted for looking at all of them.

    Args:
        profiles: (groups, layers), from `group_profiles`.
        shuffles: how many; no p-value is below 1 / (shuffles + 1).

    Returns:
        (layers,); all 1 with fewer than two groups, where nothing can be told.
    """
    return _p_values(lambda given: standing_out(given - given.mean(axis=-1, keepdims=True)), profiles, shuffles, seed)


def pick_p_value(rule: Rule, profiles: Array, *, shuffles: int, seed: int) -> float:
    """How often a rule picks, of shuffled layers, ones that beat what it leaves by as much.

    Compared is the rule's margin as a t-statistic over groups. 1 with fewer than two groups, or if the rule picks all layers.
    """

    def of(given: Array) -> Array:
        chosen = np.broadcast_to(rule.pick(given.mean(axis=-2))[..., None, :], given.shape)
        return np.nan_to_num(standing_out(rule.margin(given, chosen)[..., None]))

    return float(_p_values(of, profiles, shuffles, seed)[0])


def group_profiles(scores: Array, groups: Sequence[str]) -> Array:
    """(groups, layers): each group's mean scores, weighted so that the mean over groups is the mean over facts; facts with NaN
    are left out."""
    known = np.asarray(~np.isnan(scores).any(axis=1))
    unit = units([group for group, one in zip(groups, known.tolist(), strict=True) if one])
    sums = np.zeros((int(unit.max(initial=-1)) + 1, scores.shape[1]))
    np.add.at(sums, unit, scores[known])
    return np.asarray(sums * len(sums) / max(1, len(unit)))


def standing_out(values: Array) -> Array:
    """The t-statistic of a mean over groups: (..., groups, n) -> (..., n); 0 where all values are."""
    count = values.shape[-2]
    rounding = 1e-9 * np.abs(values).max(axis=-2)
    error = np.sqrt(values.var(axis=-2, ddof=1) / count + rounding**2)
    mean = values.mean(axis=-2)
    return np.asarray(np.divide(mean, error, out=np.zeros_like(mean), where=error > 0))


def _p_values(statistic: Callable[[Array], Array], profiles: Array, shuffles: int, seed: int) -> Array:
    """Of each of n statistics, compared with the largest of the n in each shuffle."""
    if len(profiles) < 2:
        return np.ones(profiles.shape[1])
    found = statistic(profiles)
    level = found - 1e-9 * np.maximum(1, np.abs(found))  # the same sum in another order is a tie, not a win
    beaten = np.zeros(len(found))
    for dealt in _dealt(profiles, shuffles, seed):
        beaten += (statistic(dealt).max(axis=-1)[:, None] >= level).sum(axis=0)
    return np.asarray((1 + beaten) / (1 + shuffles))


def _dealt(profiles: Array, shuffles: int, seed: int) -> Iterator[Array]:
    draw = np.random.default_rng(seed)
    for start in range(0, shuffles, _AT_ONCE):
        count = min(_AT_ONCE, shuffles - start)
        yield draw.permuted(np.broadcast_to(profiles, (count, *profiles.shape)), axis=2)
