"""How sure is a pick of layers? Numbers from resampled, held-out and shuffled facts.

Nothing is picked here (`tracing.plan.rules`), no plan is made (`tracing.plan.choose`), and what the numbers come to in words is
`tracing.plan.verdict`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tracing.arrays import Array
from tracing.bootstrap import interval, mean_over_facts, units, weighted_means
from tracing.plan.permutation import group_profiles, layer_p_values, pick_p_value
from tracing.plan.rules import Rule
from tracing.plan.verdict import PermutationWords, PickWords, too_few


@dataclass(frozen=True, kw_only=True)
class Required:
    """What a pick must show to count as singled out."""

    confidence: float
    stability: float


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A pick, the numbers behind it, what speaks against it (nothing, if the evidence singles it out), and what for it."""

    layers: tuple[int, ...]
    numbers: Mapping[str, Any]
    against: Sequence[str]
    favor: str


def judge(rule: Rule, scores: Array, groups: Sequence[str], counts: Array, required: Required, seed: int) -> Judged:
    """The pick of a rule, and how well it holds when facts are drawn anew, held out, or their layers shuffled.

    Args:
        scores: (facts, layers), NaN rows for facts that say nothing.
        counts: (resamples, facts), how often each fact is drawn; no resample without a value.
    """
    means, drawn = mean_over_facts(scores), weighted_means(scores, counts)
    chosen, drawn_again = rule.pick(means), rule.pick(drawn)
    layers = tuple(int(layer) for layer in np.flatnonzero(chosen))
    rest = len(layers) < len(means)
    margin = float(rule.margin(means, chosen))
    low, high = interval(rule.margin(drawn, np.broadcast_to(chosen, drawn.shape)), required.confidence)
    unseen = weighted_means(scores, (counts == 0).astype(np.float64))
    held_out = rule.margin(unseen, drawn_again)
    held_out = held_out[~np.isnan(held_out)]
    alike = (drawn_again & chosen).sum(axis=1) >= 0.75 * np.maximum(drawn_again.sum(axis=1), len(layers))
    numbers: dict[str, Any] = {
        **_common(scores, groups, counts, layers, required),
        "margin": margin if rest else None,
        "margin_low": float(low) if rest else None,
        "margin_high": float(high) if rest else None,
        "same_share": float((drawn_again == chosen).all(axis=1).mean()),
        "stable_share": float(alike.mean()),
        "held_out_share": float((held_out > 0).mean()) if len(held_out) else 0.0,
        "shuffled_p": pick_p_value(rule, group_profiles(scores, groups), shuffles=len(counts), seed=seed),
    }
    words = PickWords(rule=rule, numbers=numbers, confidence=required.confidence, stability=required.stability)
    against = too_few(numbers, len(layers), len(means)) or words.against()
    return Judged(layers=layers, numbers=numbers, against=against, favor=words.favor(several=len(layers) > 1))


def judge_by_permutation(scores: Array, groups: Sequence[str], counts: Array, required: Required, seed: int) -> Judged:
    """The layers that stand out from shuffled ones at the confidence asked; if none does, the one that comes nearest."""
    p_values = layer_p_values(group_profiles(scores, groups), shuffles=len(counts), seed=seed)
    level = 1 - required.confidence
    nearest = int(np.lexsort((-mean_over_facts(scores), p_values))[0])
    layers = tuple(int(layer) for layer in np.flatnonzero(p_values <= level + 1e-12)) or (nearest,)
    worst = float(p_values[list(layers)].max())
    numbers: dict[str, Any] = {
        **_common(scores, groups, counts, layers, required),
        "p_values": p_values.tolist(),
        "level": level,
        "shuffles": len(counts),
    }
    words = PermutationWords(numbers=numbers, worst=worst, confidence=required.confidence)
    against = too_few(numbers, len(layers), scores.shape[1]) or words.against()
    favor = words.favor(several=len(layers) > 1)
    return Judged(layers=layers, numbers=numbers, against=against, favor=favor)


def _common(
    scores: Array, groups: Sequence[str], counts: Array, layers: tuple[int, ...], required: Required
) -> dict[str, Any]:
    own = weighted_means(scores, counts)[:, list(layers)].sum(axis=1)
    return {
        "units": int(units(groups).max()) + 1,
        "facts": len(scores),
        "score_low": float(interval(own, required.confidence)[0]),
    }
