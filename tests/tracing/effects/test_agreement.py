"""Agreement of two traces: against scipy, by hand, and where there is none."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import spearmanr
from tiny_tracing import made_up

from lm import UserError
from tracing import agreement
from tracing.effects.agreement import as_alike_by_chance, spearman

PROFILE = [0.1, 0.5, 0.3, 0.2, 0.05, 0.0]


def named(effects):  # type: ignore[no-untyped-def]
    """With prompts of their own, so that facts can be told apart."""
    facts = tuple(replace(fact, prompt=f"who is ada {index}") for index, fact in enumerate(effects.facts))
    return replace(effects, facts=facts)


def test_ranks_are_correlated_as_scipy_does() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        one, other = generator.integers(0, 6, (2, 9)).astype(float)  # with ties
        assert spearman(one, other) == pytest.approx(spearmanr(one, other).statistic)
    assert np.isnan(spearman(np.ones(4), np.arange(4.0)))
    assert np.isnan(spearman(np.array([1, np.nan, 2]), np.arange(3.0)))


def test_the_same_order_the_reverse_and_no_relation() -> None:
    one = named(made_up(PROFILE, facts=20, noise=0.01, seed=1))
    alike = agreement(one, named(made_up([2 * value + 1 for value in PROFILE], facts=20, noise=0.01, seed=2)))
    assert alike.correlation == pytest.approx(1)
    assert alike.low > 0.8
    reverse = agreement(one, named(made_up([-value for value in PROFILE], facts=20, noise=0.01, seed=3)))
    assert reverse.correlation == pytest.approx(-1)
    noise = agreement(one, named(made_up([0.0] * 6, facts=20, noise=1.0, seed=4)))
    assert noise.low < 0 < noise.high
    assert (alike.facts, alike.layers) == (20, 6)
    assert str(alike) == (
        f"mlp: rank correlation 1.00 (95% interval {alike.low:.2f} to {alike.high:.2f}) over 6 layers and 20 facts"
    )


def test_shuffled_orders_are_rarely_as_alike() -> None:
    order = np.arange(4.0)
    assert as_alike_by_chance(order, order, shuffles=20000) == pytest.approx(1 / 24, abs=0.005)
    assert as_alike_by_chance(order, -order) == 1.0
    assert as_alike_by_chance(np.arange(3.0), np.arange(3.0), shuffles=20000) == pytest.approx(1 / 6, abs=0.01)
    assert as_alike_by_chance(np.arange(16.0), np.arange(16.0)) == pytest.approx(1 / 2001)
    assert np.isnan(as_alike_by_chance(order, np.ones(4)))
    draw = np.random.default_rng(0)
    found = [as_alike_by_chance(draw.normal(size=8), draw.normal(size=8), shuffles=300) for _ in range(300)]
    assert 0.02 < np.mean(np.array(found) <= 0.05) < 0.09


def test_agreement_is_shown_by_facts_and_by_layers() -> None:
    one = named(made_up(PROFILE, facts=20, noise=0.01, seed=1))
    alike = agreement(one, named(made_up(PROFILE, facts=20, noise=0.01, seed=2)))
    assert alike.shown
    assert alike.by_chance < 0.01
    noise = agreement(one, named(made_up([0.0] * 6, facts=20, noise=1.0, seed=4)))
    assert not noise.shown  # not by facts
    few = agreement(*(named(made_up([0.3, 0.1, 0.2], facts=20, noise=0.001, seed=seed)) for seed in (1, 2)))
    assert few.low > 0.9
    assert not few.shown  # three layers come in this order once in six times


def test_only_common_facts_count_and_facts_are_matched_by_what_they_ask() -> None:
    one, other = (named(made_up(PROFILE, facts=10, noise=0.3, seed=seed)) for seed in (1, 2))
    back = np.arange(10)[::-1]
    turned = replace(
        other,
        facts=tuple(other.facts[i] for i in back),
        clean=other.clean[back],
        corrupted=other.corrupted[back],
        restored={kind: [cells[i] for i in back] for kind, cells in other.restored.items()},
    )
    assert agreement(one, other) == agreement(one, turned)
    few = replace(
        other,
        facts=other.facts[:4],
        clean=other.clean[:4],
        corrupted=other.corrupted[:4],
        restored={kind: cells[:4] for kind, cells in other.restored.items()},
        tokens=other.tokens[:4],
        subject_spans=other.subject_spans[:4],
    )
    assert agreement(one, few).facts == 4
    assert agreement(one, few).correlation == agreement(few, one).correlation


def test_one_group_has_no_interval() -> None:
    one = named(made_up(PROFILE, facts=5, groups=1))
    found = agreement(one, one)
    assert found.correlation == pytest.approx(1)
    assert np.isnan([found.low, found.high]).all()


def test_what_cannot_be_compared_is_refused() -> None:
    one = named(made_up(PROFILE))
    with pytest.raises(UserError, match="3 and 6 layers"):
        agreement(one, named(made_up([0.1, 0.2, 0.3])))
    with pytest.raises(UserError, match="0 facts in common"):
        agreement(one, made_up(PROFILE))
    with pytest.raises(UserError, match="does not score 'attn'"):
        agreement(one, one, "attn")
