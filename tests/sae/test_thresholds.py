"""Thresholds: the running average against a plain loop, calibration against counts, held-out L0 one token at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lm import UserError
from sae import (
    RunningThreshold,
    SparseCode,
    by_threshold,
    calibrate_features,
    calibrate_mutual,
    feature_choice,
    mutual_choice,
    smallest_chosen,
)

FEATURES, K = 64, 4


def sample(seed: int, tokens: int) -> Tensor:
    """Affinities of features with different scales and offsets."""
    generator = torch.Generator().manual_seed(seed)
    shape = torch.Generator().manual_seed(99)
    scale, offset = torch.rand(FEATURES, generator=shape) + 0.5, torch.rand(FEATURES, generator=shape) + 0.3
    return (torch.randn(tokens, FEATURES, generator=generator) - offset) * scale


def test_the_smallest_chosen_values() -> None:
    dense = torch.tensor([[0.0, 3.0, 2.0], [0.0, 1.0, 5.0]])
    code = SparseCode.from_dense(dense)
    assert float(smallest_chosen(code, per_feature=False)) == 1
    assert smallest_chosen(code, per_feature=True).tolist() == [math.inf, 1, 2]
    zero = SparseCode.from_dense(dense[:, :1])
    assert math.isinf(float(smallest_chosen(zero, per_feature=False)))
    listed_zero = code.with_values(torch.zeros(4))
    assert math.isinf(float(smallest_chosen(listed_zero, per_feature=False)))


def test_the_running_average_is_the_plain_one_and_skips_batches_without_activations() -> None:
    one, each = RunningThreshold.start(), RunningThreshold.start(3)
    batches = [[[0.0, 2.0, 4.0]], [[0.0, 0.0, 0.0]], [[0.0, 1.0, 0.0]], [[0.0, 3.0, 8.0]]]
    for batch in batches:
        code = SparseCode.from_dense(torch.tensor(batch))
        one, each = one.update(code, rate=0.25), each.update(code, rate=0.25)
    by_hand = 2.0
    for smallest in (1.0, 3.0):
        by_hand += 0.25 * (smallest - by_hand)
    assert float(one.value) == by_hand
    assert each.value.tolist() == [math.inf, by_hand, 5.0]
    assert one.value.dtype == torch.float64


def test_a_feature_that_never_fired_does_not_fire_at_inference() -> None:
    each = RunningThreshold.start(2).update(SparseCode.from_dense(torch.tensor([[0.0, 1.0]])))
    assert by_threshold(torch.tensor([[100.0, 1.5]]), each.value).to_dense().tolist() == [[0.0, 1.5]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_calibration_meets_its_sample_exactly(dtype: torch.dtype) -> None:
    affinity = sample(0, 200).to(dtype)
    assert by_threshold(affinity, calibrate_mutual(affinity, k=K)).matches == K * 200
    budgets = torch.arange(FEATURES) % 5
    code = by_threshold(affinity, calibrate_features(affinity, budgets))
    assert torch.equal(code.feature_counts(), budgets)
    assert float(calibrate_mutual(affinity, k=FEATURES)) == 0
    assert calibrate_features(affinity, 200).tolist() == [0] * FEATURES


def test_held_out_l0_is_k_within_three_percent_one_token_at_a_time() -> None:
    train, held_out = sample(1, 4000), sample(2, 2000)
    budgets = torch.full((FEATURES,), K * 4000 // FEATURES)
    running = RunningThreshold.start()
    for batch in sample(3, 64 * 256).split(256):
        running = running.update(mutual_choice(batch, K * 256), rate=0.05)
    for threshold in (calibrate_mutual(train, k=K), calibrate_features(train, budgets), running.value):
        counts = [by_threshold(token.unsqueeze(0), threshold).matches for token in held_out]
        assert sum(counts) / len(counts) == pytest.approx(K, rel=0.03)
        assert by_threshold(held_out, threshold).matches == sum(counts)


def test_the_running_thresholds_of_features_stand_where_feature_choice_cuts() -> None:
    each = RunningThreshold.start(FEATURES)
    batches = [feature_choice(batch, 16) for batch in sample(3, 64 * 256).split(256)]
    for code in batches:
        each = each.update(code, rate=0.05)
    l0 = by_threshold(sample(4, 4000), each.value).matches / 4000
    assert 0.9 * K < l0 < K * 1.01
    lows = torch.stack([smallest_chosen(code, per_feature=True) for code in batches])
    assert bool(((each.value >= lows.amin(0)) & (each.value <= lows.amax(0))).all())


def test_bad_input_is_refused() -> None:
    code = mutual_choice(sample(0, 4), 8)
    with pytest.raises(UserError, match="rate"):
        RunningThreshold.start().update(code, rate=0)
    with pytest.raises(UserError, match="start them anew"):
        RunningThreshold.start(3).update(code)
    with pytest.raises(UserError, match="no token"):
        calibrate_mutual(sample(0, 0), k=2)
