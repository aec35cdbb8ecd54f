"""Stop tracing once the layers have come apart: looks at growing numbers of facts, paid for in confidence.

Facts are traced in a drawn order. After 8, 16, 32, … of them a plan is drawn, each at a confidence high enough that all looks
together have the one asked (Bonferroni): its intervals are wider, and shuffled layers must do as well in fewer shuffles. The
first plan that singles layers out ends the trace. Without a preference among layers (the null hypothesis of
`tracing.plan.permutation`) the chance that *any* look singles some out is therefore at most 1 minus the confidence asked. What is
reported is exact for the facts that were traced; finished facts come from the cache at the next look.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from tracing.effects.effects import Effects
from tracing.plan.layer_plan import LayerPlan

FIRST = 8


@dataclass(frozen=True, kw_only=True, eq=False)
class Stopped:
    """Where the looks ended."""

    effects: Effects
    plan: LayerPlan
    looks: int
    """How many were taken."""
    planned: int
    """How many there could have been."""


def looks(facts: int, first: int = FIRST) -> list[int]:
    """The numbers of facts to look at: `first`, then twice as many each time, and all `facts` at last."""
    sizes = []
    while first < facts:
        sizes.append(first)
        first *= 2
    return [*sizes, facts]


def confidence_of_each(confidence: float, planned: int) -> float:
    """The confidence of each of `planned` looks so that all of them together have `confidence` at least."""
    return 1 - (1 - confidence) / planned


def trace_until_apart(
    trace_some: Callable[[int], Effects],
    choose: Callable[[Effects, float], LayerPlan],
    facts: int,
    confidence: float,
) -> Stopped:
    """Trace more and more facts until a plan singles layers out.

    Args:
        trace_some: traces up to so many known facts, always the same ones first.
        choose: draws a plan at a confidence.
        facts: the most to trace.
        confidence: of all looks together.
    """
    sizes = looks(facts)
    each = confidence_of_each(confidence, len(sizes))
    taken = 0
    for size in sizes:
        taken += 1
        effects = trace_some(size)
        plan = choose(effects, each)
        if plan.singled_out or len(effects.facts) < size:  # apart, or there are no more known facts
            break
    said: Mapping[str, object] = {
        "looks": taken,
        "looks_planned": len(sizes),
        "confidence_of_each_look": each,
        "facts_traced": len(effects.facts),
        "facts_allowed": facts,
    }
    plan = replace(plan, evidence={**plan.evidence, "stopping": said})
    return Stopped(effects=effects, plan=plan, looks=taken, planned=len(sizes))
