"""The auxiliary losses against dense autograd written out here: values, and gradients of encoder, decoder and biases."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lm import UserError
from sae import ZipfLaw, aux_k_loss, aux_zipf_loss, expected_densities, residual_variance, under_use

TOKENS, HIDDEN, FEATURES = 6, 5, 12


class Weights:
    """A random autoencoder in float64, and what its main path leaves over."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

        self.x = normal(TOKENS, HIDDEN).detach()
        self.w_enc, self.b_enc = normal(HIDDEN, FEATURES), normal(FEATURES)
        self.w_dec, self.pre_bias = normal(FEATURES, HIDDEN), normal(HIDDEN)
        self.density = torch.rand(FEATURES, generator=generator) * (torch.rand(FEATURES, generator=generator) < 0.6)
        self.law = ZipfLaw(features=FEATURES, k=3, alpha=1.0, beta=1.0).densities()

    @property
    def parameters(self) -> list[Tensor]:
        return [self.w_enc, self.b_enc, self.w_dec, self.pre_bias]

    def affinity(self) -> Tensor:
        return (self.x - self.pre_bias) @ self.w_enc + self.b_enc

    def residual(self) -> Tensor:
        """Of an ordinary TopK of 2, with its graph: a loss that does not detach it shows."""
        z = self.affinity()
        top = z.relu().topk(2, dim=1)
        return self.x - (torch.zeros_like(z).scatter(1, top.indices, top.values) @ self.w_dec + self.pre_bias)

    def gradients(self, loss: Tensor) -> list[Tensor]:
        got = torch.autograd.grad(loss, self.parameters, allow_unused=True, retain_graph=True)
        return [torch.zeros_like(p) if g is None else g for g, p in zip(got, self.parameters, strict=True)]


def dense_oracle(w: Weights, members: Tensor, k_aux: int, scale: Tensor | None = None, bias: bool = False) -> Tensor:
    """Dense, loop-free of our code: mask the others to 0, take the top k_aux, ReLU, decode, normalize by the residual's."""
    z = torch.where(members, w.affinity(), 0.0)
    top = z.topk(min(k_aux, FEATURES), dim=1)
    acts = torch.zeros_like(z).scatter(1, top.indices, top.values.relu())
    if scale is not None:
        acts = acts * scale + acts.detach() * (1 - scale)
    target = w.residual().detach()
    found = acts @ w.w_dec
    if bias:
        found, target = found + w.pre_bias, target + w.pre_bias.detach()
    denominator = (target.mean(0, keepdim=True).expand_as(target) - target).square().mean()
    return ((found - target).square().mean() / denominator).nan_to_num(0)


def same(w: Weights, loss: Tensor, oracle: Tensor) -> None:
    torch.testing.assert_close(loss, oracle)
    for ours, theirs in zip(w.gradients(loss), w.gradients(oracle), strict=True):
        torch.testing.assert_close(ours, theirs)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 15), st.booleans())
def test_aux_k_and_all_its_gradients_are_the_dense_ones(seed: int, k_aux: int, bias: bool) -> None:
    w = Weights(seed)
    dead = w.density == 0
    pre_bias = w.pre_bias if bias else None
    loss = aux_k_loss(w.residual(), w.affinity(), dead, w.w_dec, k_aux=k_aux, pre_bias=pre_bias)
    same(w, loss, dense_oracle(w, dead, k_aux, bias=bias))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 15), st.floats(0.01, 1), st.sampled_from(["set", "gradient"]))
def test_aux_zipf_and_all_its_gradients_are_the_dense_ones(seed: int, k_aux: int, tau: float, weighting: str) -> None:
    w = Weights(seed)
    expected = expected_densities(w.law, w.density)
    loss = aux_zipf_loss(
        w.residual(), w.affinity(), w.density, expected, w.w_dec, k_aux=k_aux, tau=tau, weighting=weighting
    )
    use = (1 - w.density.double() / (tau * expected)).clamp(0, 1)
    same(w, loss, dense_oracle(w, use > 0, k_aux, use if weighting == "gradient" else None))


