"""Every allocation against a slow oracle in plain Python: exact counts, ties cut by index, every float type."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sae.topk
from lm import UserError
from sae import batch_topk, by_threshold, feature_choice, mutual_choice, token_choice

TYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
Match = tuple[int, int]


@st.composite
def affinities(draw: st.DrawFn) -> Tensor:
    """Small matrices, most of them full of ties: few distinct values, constants, zeros, or plain random numbers."""
    tokens, features = draw(st.integers(1, 7)), draw(st.integers(1, 9))
    dtype = draw(st.sampled_from(TYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    noise = torch.randn(tokens, features, generator=generator)
    kind = draw(st.sampled_from(["random", "few values", "positive few", "constant", "none positive", "extreme"]))
    if kind == "few values":
        noise = noise.round()
    elif kind == "positive few":
        noise = noise.abs().ceil()
    elif kind == "constant":
        noise = torch.full_like(noise, 0.7)
    elif kind == "none positive":
        noise = -noise.abs().floor()
    elif kind == "extreme":
        choices = torch.tensor([math.inf, -math.inf, 3e-5, 1e-42, 3e-42, 6e4, 1.0, -0.0, 0.0, 1 + 2**-20])
        noise = choices[torch.randint(len(choices), noise.shape, generator=generator)]
    values = noise.to(dtype)
    return values.T.contiguous().T if draw(st.booleans()) else values


def best(candidates: list[Match], values: list[list[float]], budget: int) -> set[Match]:
    """The `budget` largest positive candidates; among equals, those that stand first in the list."""
    positive = [match for match in candidates if values[match[0]][match[1]] > 0]
    return set(sorted(positive, key=lambda match: -values[match[0]][match[1]])[:budget])


def token_oracle(affinity: Tensor, k: int) -> set[Match]:
    values, (tokens, features) = affinity.tolist(), affinity.shape
    return set().union(*(best([(t, f) for f in range(features)], values, k) for t in range(tokens)))


def feature_oracle(affinity: Tensor, budgets: list[int]) -> set[Match]:
    values, (tokens, features) = affinity.tolist(), affinity.shape
    return set().union(*(best([(t, f) for t in range(tokens)], values, budgets[f]) for f in range(features)))


def mutual_oracle(affinity: Tensor, budget: int) -> set[Match]:
    tokens, features = affinity.shape
    return best([(t, f) for t in range(tokens) for f in range(features)], affinity.tolist(), budget)


def matches(code: sae.SparseCode, affinity: Tensor) -> set[Match]:
    """The chosen matches, after checking that the code is well formed and carries the affinities themselves."""
    code.check()
    assert (code.tokens, code.features) == affinity.shape
    assert code.values.dtype == affinity.dtype
    assert torch.equal(code.values, affinity[code.token_ids(), code.indices])
    assert bool((code.values > 0).all())
    return set(zip(code.token_ids().tolist(), code.indices.tolist(), strict=True))


@settings(max_examples=200, deadline=None)
@given(affinities(), st.integers(0, 12))
def test_token_choice_is_exact(affinity: Tensor, k: int) -> None:
    code = token_choice(affinity, k)
    assert matches(code, affinity) == token_oracle(affinity, k)
    assert torch.equal(code.token_counts(), (affinity > 0).sum(1).clamp(max=k))


@settings(max_examples=200, deadline=None)
@given(affinities(), st.data())
def test_feature_choice_is_exact_for_any_budgets(affinity: Tensor, data: st.DataObject) -> None:
    count = affinity.shape[1]
    budgets = data.draw(st.lists(st.integers(0, 9), min_size=count, max_size=count))
    code = feature_choice(affinity, torch.tensor(budgets))
    assert matches(code, affinity) == feature_oracle(affinity, budgets)
    assert torch.equal(code.feature_counts(), torch.minimum((affinity > 0).sum(0), torch.tensor(budgets)))
    same = data.draw(st.integers(0, 9))
    assert matches(feature_choice(affinity, same), affinity) == feature_oracle(affinity, [same] * count)


@settings(max_examples=200, deadline=None)
@given(affinities(), st.integers(0, 70))
def test_mutual_choice_is_exact(affinity: Tensor, budget: int) -> None:
    code = mutual_choice(affinity, budget)
    assert matches(code, affinity) == mutual_oracle(affinity, budget)
    assert code.matches == min(budget, int((affinity > 0).sum()))


@settings(max_examples=100, deadline=None)
@given(affinities(), st.integers(0, 12), st.sampled_from([1, 5, 16]))
def test_looking_at_small_chunks_changes_nothing(affinity: Tensor, k: int, chunk: int) -> None:
    budget = k * affinity.shape[0]
    whole = sae.topk._CHUNK
    try:
        sae.topk._CHUNK = chunk
        assert matches(mutual_choice(affinity, budget), affinity) == mutual_oracle(affinity, budget)
        assert matches(token_choice(affinity, k), affinity) == token_oracle(affinity, k)
    finally:
        sae.topk._CHUNK = whole


@settings(max_examples=100, deadline=None)
@given(affinities(), st.integers(1, 9))
def test_batch_topk_is_mutual_choice_and_has_the_published_values(affinity: Tensor, k: int) -> None:
    """The published form: ReLU, flatten, topk of k x tokens, scatter back. Its ties fall anywhere, its values do not."""
    code = batch_topk(affinity, k)
    assert torch.equal(code.to_dense(), mutual_choice(affinity, k * affinity.shape[0]).to_dense())
    flat = affinity.relu().flatten()
    top = flat.topk(min(k * affinity.shape[0], flat.numel()))
    published = torch.zeros_like(flat).scatter(0, top.indices, top.values).view_as(affinity)
    if top.values[-1] == 0 or int((flat >= top.values[-1]).sum()) == top.values.numel():
        assert torch.equal(code.to_dense(), published)
    assert torch.equal(code.values.sort().values, published[published > 0].sort().values)


@pytest.mark.parametrize("dtype", TYPES)
def test_all_equal_input_is_cut_by_index(dtype: torch.dtype) -> None:
    ones = torch.ones(4, 6, dtype=dtype)
    assert token_choice(ones, 2).indices.tolist() == [0, 1] * 4
    assert feature_choice(ones, 2).token_ids().tolist() == [0] * 6 + [1] * 6
    assert mutual_choice(ones, 8).indices.tolist() == [0, 1, 2, 3, 4, 5, 0, 1]
    assert mutual_choice(ones, 8).token_ids().tolist() == [0] * 6 + [1] * 2


@pytest.mark.parametrize("dtype", TYPES)
def test_more_budget_than_positives_one_token_one_feature_and_no_token(dtype: torch.dtype) -> None:
    few = torch.tensor([[1.0, -1.0, 0.0], [0.0, 2.0, -3.0]], dtype=dtype)
    for code in (token_choice(few, 99), feature_choice(few, 99), mutual_choice(few, 99), by_threshold(few, 0.0)):
        assert torch.equal(code.to_dense(), few.relu())
    for column in (few[:, :1], few[:1], few[:0]):
        for code in (token_choice(column, 1), feature_choice(column, 2), mutual_choice(column, 3)):
            assert torch.equal(code.check().to_dense(), column.relu())


def test_large_bf16_batches_have_exact_counts_in_spite_of_ties() -> None:
    """Half of the rows of such a batch tie at the cut: a threshold comparison would choose too many."""
    affinity = torch.randn(128, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    tokens = token_choice(affinity, 16)
    top = affinity.topk(17).values
    assert int((top[:, 15] == top[:, 16]).sum()) > 10
    assert tokens.token_counts().tolist() == [16] * 128
    assert feature_choice(affinity, 4).feature_counts().tolist() == [4] * 512
    mutual = mutual_choice(affinity, 16 * 128)
    assert mutual.matches == 16 * 128
    dense = affinity.float().flatten()
    by_hand = torch.sort(dense, descending=True, stable=True).indices[: 16 * 128].sort().values
    assert torch.equal(mutual.token_ids() * 512 + mutual.indices, by_hand)


def first_largest(row: Tensor, budget: int) -> Tensor:
    """Places of the `budget` largest positive entries, ties to the earlier, by a stable sort."""
    places = torch.sort(row.double(), descending=True, stable=True).indices[:budget]
    return places[row[places] > 0].sort().values


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", ["random", "ties", "constant", "few positive", "one token outdoes all"])
@pytest.mark.parametrize(("tokens", "features"), [(24, 800), (301, 157)])
@pytest.mark.parametrize("columns_first", [False, True])
def test_wide_batches_are_searched_by_groups_and_exact(
    dtype: torch.dtype, kind: str, tokens: int, features: int, columns_first: bool
) -> None:
    values = torch.randn(tokens, features, generator=torch.Generator().manual_seed(7))
    if kind == "ties":
        values = values.round(decimals=1)
    elif kind == "constant":
        values = torch.full_like(values, 0.3)
    elif kind == "few positive":
        values = values - 2.5
    elif kind == "one token outdoes all":
        values[5] += 100
    affinity = values.to(dtype).T.contiguous().T if columns_first else values.to(dtype)
    for k in (1, 3, 9):
        chosen = token_choice(affinity, k).check()
        for token in (0, 5, tokens - 1):
            assert torch.equal(chosen.token(token)[0], first_largest(affinity[token], k))
        assert torch.equal(chosen.token_counts(), (affinity > 0).sum(1).clamp(max=k))
        mutual = mutual_choice(affinity, k * 7).check()
        assert torch.equal(mutual.token_ids() * features + mutual.indices, first_largest(affinity.flatten(), k * 7))
    budgets = torch.tensor([0, 1, 2, 4, tokens]).repeat(features)[:features]
    by_feature = feature_choice(affinity, budgets).check().by_feature()
    assert torch.equal(by_feature.offsets.diff(), torch.minimum((affinity > 0).sum(0), budgets))
    for feature in (1, 2, 3, 4, features - 1):
        start, end = by_feature.offsets[feature : feature + 2].tolist()
        expected = first_largest(affinity[:, feature], int(budgets[feature]))
        assert torch.equal(by_feature.tokens[start:end], expected)


@pytest.mark.parametrize("place", [0, 799, 800 * 12 + 400, 800 * 24 - 1])
def test_no_group_hides_a_nan(place: int) -> None:
    affinity = -torch.ones(24 * 800)
    affinity[place] = math.nan
    for choose in (token_choice, feature_choice, mutual_choice):
        for layout in (affinity.view(24, 800), affinity.view(800, 24).T, affinity[3:].view(9, 2133)):
            if layout.isnan().any():
                with pytest.raises(UserError, match="NaN"):
                    choose(layout, 1)


def test_choices_are_nested_in_the_budget() -> None:
    affinity = torch.randn(16, 32, generator=torch.Generator().manual_seed(1)).round(decimals=1)
    for choose in (token_choice, feature_choice, mutual_choice):
        smaller: set[Match] = set()
        for budget in (0, 1, 2, 3, 5, 8):
            larger = matches(choose(affinity, budget), affinity)
            assert smaller <= larger
            smaller = larger


@settings(max_examples=60, deadline=None)
@given(affinities(), st.integers(0, 10**6))
def test_thresholds_choose_what_lies_above_them(affinity: Tensor, seed: int) -> None:
    for bound in (torch.randn(affinity.shape[1], generator=torch.Generator().manual_seed(seed)), 0.7, -1.0):
        level = torch.as_tensor(bound, dtype=torch.float64)
        expected = (affinity.double() > level) & (affinity > 0)
        code = by_threshold(affinity, bound)
        assert matches(code, affinity) == {(t, f) for t, f in expected.nonzero().tolist()}


def test_gradients_reach_the_chosen_affinities_only() -> None:
    for choose in (token_choice, feature_choice, mutual_choice):
        affinity = torch.randn(5, 7, generator=torch.Generator().manual_seed(3), requires_grad=True)
        code = choose(affinity, 3)
        code.values.square().sum().backward()
        assert affinity.grad is not None
        assert torch.equal(affinity.grad, 2 * code.to_dense().detach())


def test_bad_input_is_refused_with_the_remedy() -> None:
    good = torch.ones(2, 3)
    with pytest.raises(UserError, match="flatten"):
        token_choice(torch.ones(2, 3, 4), 1)
    with pytest.raises(UserError, match="floating-point"):
        mutual_choice(torch.ones(2, 3, dtype=torch.int64), 1)
    for budget in (-1, 1.5, True):
        with pytest.raises(UserError, match="whole number"):
            token_choice(good, budget)  # type: ignore[arg-type]
    for budgets in (torch.ones(2, dtype=torch.int64), torch.ones(3), torch.tensor([1, -1, 1])):
        with pytest.raises(UserError, match="3 whole numbers"):
            feature_choice(good, budgets)
    for choose in (token_choice, feature_choice, mutual_choice):
        with pytest.raises(UserError, match="NaN"):
            choose(torch.tensor([[1.0, math.nan]]), 1)
    with pytest.raises(UserError, match="one for each of 3"):
        by_threshold(good, torch.ones(2))
