"""The plan's verdict: whether the evidence singles layers out, as a sentence with numbers. All of them are written here.

Pure functions from numbers to words; where the numbers come from is `tracing.plan.evidence` (one trace),
`tracing.plan.cross_check` (other corruptions) and `tracing.plan.combined` (several localizers).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tracing.effects.roles import SUBJECT_ROLES
from tracing.plan.layer_plan import LayerPlan, layer_names
from tracing.plan.rules import Rule


def verdict(
    layers: Sequence[int],
    against: Sequence[str],
    favor: str,
    *,
    part: float | None,
    restored: str,
    roles: Sequence[str],
) -> str:
    """The verdict on a pick from one trace, or from another localizer's scores.

    Args:
        layers: the pick.
        against: what speaks against it; nothing where the evidence singles it out.
        favor: what speaks for it.
        part: how much of what the corruption took its best layer brings back; None where scores are a part of nothing.
        restored: what is restored there.
        roles: the token roles that count.
    """
    several, name = len(layers) > 1, layer_names(layers)
    if against:
        has = "have" if several else "has"
        return f"The evidence does not single out layers: {name} {has} the largest effect, but {'; '.join(against)}."
    sentence = f"The evidence singles out {name}: {favor}."
    if part is None:
        return sentence
    where = "one subject token" if set(roles) <= set(SUBJECT_ROLES) else f"one token ({', '.join(roles)})"
    return (
        f"{sentence} Restoring {restored} in {'the best of them' if several else 'it'} at {where} "
        f"brings back {part:.0%} of what the corruption took, on average."
    )


def verdict_with_corruptions(plan: LayerPlan, against: Sequence[str], favor: Sequence[str]) -> str:
    """The plan's verdict with what other corruptions say of it: `against`, or else `favor`."""
    if not against:
        return " ".join([plan.verdict, *(f"{reason}." for reason in favor)])
    if not plan.singled_out:
        return f"{plan.verdict} Besides, {'; '.join(against)}."
    has = "have" if len(plan.layers) > 1 else "has"
    return (
        f"The evidence does not single out layers: {layer_names(plan.layers)} {has} the largest effect and would be singled out "
        f"by {plan.evidence['source']} alone, but the corruptions disagree: {'; '.join(against)}."
    )


def verdict_of_localizers(plan: LayerPlan, disagreements: Sequence[str], pairs: int) -> str:
    """The verdict on a plan by mean rank, of whose `pairs` of localizers some do not agree: a sentence each, the worst first."""
    several = len(plan.layers) > 1
    name = f"layers {plan.layers[0]}-{plan.layers[-1]}" if several else f"layer {plan.layers[0]}"
    own = "" if plan.singled_out else f" Nor are they apart by mean rank. {plan.verdict}"
    return (
        f"The localizers do not agree, so no layers are singled out: {len(disagreements)} of {pairs} pairs are not shown to rank "
        f"layers alike, least of all {'; '.join(disagreements[:3])}. By mean rank {name} {'come' if several else 'comes'} "
        f"first.{own}"
    )


def verdict_without(plan: LayerPlan, refused: Sequence[str]) -> str:
    """The verdict with the localizers that gave no scores."""
    return f"{plan.verdict} Without {' and '.join(refused)}, which gave no scores."


@dataclass(frozen=True, kw_only=True)
class PickWords:
    """What the numbers of a rule's pick come to."""

    rule: Rule
    numbers: Mapping[str, Any]
    confidence: float
    stability: float

    def favor(self, *, several: bool) -> str:
        """What speaks for the pick."""
        rule, numbers = self.rule, self.numbers
        margin, low, high = (
            float("nan") if numbers[name] is None else numbers[name] for name in ("margin", "margin_low", "margin_high")
        )
        return (
            f"{'their' if several else 'its'} {rule.measure} exceeds the mean of the {rule.rivals} by {margin:.3g} "
            f"({self.confidence:.0%} interval {low:.3g} to {high:.3g}), {rule.again} in "
            f"{numbers['stable_share']:.0%} of the resamples, and {numbers['held_out_share']:.0%} agree on held-out facts "
            f"({numbers['facts']} facts)"
        )

    def against(self) -> list[str]:
        """What speaks against it."""
        rule, numbers = self.rule, self.numbers
        reasons = _no_effect(numbers, self.confidence)
        if not numbers["margin_low"] > 0:
            reasons.append(
                f"it does not beat the mean of the {rule.rivals} (lower {self.confidence:.0%} bound {numbers['margin_low']:.3g})"
            )
        if numbers["stable_share"] < self.stability:
            reasons.append(
                f"{rule.again} in only {numbers['stable_share']:.0%} of the resamples ({self.stability:.0%} asked)"
            )
        if numbers["held_out_share"] < self.stability:
            reasons.append(
                f"on facts held out of the choice the pick wins in only {numbers['held_out_share']:.0%} of the resamples "
                f"({self.stability:.0%} asked)"
            )
        if numbers["shuffled_p"] > 1 - self.confidence + 1e-12:
            reasons.append(
                f"shuffled layers do as well too often (p = {numbers['shuffled_p']:.3g}, at most {1 - self.confidence:.3g} asked)"
            )
        return reasons


@dataclass(frozen=True, kw_only=True)
class PermutationWords:
    """What the numbers of the permutation test come to; `worst`: the largest p-value of the picked layers."""

    numbers: Mapping[str, Any]
    worst: float
    confidence: float

    def favor(self, *, several: bool) -> str:
        """What speaks for the pick."""
        return (
            f"{'each stands' if several else 'it stands'} out from shuffled layers (p {'up to' if several else '='} "
            f"{self.worst:.3g}, corrected for multiple comparisons over all {len(self.numbers['p_values'])} layers; "
            f"{self.numbers['facts']} facts)"
        )

    def against(self) -> list[str]:
        """What speaks against it."""
        level = self.numbers["level"]
        if self.worst > level + 1e-12:
            return [f"it does not stand out from shuffled layers (p = {self.worst:.3g}, at most {level:.3g} asked)"]
        return _no_effect(self.numbers, self.confidence)


def too_few(numbers: Mapping[str, Any], chosen: int, layers: int) -> list[str]:
    """Why nothing can be said of `chosen` of `layers` layers; empty where something can."""
    if chosen == layers:
        return [f"the plan takes all {layers} layers, so there is nothing to compare with"]
    if numbers["units"] < 3:
        return [f"only {numbers['units']} independent group(s) of facts were traced, at least 3 are needed"]
    return []


def too_little(part: float | None, least: float) -> list[str]:
    """Why the best layer does not matter; empty if it does, or if its score is a part of nothing."""
    if part is None or part >= least:
        return []
    return [f"the best layer brings back only {part:.1%} of what the corruption took ({least:.0%} asked)"]


def _no_effect(numbers: Mapping[str, Any], confidence: float) -> list[str]:
    if numbers["score_low"] > 0:
        return []
    return [f"its effect is not above zero (lower {confidence:.0%} bound {numbers['score_low']:.3g})"]
