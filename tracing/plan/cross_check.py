"""Does another corruption confirm a plan? On the same facts: are layers ranked alike, do the planned ones lead?

Noise puts a model where it never was, other names keep it where it was; each may mislead in a way of its own. A plan that
only one of them supports is not singled out. Compared are effects of one model on one set of facts
(`tracing.stages.trace.stage` traces them).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from lm.anatomy import Kind
from tracing.arrays import Array
from tracing.bootstrap import interval, mean_over_facts, resample_counts, weighted_means
from tracing.effects.agreement import Agreement, agreement
from tracing.effects.effects import Effects
from tracing.effects.layer_scores import LayerScores
from tracing.effects.roles import SUBJECT_ROLES, Aggregation
from tracing.plan.layer_plan import LayerPlan
from tracing.plan.verdict import verdict_with_corruptions


@dataclass(frozen=True, kw_only=True)
class _Lead:
    """By how much the planned layers' mean score exceeds that of the others."""

    margin: float
    low: float
    high: float


def confirm(
    plan: LayerPlan,
    effects: Effects,
    others: Mapping[str, Effects],
    lacking: Mapping[str, str] = {},
    *,
    roles: Sequence[str] = SUBJECT_ROLES,
    aggregation: Aggregation = "fixed",
    resamples: int = 1000,
    seed: int = 0,
) -> LayerPlan:
    """The plan with what other corruptions of the same facts say of it, in evidence (`also`), verdict, and `singled_out`.

    Badge: *reconstruction*. Another corruption *confirms* the plan if, at the plan's confidence, the layers of each planned
    module are ranked alike (the rank correlation is above zero at its lower end) and the planned layers' mean effect exceeds
    that of the other layers at the lower end of the interval. The layers were not chosen by these effects, but on the same facts:
    what is peculiar to the facts and shared by both corruptions makes the interval too kind. So this only ever takes
    `singled_out` away, for which one corruption that does not confirm is enough.

    Args:
        plan: drawn from `effects`, by `choose_layers` with the same roles and aggregation.
        others: name -> effects of the same model under another corruption.
        lacking: name -> why a corruption has no effects (nothing could be corrupted so): it cannot confirm.
    """
    confidence = float(plan.evidence["confidence"])
    mine = effects.scores(roles, aggregation)
    findings: dict[str, Any] = {name: {"confirms": False, "lacking": why} for name, why in lacking.items()}
    against = [f"{name} could not be compared: {why.rstrip('.')}" for name, why in lacking.items()]
    favor = []
    for name, other in others.items():
        theirs = other.scores(roles, aggregation)
        shared = len(set(effects.facts) & set(other.facts))
        if shared < 2:
            against.append(f"{name} has {shared} facts in common, too few to compare")
            findings[name] = {"confirms": False, "facts": shared}
            continue
        alike = {
            kind: agreement(mine, theirs, kind, confidence=confidence, resamples=resamples, seed=seed)
            for kind in mine.kinds
            if kind in theirs.kinds
        }
        lead = _lead(plan, theirs, confidence, resamples, seed)
        reasons = _doubts(name, [alike[kind] for kind in _planned(plan)], lead)
        against += reasons
        favor += [_praise(name, [alike[kind] for kind in _planned(plan)], lead)] if lead and not reasons else []
        findings[name] = {
            "confirms": not reasons,
            "facts": shared,
            "agreement": {kind: asdict(compared) for kind, compared in alike.items()},
            "planned_layers": None if lead is None else asdict(lead),
        }
    return replace(
        plan,
        singled_out=plan.singled_out and not against,
        verdict=verdict_with_corruptions(plan, against, favor),
        evidence={**plan.evidence, "also": findings},
    )


def _planned(plan: LayerPlan) -> list[Kind]:
    """The kinds of effect that stand for the planned modules."""
    kinds: list[Kind] = ["mlp", "attn"]
    return [kind for kind in kinds if kind in plan.modules] or ["resid"]


def _lead(plan: LayerPlan, theirs: LayerScores, confidence: float, resamples: int, seed: int) -> _Lead | None:
    chosen = np.isin(np.arange(theirs.layers), plan.layers)
    if chosen.all():
        return None
    scores: Array = np.sum([theirs.of(kind) for kind in _planned(plan)], axis=0)
    gaps = scores[:, chosen].mean(axis=1) - scores[:, ~chosen].mean(axis=1)
    low, high = interval(weighted_means(gaps, resample_counts(theirs.groups, resamples, seed)), confidence)
    return _Lead(margin=float(mean_over_facts(gaps)), low=float(low), high=float(high))


def _doubts(name: str, alike: Sequence[Agreement], lead: _Lead | None) -> list[str]:
    if any(np.isnan(compared.correlation) for compared in alike):  # a single layer, or effects that are all equal
        return [f"under {name} the layers have no order that could be compared"]
    if any(np.isnan(compared.low) for compared in alike):  # of one group there is no interval
        return [f"under {name} only one group of facts was traced, too few to compare"]
    doubts = [
        f"under {name} the layers' {compared.kind} effects are not shown to be ranked alike (rank correlation "
        f"{compared.correlation:.2f}, {compared.confidence:.0%} interval {compared.low:.2f} to {compared.high:.2f})"
        for compared in alike
        if not compared.low > 0
    ]
    if lead is not None and not lead.low > 0:
        doubts.append(f"under {name} these layers do not lead (by {lead.margin:.3g}, lower bound {lead.low:.3g})")
    return doubts


def _praise(name: str, alike: Sequence[Agreement], lead: _Lead) -> str:
    ranks = " and ".join(
        f"{compared.correlation:.2f} ({compared.low:.2f} to {compared.high:.2f}) for {compared.kind}"
        for compared in alike
    )
    return f"{name} confirms them: they lead by {lead.margin:.3g} ({lead.low:.3g} to {lead.high:.3g}), rank correlation {ranks}"
