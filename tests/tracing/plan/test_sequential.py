"""Looks at growing numbers of facts: when they stop, and what they cost in confidence."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_tracing import made_up

from tracing import Effects, LayerPlan, choose_layers
from tracing.plan.sequential import confidence_of_each, looks, trace_until_apart

BUMP = [0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]


def choose(effects: Effects, confidence: float) -> LayerPlan:
    return choose_layers(effects, size=2, confidence=confidence, resamples=300)


def test_looks_double_and_end_with_all() -> None:
    assert looks(5) == [5]
    assert looks(8) == [8]
    assert looks(20) == [8, 16, 20]
    assert looks(64) == [8, 16, 32, 64]
    assert confidence_of_each(0.95, 4) == pytest.approx(0.9875)


def test_a_clear_preference_stops_at_the_first_look() -> None:
    asked: list[int] = []

    def some(facts: int) -> Effects:
        asked.append(facts)
        return made_up(BUMP, facts=facts, noise=0.1)

    found = trace_until_apart(some, choose, 64, 0.95)
    assert asked == [8]
    assert found.plan.singled_out
    assert found.plan.layers == (2, 3)
    stopping = found.plan.evidence["stopping"]
    assert (stopping["looks"], stopping["looks_planned"], stopping["facts_traced"]) == (1, 4, 8)
    assert found.plan.evidence["confidence"] == stopping["confidence_of_each_look"] == pytest.approx(0.9875)


def test_none_goes_to_the_end_and_says_so() -> None:
    asked: list[int] = []

    def some(facts: int) -> Effects:
        asked.append(facts)
        return made_up([0.5] * 8, facts=facts, noise=0.5, seed=3)

    found = trace_until_apart(some, choose, 40, 0.95)
    assert asked == [8, 16, 32, 40]
    assert not found.plan.singled_out
    assert found.looks == found.planned == 4


def test_it_stops_where_the_known_facts_end() -> None:
    found = trace_until_apart(lambda facts: made_up([0.5] * 8, facts=min(facts, 11), noise=0.5), choose, 40, 0.95)
    assert found.looks == 2
    assert len(found.effects.facts) == 11


def test_looking_often_does_not_single_out_more_than_it_says() -> None:
    said = 0
    for seed in range(60):
        whole = np.random.default_rng(seed).integers(1 << 30)
        found = trace_until_apart(
            lambda facts, seed=int(whole): made_up([0.5] * 8, facts=facts, noise=0.5, seed=seed), choose, 64, 0.95
        )
        said += found.plan.singled_out
    assert said <= 5
