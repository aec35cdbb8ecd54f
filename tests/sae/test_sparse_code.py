"""The sparse code against dense tensors: both ways round, both views, decoding and its gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm import UserError
from sae import SparseCode, decode


def random_dense(seed: int, tokens: int, features: int, density: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(tokens, features, generator=generator, dtype=torch.float64)
    return values * (torch.rand(tokens, features, generator=generator) < density)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 6), st.integers(1, 7), st.sampled_from([0.0, 0.3, 1.0]))
def test_dense_there_and_back_and_both_views(seed: int, tokens: int, features: int, density: float) -> None:
    dense = random_dense(seed, tokens, features, density)
    code = SparseCode.from_dense(dense).check()
    assert torch.equal(code.to_dense(), dense)
    assert torch.equal(code.token_counts(), (dense != 0).sum(1))
    assert torch.equal(code.feature_counts(), (dense != 0).sum(0))
    for token in range(tokens):
        indices, values = code.token(token)
        assert indices.tolist() == dense[token].nonzero().squeeze(1).tolist()
        assert torch.equal(values, dense[token, indices])
    view = code.by_feature()
    assert torch.equal(view.values, code.values[view.order])
    for feature in range(features):
        mine = slice(int(view.offsets[feature]), int(view.offsets[feature + 1]))
        assert view.tokens[mine].tolist() == dense[:, feature].nonzero().squeeze(1).tolist()
        assert torch.equal(view.values[mine], dense[view.tokens[mine], feature])
    width = features // 2
    assert torch.equal(code.prefix(width).check().to_dense()[:, :width], dense[:, :width])
    assert code.prefix(width).to_dense()[:, width:].abs().sum() == 0


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 5), st.integers(1, 6), st.sampled_from([0.0, 0.4, 1.0]))
def test_decode_and_its_gradients_are_the_dense_product(seed: int, tokens: int, features: int, density: float) -> None:
    dense = random_dense(seed, tokens, features, density).requires_grad_()
    w_dec = random_dense(seed + 1, features, 4, 1.0).requires_grad_()
    b_dec = random_dense(seed + 2, 1, 4, 1.0)[0].requires_grad_()
    weight = random_dense(seed + 3, tokens, 4, 1.0)
    sparse = decode(SparseCode.from_dense(dense), w_dec, b_dec)
    expected = dense @ w_dec + b_dec
    torch.testing.assert_close(sparse, expected)
    got = torch.autograd.grad((sparse * weight).sum(), [dense, w_dec, b_dec])
    want = torch.autograd.grad((expected * weight).sum(), [dense, w_dec, b_dec])
    torch.testing.assert_close(got[0], want[0] * (dense != 0))
    torch.testing.assert_close(got[1:], want[1:])


def test_a_bf16_code_is_decoded_in_the_decoders_type() -> None:
    dense = torch.tensor([[0.0, 1.5], [2.25, 0.0]], dtype=torch.bfloat16)
    w_dec = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    out = decode(SparseCode.from_dense(dense), w_dec)
    assert out.dtype == torch.float32
    assert torch.equal(out, dense.float() @ w_dec)


def test_dense_gradients_flow_to_the_values_and_nowhere_else() -> None:
    dense = torch.tensor([[0.0, 2.0, 3.0]], requires_grad=True)
    weights = torch.tensor([[10.0, 20.0, 30.0]])
    (SparseCode.from_dense(dense).to_dense() * weights).sum().backward()
    assert dense.grad is not None
    assert dense.grad.tolist() == [[0.0, 20.0, 30.0]]


@pytest.mark.parametrize(
    ("indices", "offsets", "word"),
    [([0, 3], [0, 2], "outside"), ([1, 0], [0, 2], "rise"), ([1, 1], [0, 2], "once"), ([0, 1], [0, 1], "offsets")],
)
def test_damaged_codes_are_refused(indices: list[int], offsets: list[int], word: str) -> None:
    code = SparseCode(torch.tensor(indices), torch.ones(2), torch.tensor(offsets), 3)
    with pytest.raises(UserError, match=word):
        code.check()


def test_wrong_shapes_and_types_are_refused() -> None:
    with pytest.raises(UserError, match="one length"):
        SparseCode(torch.tensor([0]), torch.ones(2), torch.tensor([0, 1]), 3)
    with pytest.raises(UserError, match="int64"):
        SparseCode(torch.tensor([0], dtype=torch.int32), torch.ones(1), torch.tensor([0, 1]), 3)
    with pytest.raises(UserError, match="flatten"):
        SparseCode.from_dense(torch.ones(2, 3, 4))
    with pytest.raises(UserError, match="4 features"):
        decode(SparseCode.from_dense(torch.ones(2, 4)), torch.ones(5, 3))
