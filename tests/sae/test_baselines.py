"""The baselines against formulas written out densely here, and against finite differences where they are smooth."""

from __future__ import annotations

import pytest
import torch
from baselines import (
    gated,
    gated_loss,
    jumprelu,
    l1_penalty,
    matryoshka_loss,
    multi_topk_loss,
    prefix_reconstructions,
    prefix_widths,
)
from torch import Tensor

from lm import UserError
from sae import SparseCode, feature_choice, mutual_choice, token_choice


def normal(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def gradients(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    got = torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(i) if g is None else g for g, i in zip(got, inputs, strict=True)]


def test_the_l1_penalty_with_and_without_decoder_norms() -> None:
    z, w_dec = normal(0, 5, 7), normal(1, 7, 3)
    f = z.relu()
    for penalty, oracle in (
        (l1_penalty(f), f.sum(1).mean()),
        (l1_penalty(f, w_dec), (f * w_dec.norm(dim=1)).sum(1).mean()),
        (l1_penalty(SparseCode.from_dense(f), w_dec), (f * w_dec.norm(dim=1)).sum(1).mean()),
    ):
        torch.testing.assert_close(penalty, oracle)
        for ours, theirs in zip(gradients(penalty, z, w_dec), gradients(oracle, z, w_dec), strict=True):
            torch.testing.assert_close(ours, theirs)
    assert float(l1_penalty(torch.zeros(0, 4))) == 0


def test_jumprelu_values_and_pseudo_gradients() -> None:
    z, bandwidth = normal(0, 40, 6), 0.7
    theta = (normal(1, 6).abs() + 0.1).detach().requires_grad_()
    value, step = jumprelu(z, theta, bandwidth=bandwidth)
    assert torch.equal(value, torch.where(z > theta, z, 0.0))
    assert torch.equal(step, (z > theta).double())
    up_value, up_step = normal(2, 40, 6).detach(), normal(3, 40, 6).detach()
    u = (z - theta) / bandwidth
    inside = (u.abs() < 0.5).double()
    assert 10 < int(inside.sum()) < inside.numel() - 10
    by_value = gradients((value * up_value).sum(), z, theta)
    torch.testing.assert_close(by_value[0], up_value * (z > theta))
    torch.testing.assert_close(by_value[1], -(theta / bandwidth * inside * up_value).sum(0))
    by_step = gradients((step * up_step).sum(), z, theta)
    torch.testing.assert_close(by_step[0], torch.zeros_like(z))
    torch.testing.assert_close(by_step[1], -(inside / bandwidth * up_step).sum(0))


def test_jumprelus_pseudo_gradient_is_the_slope_of_the_expected_l0() -> None:
    """What the rectangle estimates: for z uniform on [0, 1], E[L0] = 1 - theta, with slope -1."""
    z = (torch.arange(20000, dtype=torch.float64) / 20000).unsqueeze(1)
    theta = torch.tensor([0.4], dtype=torch.float64, requires_grad=True)
    _, step = jumprelu(z, theta, bandwidth=0.05)
    assert float(gradients(step.mean(), theta)[0]) == pytest.approx(-1, abs=1e-2)
    with pytest.raises(UserError, match="bandwidth"):
        jumprelu(z, theta, bandwidth=0.0)


def test_gated_values_and_where_each_term_sends_its_gradient() -> None:
    p, r_mag, b_gate, b_mag = normal(0, 6, 5), normal(1, 5), normal(2, 5), normal(3, 5)
    code = gated(p, r_mag=r_mag, b_gate=b_gate, b_mag=b_mag)
    expected = torch.where(p + b_gate > 0, (p * r_mag.exp() + b_mag).relu(), 0.0)
    torch.testing.assert_close(code.activations, expected)
    torch.testing.assert_close(code.gate, (p + b_gate).relu())
    on_gate = gradients(code.activations.sum(), r_mag, b_gate, b_mag)
    assert torch.equal(on_gate[1], torch.zeros(5).double())
    assert float(on_gate[0].abs().sum()) > 0
    torch.testing.assert_close(on_gate[2], (expected > 0).sum(0).double())

    x, w_dec, b_dec = normal(4, 6, 4), normal(5, 5, 4), normal(6, 4)
    loss = gated_loss(x, code, w_dec, b_dec, sparsity=0.3)
    main = (x - (expected @ w_dec + b_dec)).square().sum(1).mean()
    frozen = (x - (code.gate @ w_dec + b_dec)).square().sum(1).mean()
    torch.testing.assert_close(loss, main + 0.3 * code.gate.sum(1).mean() + frozen)
    for ours, theirs in zip(gradients(loss, w_dec, b_dec), gradients(main, w_dec, b_dec), strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradients(loss, b_gate)[0], gradients(0.3 * code.gate.sum(1).mean() + frozen, b_gate)[0])


def test_matryoshka_prefixes_of_any_allocation_are_dense_prefixes() -> None:
    z, w_dec, b_dec, x = normal(0, 6, 16), normal(1, 16, 4), normal(2, 4), normal(3, 6, 4).detach()
    widths = prefix_widths(16, (1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2))
    assert widths == [1, 2, 4, 8, 16]
    for code in (token_choice(z, 3), feature_choice(z, 2), mutual_choice(z, 20), token_choice(z, 0)):
        dense = code.to_dense()
        oracle = [dense[:, :m] @ w_dec[:m] + b_dec for m in widths]
        found = prefix_reconstructions(code, w_dec, b_dec, widths)
        torch.testing.assert_close(found, oracle)
        for bias_only in (True, False):
            loss = matryoshka_loss(x, code, w_dec, b_dec, widths, with_bias_only=bias_only)
            parts = [(x - part).square().mean() for part in oracle]
            parts += [(x - b_dec).square().mean()] * bias_only
            expected = torch.stack(parts).mean()
            torch.testing.assert_close(loss, expected)
            inputs = (z, w_dec, b_dec)
            for ours, theirs in zip(gradients(loss, *inputs), gradients(expected, *inputs), strict=True):
                torch.testing.assert_close(ours, theirs)


def test_one_prefix_is_the_plain_loss() -> None:
    z, w_dec, b_dec, x = normal(0, 6, 16), normal(1, 16, 4), normal(2, 4), normal(3, 6, 4)
    loss = matryoshka_loss(x, token_choice(z, 3), w_dec, b_dec, [16], with_bias_only=False)
    torch.testing.assert_close(loss, (x - (token_choice(z, 3).to_dense() @ w_dec + b_dec)).square().mean())


def test_published_shares_and_bad_ones() -> None:
    assert prefix_widths(64, (1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32)) == [2, 6, 14, 30, 64]
    for shares in ((), (0.5, 0.4), (0.5, 0.6), (1.5, -0.5)):
        with pytest.raises(UserError, match="sum to 1"):
            prefix_widths(16, shares)
    with pytest.raises(UserError, match="must rise"):
        prefix_widths(4, (1 / 16, 15 / 16))
    code = token_choice(normal(0, 2, 4), 1)
    for widths in ([], [2], [0, 4], [2, 2, 4], [4, 2], [2, 5]):
        with pytest.raises(UserError, match="must rise"):
            prefix_reconstructions(code, normal(1, 4, 3), normal(2, 3), widths)


def test_multi_topk_is_two_topk_losses_and_trains_the_encoder_through_both() -> None:
    z, w_dec, b_dec, x = normal(0, 6, 16), normal(1, 16, 4), normal(2, 4), normal(3, 6, 4).detach()

    def plain(k: int) -> Tensor:
        top = z.topk(k, dim=1)
        acts = torch.zeros_like(z).scatter(1, top.indices, top.values.relu())
        return (x - (acts @ w_dec + b_dec)).square().mean()

    loss, expected = multi_topk_loss(x, z, w_dec, b_dec, k=2), plain(2) + plain(8) / 8
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(gradients(loss, z, w_dec, b_dec), gradients(expected, z, w_dec, b_dec), strict=True):
        torch.testing.assert_close(ours, theirs)