def test_both_losses_train_the_encoder_and_the_decoder_of_idle_features_and_of_no_other() -> None:
    """The defect of a widely used peer: its auxiliary loss moves the decoder only."""
    w = Weights(4)
    dead = w.density == 0
    expected = expected_densities(w.law, w.density)
    idle = under_use(w.density, expected, tau=0.8) > 0
    assert 0 < int(dead.sum()) < int(idle.sum()) < FEATURES
    for members, loss in (
        (dead, aux_k_loss(w.residual(), w.affinity(), dead, w.w_dec, k_aux=12)),
        (idle, aux_zipf_loss(w.residual(), w.affinity(), w.density, expected, w.w_dec, k_aux=12, tau=0.8)),
    ):
        w_enc, b_enc, w_dec, _ = w.gradients(loss)
        fired = members & (w.affinity() > 0).any(0)
        assert int(fired.sum()) > 1
        assert torch.equal(w_enc.abs().sum(0) > 0, fired)
        assert torch.equal(b_enc.abs() > 0, fired)
        assert torch.equal(w_dec.abs().sum(1) > 0, fired)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 15), st.sampled_from([0.0, 1e-12]), st.sampled_from(["set", "gradient"]))
def test_aux_zipf_is_exactly_aux_k_in_the_limit(seed: int, k_aux: int, tau: float, weighting: str) -> None:
    w = Weights(seed)
    expected = expected_densities(w.law, w.density)
    for options in ({}, {"pre_bias": w.pre_bias}, {"variance": 2.0}, {"scale_by_count": True}):
        zipf = aux_zipf_loss(
            w.residual(),
            w.affinity(),
            w.density,
            expected,
            w.w_dec,
            k_aux=k_aux,
            tau=tau,
            weighting=weighting,
            **options,
        )
        plain = aux_k_loss(w.residual(), w.affinity(), w.density == 0, w.w_dec, k_aux=k_aux, **options)
        assert torch.equal(zipf, plain)
        assert all(map(torch.equal, w.gradients(zipf), w.gradients(plain)))


def test_under_use_falls_from_one_to_zero_and_grows_with_tau() -> None:
    density = torch.tensor([0.0, 0.1, 0.2, 0.4, 0.9])
    expected = torch.full((5,), 0.4)
    torch.testing.assert_close(under_use(density, expected, tau=1.0), torch.tensor([1, 0.75, 0.5, 0, 0]).double())
    torch.testing.assert_close(under_use(density, expected, tau=0.5), torch.tensor([1, 0.5, 0, 0, 0]).double())
    assert under_use(density, expected, tau=0.0).tolist() == [1, 0, 0, 0, 0]
    assert under_use(density, expected, tau=1e-300).tolist() == [1, 0, 0, 0, 0]


def test_the_gradient_weighting_scales_activations_and_leaves_the_value() -> None:
    w = Weights(4)
    expected = expected_densities(w.law, w.density)

    def loss(weighting: str) -> Tensor:
        return aux_zipf_loss(
            w.residual(), w.affinity(), w.density, expected, w.w_dec, k_aux=9, tau=0.9, weighting=weighting
        )

    torch.testing.assert_close(loss("set"), loss("gradient"))
    whole, scaled = w.gradients(loss("set")), w.gradients(loss("gradient"))
    use = under_use(w.density, expected, tau=0.9)
    torch.testing.assert_close(scaled[0], whole[0] * use)
    torch.testing.assert_close(scaled[2], whole[2])


def calls(w: Weights, residual: Tensor, affinity: Tensor) -> list[Callable[[], Tensor]]:
    ones = torch.ones(FEATURES)
    return [
        lambda: aux_k_loss(residual, affinity, ones > 0, w.w_dec, k_aux=3),
        lambda: aux_zipf_loss(residual, affinity, 0 * ones, 0.1 * ones, w.w_dec, k_aux=3),
    ]


