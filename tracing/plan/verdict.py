"""How sure is a pick of layers? Numbers from resampled, held-out and shuffled facts, and what they come to in a sentence.

Nothing is picked here (`tracing.plan.rules`) and no plan is made (`tracing.plan.choose`).
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


@dataclass(frozen=True, kw_only=True)
class Asked:
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


def judge(rule: Rule, scores: Array, groups: Sequence[str], counts: Array, asked: Asked, seed: int) -> Judged:
    """The pick of a rule, and how well it holds when facts are drawn anew, held out, or their layers shuffled.

    Args:
        scores: (facts, layers), NaN rows for facts that say nothing.
        counts: (resamples, facts), how often each fact is drawn; no resample without a value.
    """
    means, drawn = mean_over_facts(scores), weighted_means(scores, counts)
    chosen, again = rule.pick(means), rule.pick(drawn)
    layers = tuple(int(layer) for layer in np.flatnonzero(chosen))
    rest = len(layers) < len(means)
    margin = float(rule.margin(means, chosen))
    low, high = interval(rule.margin(drawn, np.broadcast_to(chosen, drawn.shape)), asked.confidence)
    unseen = weighted_means(scores, (counts == 0).astype(np.float64))
    held_out = rule.margin(unseen, again)
    held_out = held_out[~np.isnan(held_out)]
    alike = (again & chosen).sum(axis=1) >= 0.75 * np.maximum(again.sum(axis=1), len(layers))
    found: dict[str, Any] = {
        **_common(scores, groups, counts, layers, asked),
        "margin": margin if rest else None,
        "margin_low": float(low) if rest else None,
        "margin_high": float(high) if rest else None,
        "same_share": float((again == chosen).all(axis=1).mean()),
        "stable_share": float(alike.mean()),
        "held_out_share": float((held_out > 0).mean()) if len(held_out) else 0.0,
        "shuffled_p": pick_p_value(rule, group_profiles(scores, groups), shuffles=len(counts), seed=seed),
    }
    against = _too_few(found, len(layers), len(means)) or _weak(found, rule, asked)
    favor = (
        f"{'their' if len(layers) > 1 else 'its'} {rule.measure} exceeds the mean of the {rule.rivals} by {margin:.3g} "
        f"({asked.confidence:.0%} interval {low:.3g} to {high:.3g}), {rule.again} in "
        f"{found['stable_share']:.0%} of the resamples, and {found['held_out_share']:.0%} agree on held-out facts "
        f"({found['facts']} facts)"
    )
    return Judged(layers=layers, numbers=found, against=against, favor=favor)


def judge_by_permutation(scores: Array, groups: Sequence[str], counts: Array, asked: Asked, seed: int) -> Judged:
    """The layers that stand out from shuffled ones at the confidence asked; if none does, the one that comes nearest."""
    p_values = layer_p_values(group_profiles(scores, groups), shuffles=len(counts), seed=seed)
    level = 1 - asked.confidence
    nearest = int(np.lexsort((-mean_over_facts(scores), p_values))[0])
    layers = tuple(int(layer) for layer in np.flatnonzero(p_values <= level + 1e-12)) or (nearest,)
    worst = float(p_values[list(layers)].max())
    found: dict[str, Any] = {
        **_common(scores, groups, counts, layers, asked),
        "p_values": p_values.tolist(),
        "level": level,
        "shuffles": len(counts),
    }
    if (against := _too_few(found, len(layers), scores.shape[1])) == [] and worst > level + 1e-12:
        against.append(f"it does not stand out from shuffled layers (p = {worst:.3g}, at most {level:.3g} asked)")
    against = against or _small(found, asked)
    favor = (
        f"{'each stands' if len(layers) > 1 else 'it stands'} out from shuffled layers (p {'up to' if len(layers) > 1 else '='} "
        f"{worst:.3g}, adjusted for all {len(p_values)} layers; {found['facts']} facts)"
    )
    return Judged(layers=layers, numbers=found, against=against, favor=favor)


def _common(
    scores: Array, groups: Sequence[str], counts: Array, layers: tuple[int, ...], asked: Asked
) -> dict[str, Any]:
    own = weighted_means(scores, counts)[:, list(layers)].sum(axis=1)
    return {
        "units": int(units(groups).max()) + 1,
        "facts": len(scores),
        "score_low": float(interval(own, asked.confidence)[0]),
    }


def _too_few(found: Mapping[str, Any], chosen: int, layers: int) -> list[str]:
    if chosen == layers:
        return [f"the plan takes all {layers} layers, so there is nothing to compare with"]
    if found["units"] < 3:
        return [f"only {found['units']} independent group(s) of facts were traced, at least 3 are needed"]
    return []


def _small(found: Mapping[str, Any], asked: Asked) -> list[str]:
    if found["score_low"] > 0:
        return []
    return [f"its effect is not above zero (lower {asked.confidence:.0%} bound {found['score_low']:.3g})"]


def _weak(found: Mapping[str, Any], rule: Rule, asked: Asked) -> list[str]:
    reasons = _small(found, asked)
    if not found["margin_low"] > 0:
        reasons.append(
            f"it does not beat the mean of the {rule.rivals} (lower {asked.confidence:.0%} bound {found['margin_low']:.3g})"
        )
    if found["stable_share"] < asked.stability:
        reasons.append(
            f"{rule.again} in only {found['stable_share']:.0%} of the resamples ({asked.stability:.0%} asked)"
        )
    if found["held_out_share"] < asked.stability:
        reasons.append(
            f"on facts held out of the choice the pick wins in only {found['held_out_share']:.0%} of the resamples "
            f"({asked.stability:.0%} asked)"
        )
    if found["shuffled_p"] > 1 - asked.confidence + 1e-12:
        reasons.append(
            f"shuffled layers do as well too often (p = {found['shuffled_p']:.3g}, at most {1 - asked.confidence:.3g} asked)"
        )
    return reasons
