"""Shuffled layers: against every possible shuffle, against a t-test, and how often they reject where there is nothing."""

from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from tracing.plan.permutation import group_profiles, layer_p_values, pick_p_value, standing_out
from tracing.plan.rules import Band, Mass, Top


def test_what_is_compared_is_a_t_statistic() -> None:
    values = np.random.default_rng(0).normal(size=(9, 4))
    assert standing_out(values) == pytest.approx(ttest_1samp(values, 0).statistic)
    assert standing_out(np.zeros((3, 2))).tolist() == [0.0, 0.0]
    assert np.isfinite(standing_out(np.full((5, 2), 0.3))).all()  # no spread at all


def test_p_values_are_those_of_all_shuffles() -> None:
    """Three groups, three layers: 216 ways to deal, counted one by one."""
    profiles = np.random.default_rng(3).normal(size=(3, 3)) + np.array([0.0, 1.0, 0.3])
    above = profiles - profiles.mean(axis=1, keepdims=True)
    found = standing_out(above)
    largest, margins = [], []
    for deal in product(permutations(range(3)), repeat=3):
        dealt = np.array([profiles[group, list(order)] for group, order in enumerate(deal)])
        largest.append(standing_out(dealt - dealt.mean(axis=1, keepdims=True)).max())
        best = int(dealt.mean(axis=0).argmax())
        gaps = dealt[:, best] - np.delete(dealt, best, axis=1).mean(axis=1)
        margins.append(float(standing_out(gaps[:, None])[0]))
    exact = [(np.array(largest) >= one - 1e-12).mean() for one in found]
    assert layer_p_values(profiles, shuffles=20_000, seed=0) == pytest.approx(exact, abs=0.012)
    mine = profiles - 0.0
    best = int(mine.mean(axis=0).argmax())
    gap = float(standing_out((mine[:, best] - np.delete(mine, best, axis=1).mean(axis=1))[:, None])[0])
    assert pick_p_value(Top(1), profiles, shuffles=20_000, seed=0) == pytest.approx(
        (np.array(margins) >= gap - 1e-12).mean(), abs=0.012
    )


def test_any_layer_is_rejected_as_rarely_as_it_says() -> None:
    """Of 300 draws without a preference 5 % are 15; more than 24 come in 1 % of the cases. Scores are far from normal."""
    draw = np.random.default_rng(4)
    any_layer = a_pick = 0
    for seed in range(300):
        profiles = draw.exponential(size=(6, 8)) ** 2
        any_layer += layer_p_values(profiles, shuffles=99, seed=seed).min() <= 0.05
        a_pick += pick_p_value(Mass(0.5), profiles, shuffles=99, seed=seed) <= 0.05
    assert any_layer <= 24
    assert a_pick <= 24


def test_groups_are_dealt_whole() -> None:
    """Ten questions to each of two people are no more evidence than one to each."""
    people = np.random.default_rng(5).normal(size=(2, 6))
    asked = group_profiles(np.repeat(people, 10, axis=0), ["a"] * 10 + ["b"] * 10)
    assert asked == pytest.approx(people)
    alone = group_profiles(np.repeat(people, 10, axis=0), [""] * 20)
    assert layer_p_values(alone, shuffles=200, seed=0).min() < layer_p_values(asked, shuffles=200, seed=0).min()


def test_the_mean_over_groups_is_that_over_facts() -> None:
    scores = np.random.default_rng(6).normal(size=(5, 3))
    scores[1] = np.nan
    profiles = group_profiles(scores, ["a", "a", "", "b", "b"])
    assert profiles.shape == (3, 3)
    assert profiles.mean(axis=0) == pytest.approx(np.nanmean(scores, axis=0))
    assert group_profiles(np.full((2, 3), np.nan), ["", ""]).shape == (0, 3)


def test_where_nothing_can_be_told_p_is_one() -> None:
    one = np.array([[0.1, 0.9, 0.2]])
    assert layer_p_values(one, shuffles=50, seed=0).tolist() == [1.0] * 3
    assert pick_p_value(Band(1), one, shuffles=50, seed=0) == 1.0
    flat = np.full((6, 4), 0.3)
    assert layer_p_values(flat, shuffles=50, seed=0).tolist() == [1.0] * 4
    assert pick_p_value(Top(4), np.random.default_rng(0).normal(size=(6, 4)), shuffles=50, seed=0) == 1.0
    assert pick_p_value(Band(4), np.random.default_rng(0).normal(size=(6, 4)), shuffles=50, seed=0) == 1.0


def test_the_seed_deals() -> None:
    profiles = np.random.default_rng(7).normal(size=(8, 5)) + np.array([0, 0, 0.4, 0, 0])
    first, again = (layer_p_values(profiles, shuffles=250, seed=1) for _ in range(2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, layer_p_values(profiles, shuffles=250, seed=2))