def test_undefined_quotients_give_zero_and_no_nan_in_the_gradients() -> None:
    w = Weights()
    z = w.affinity()
    for residual, affinity in ((torch.zeros(TOKENS, HIDDEN), z), (w.residual()[:1], z[:1]), (w.residual()[:0], z[:0])):
        for call in calls(w, residual, affinity):
            loss = call()
            assert float(loss.detach()) == 0
            assert all(bool((gradient == 0).all()) for gradient in w.gradients(loss))


def test_without_an_idle_feature_nothing_moves() -> None:
    w = Weights()
    dead = torch.zeros(FEATURES, dtype=torch.bool)
    loss = aux_k_loss(w.residual(), w.affinity(), dead, w.w_dec, k_aux=3)
    torch.testing.assert_close(loss, dense_oracle(w, dead, 3))
    assert all(bool((gradient == 0).all()) for gradient in w.gradients(loss))
    assert float(aux_k_loss(w.residual(), w.affinity(), dead, w.w_dec, k_aux=3, scale_by_count=True).detach()) == 0


def test_the_other_normalizations_and_the_scale_by_count() -> None:
    w = Weights()
    dead = torch.arange(FEATURES) < 3
    published = aux_k_loss(w.residual(), w.affinity(), dead, w.w_dec, k_aux=6)
    raw = aux_k_loss(w.residual(), w.affinity(), dead, w.w_dec, k_aux=6, variance=1.0)
    torch.testing.assert_close(raw / residual_variance(w.residual()), published)
    half = aux_k_loss(w.residual(), w.affinity(), dead, w.w_dec, k_aux=6, scale_by_count=True)
    torch.testing.assert_close(half, published / 2)


def test_micro_batches_with_the_global_variance_average_to_the_whole_batch() -> None:
    w = Weights()
    dead = w.density == 0
    whole = aux_k_loss(w.residual(), w.affinity(), dead, w.w_dec, k_aux=4)
    variance = residual_variance(w.residual())
    halves = [
        aux_k_loss(w.residual()[part], w.affinity()[part], dead, w.w_dec, k_aux=4, variance=variance)
        for part in (slice(0, 3), slice(3, 6))
    ]
    torch.testing.assert_close((halves[0] + halves[1]) / 2, whole)


def test_bf16_affinities_give_a_float32_loss() -> None:
    w = Weights()
    dead = w.density == 0
    loss = aux_k_loss(w.residual().bfloat16(), w.affinity().bfloat16(), dead, w.w_dec.bfloat16(), k_aux=4)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), dense_oracle(w, dead, 4), rtol=0.03, atol=0.03)


def test_bad_input_is_refused() -> None:
    w = Weights()
    z, expected = w.affinity(), expected_densities(w.law, w.density)
    with pytest.raises(UserError, match="one boolean for each of the 12"):
        aux_k_loss(w.residual(), z, torch.zeros(3, dtype=torch.bool), w.w_dec, k_aux=2)
    with pytest.raises(UserError, match="boolean"):
        aux_k_loss(w.residual(), z, w.density, w.w_dec, k_aux=2)
    with pytest.raises(UserError, match="k_aux = 0"):
        aux_k_loss(w.residual(), z, w.density == 0, w.w_dec, k_aux=0)
    with pytest.raises(UserError, match="tau"):
        under_use(w.density, expected, tau=1.5)
    with pytest.raises(UserError, match="above 0"):
        under_use(w.density, 0 * expected, tau=0.5)
    with pytest.raises(UserError, match="one a feature"):
        under_use(w.density, expected[:3], tau=0.5)
    with pytest.raises(UserError, match="weighting"):
        aux_zipf_loss(w.residual(), z, w.density, expected, w.w_dec, k_aux=2, weighting="soft")  # type: ignore[arg-type]
