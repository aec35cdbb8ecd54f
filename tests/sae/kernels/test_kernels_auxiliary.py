"""Both auxiliary losses through the node: value and every gradient equal the plain losses under dense autograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import sae.auxiliary
from sae import (
    SparseCode,
    aux_k_loss,
    aux_zipf_loss,
    decode,
    feature_choice,
    idle_choice,
    mutual_choice,
    reconstruction_loss,
    residual_loss,
    token_choice,
    under_use,
)
from sae.kernels import Selection, encode_decode

T, H, F, K = 11, 6, 30, 4
ALLOCATIONS: dict[str, Callable[[Tensor], SparseCode]] = {
    "token": lambda z: token_choice(z, K),
    "feature": lambda z: feature_choice(z, 2),
    "mutual": lambda z: mutual_choice(z, K * len(z)),
}


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    shapes = [(T, H), (F, H), (F,), (F, H), (H,)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("backend", ["cpu", "torch", "dense"])
@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("kind", ["aux_k", "zipf set", "zipf gradient"])
def test_losses_equal_dense_autograd(backend: str, allocation: str, kind: str) -> None:
    given = inputs()
    x, w_enc, b_enc, w_dec, b_dec = given
    density = torch.linspace(0, 0.2, F, dtype=torch.float64).roll(7)
    expected = torch.full((F,), 0.15, dtype=torch.float64)
    use = under_use(density, expected, tau=0.8)
    idle = density == 0 if kind == "aux_k" else use > 0

    affinity = (x - b_dec) @ w_enc.T + b_enc
    x_hat = decode(ALLOCATIONS[allocation](affinity), w_dec, b_dec)
    if kind == "aux_k":
        extra = aux_k_loss(x - x_hat, affinity, idle, w_dec, k_aux=3, pre_bias=b_dec)
    else:
        weighting = "gradient" if kind == "zipf gradient" else "set"
        extra = aux_zipf_loss(
            x - x_hat,
            affinity,
            density,
            expected,
            w_dec,
            k_aux=3,
            tau=0.8,
            weighting=weighting,  # type: ignore[arg-type]
            pre_bias=b_dec,
        )
    plain = reconstruction_loss(x, x_hat, variance=1.7) + extra / 32

    def choose(z: Tensor) -> Selection:
        aux = idle_choice(z, idle, k_aux=3)
        return Selection(ALLOCATIONS[allocation](z), aux, use[aux.indices] if kind == "zipf gradient" else None)

    got = encode_decode(x, w_enc, b_enc, w_dec, b_dec, choose, backend=backend)  # type: ignore[arg-type]
    assert got.aux_hat is not None
    whole = got.x_hat + b_dec
    sparse = reconstruction_loss(x, whole, variance=1.7)
    sparse = sparse + residual_loss(x - whole, got.aux_hat, pre_bias=b_dec) / 32

    assert float(extra.detach()) > 0
    torch.testing.assert_close(sparse, plain, rtol=1e-10, atol=1e-10)
    for one, other in zip(torch.autograd.grad(sparse, given), torch.autograd.grad(plain, given), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("chunk", [1, 40, 1 << 20])
def test_idle_choice_in_pieces(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    affinity = torch.randn(T, F, generator=torch.Generator().manual_seed(1))
    members = torch.arange(F) % 3 == 1
    expected = token_choice(torch.where(members, affinity, -1.0), 2)
    monkeypatch.setattr(sae.auxiliary, "_CHUNK", chunk)
    for z in (affinity, affinity[:1], affinity[:0]):
        found = idle_choice(z, members, k_aux=2).check()
        assert found.tokens == len(z)
        assert torch.equal(found.indices, expected.indices[: found.matches])
        assert torch.equal(found.values, expected.values[: found.matches])
    nobody = idle_choice(affinity, torch.zeros(F, dtype=torch.bool), k_aux=2)
    assert (nobody.matches, nobody.tokens) == (0, T)


def test_no_gradient_is_needed_to_encode() -> None:
    given = [tensor.detach() for tensor in inputs()]
    with torch.inference_mode():
        got = encode_decode(*given, lambda z: Selection(token_choice(z, K)))  # type: ignore[misc, arg-type]
    plain = encode_decode(*given, lambda z: Selection(token_choice(z, K)), backend="dense")  # type: ignore[misc, arg-type]
    torch.testing.assert_close(got.x_hat, plain.x_hat)
    assert not got.x_hat.requires_grad
