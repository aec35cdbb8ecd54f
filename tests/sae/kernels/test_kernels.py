"""Every backend against plain autograd: activations, reconstructions and every gradient, for whatever is chosen."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lm import UserError
from sae import SparseCode, feature_choice, mutual_choice, token_choice
from sae.gao_recipe import unit_rows, without_parallel
from sae.kernels import Encoded, Selection, encode_decode, take_parallel_, unit_rows_
from sae.kernels.operations import bags, bags_by_adding

T, H, F = 9, 5, 24
SPARSE = ["cpu", "torch"]
Choice = Callable[[Tensor], Selection]


def inputs(dtype: torch.dtype = torch.float64, *, tokens: int = T, features: int = F, seed: int = 0) -> list[Tensor]:
    """x, w_enc, b_enc, w_dec, b_dec; all want gradients."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(tokens, H), (features, H), (features,), (features, H), (H,)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def idle(z: Tensor, k: int) -> SparseCode:
    """Token choice among every third feature."""
    part = token_choice(z[:, ::3], k)
    return SparseCode(part.indices * 3, part.values, part.offsets, z.shape[1])


def nothing(z: Tensor) -> SparseCode:
    return SparseCode.from_dense(torch.zeros_like(z))


def some_tokens_only(z: Tensor) -> SparseCode:
    keep = torch.zeros_like(z)
    keep[1::3] = z[1::3]
    return token_choice(keep, 4)


CHOICES: dict[str, Choice] = {
    "token": lambda z: Selection(token_choice(z, 4)),
    "feature": lambda z: Selection(feature_choice(z, 2)),
    "mutual": lambda z: Selection(mutual_choice(z, 20)),
    "token with auxiliary": lambda z: Selection(token_choice(z, 4), idle(z, 3)),
    "mutual with shares": lambda z: Selection(mutual_choice(z, 20), c := idle(z, 3), torch.linspace(0, 1, c.matches)),
    "auxiliary equals main": lambda z: Selection(token_choice(z, 2), token_choice(z, 2)),
    "nothing": lambda z: Selection(nothing(z)),
    "nothing but auxiliary": lambda z: Selection(nothing(z), idle(z, 2)),
    "empty auxiliary": lambda z: Selection(token_choice(z, 2), nothing(z)),
    "tokens without features": lambda z: Selection(some_tokens_only(z)),
    "one feature used": lambda z: Selection(token_choice(z * (torch.arange(z.shape[1]) == 3), 4)),
    "everything": lambda z: Selection(token_choice(z.abs() + 1, z.shape[1])),
}
"""The values of the codes differ from the pre-activations in places: the node must not use them."""


def loss(got: Encoded, x: Tensor) -> Tensor:
    """Something that uses every output with weights that differ between matches, tokens and dimensions."""
    total = (got.x_hat - x.detach()).square().sum() + (got.code.values * got.code.values.sin()).sum()
    if got.aux_code is not None and got.aux_hat is not None:
        total = total + (got.aux_hat + x.detach()).square().sum() * 0.3 + got.aux_code.values.cos().sum()
    return total


def everything(given: list[Tensor], choose: Choice, **options: Any) -> list[Tensor]:
    """Outputs and gradients, in one list."""
    got = encode_decode(*given, choose, **options)  # type: ignore[misc, arg-type]
    wanted = [tensor for tensor in given if tensor.requires_grad]
    gradients = torch.autograd.grad(loss(got, given[0]), wanted, materialize_grads=True)
    outputs = [got.code.values, got.x_hat]
    if got.aux_code is not None and got.aux_hat is not None:
        outputs += [got.aux_code.values, got.aux_hat]
    return [tensor.detach() for tensor in (*outputs, *gradients)]


def same(found: list[Tensor], oracle: list[Tensor], tolerance: float) -> None:
    assert len(found) == len(oracle)
    for one, other in zip(found, oracle, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        scale = max(1.0, float(other.abs().max())) if other.numel() else 1.0
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("backend", SPARSE)
@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_backends_equal_dense(backend: str, name: str, dtype: torch.dtype, tolerance: float) -> None:
    given = inputs(dtype)
    same(
        everything(given, CHOICES[name], backend=backend),
        everything(given, CHOICES[name], backend="dense"),
        tolerance,
    )


@pytest.mark.parametrize("backend", [*SPARSE, "dense"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_floats_come_near_float64(backend: str, dtype: torch.dtype) -> None:
    given = inputs(dtype)
    wide = [tensor.detach().double().requires_grad_() for tensor in given]
    codes = encode_decode(*given, CHOICES["token with auxiliary"], backend=backend)  # type: ignore[misc, arg-type]
    assert codes.aux_code is not None
    chosen = Selection(codes.code, codes.aux_code)  # the same matches for both, whatever the rounding
    found = everything(given, lambda _: chosen, backend=backend)
    oracle = everything(wide, lambda _: chosen, backend="dense")
    for one, other in zip(found, oracle, strict=True):
        assert one.dtype == dtype
        assert float((one.double() - other).norm() / other.norm()) < 0.02


@pytest.mark.parametrize("backend", [*SPARSE, "dense"])
@pytest.mark.parametrize("name", ["token", "token with auxiliary", "tokens without features"])
def test_gradients_equal_differences(backend: str, name: str) -> None:
    given = inputs(tokens=4, features=9)
    with torch.no_grad():
        first = encode_decode(*given, CHOICES[name])  # type: ignore[misc, arg-type]
    fixed = Selection(first.code, first.aux_code)  # the choice itself is piecewise constant: keep it

    def outputs(*given: Tensor) -> tuple[Tensor, ...]:
        got = encode_decode(*given, lambda _: fixed, backend=backend)  # type: ignore[misc, arg-type]
        return tuple(
            tensor
            for tensor in (got.code.values, got.x_hat, got.aux_code and got.aux_code.values, got.aux_hat)
            if tensor is not None
        )

    assert torch.autograd.gradcheck(outputs, given)


@pytest.mark.parametrize("backend", SPARSE)
@pytest.mark.parametrize(("tokens", "features"), [(1, F), (T, 1), (1, 1), (0, F)])
def test_smallest_sizes(backend: str, tokens: int, features: int) -> None:
    given = inputs(tokens=tokens, features=features)

    def choose(z: Tensor) -> Selection:
        return Selection(token_choice(z, 1), token_choice(z, 1))

    same(everything(given, choose, backend=backend), everything(given, choose, backend="dense"), 1e-10)


@pytest.mark.parametrize("backend", SPARSE)
def test_strides_do_not_matter(backend: str) -> None:
    plain = inputs()
    odd = [tensor.detach().repeat_interleave(2, dim=-1)[..., ::2].requires_grad_() for tensor in plain]
    odd[0] = torch.stack([plain[0].detach()] * 2, dim=1)[:, 1].requires_grad_()
    assert not odd[0].is_contiguous()
    assert not odd[1].is_contiguous()
    choose = CHOICES["token with auxiliary"]
    same(everything(odd, choose, backend=backend), everything(plain, choose, backend="dense"), 1e-10)
    expanded = plain[0].detach()[:1].expand(T, H)
    given = [expanded, *plain[1:]]
    same(everything(given, choose, backend=backend), everything(given, choose, backend="dense"), 1e-10)


@pytest.mark.parametrize("backend", SPARSE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(backend: str, dtype: torch.dtype) -> None:
    given = inputs(torch.float32)
    given[0] = given[0].detach().to(dtype).requires_grad_()
    choose = CHOICES["token with auxiliary"]
    plain = everything(given, choose, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = everything(given, choose, backend=backend)
    for one, other in zip(under, plain, strict=True):
        assert torch.equal(one, other)
    assert plain[0].dtype == torch.float32
    assert plain[4].dtype == dtype  # x's gradient


@pytest.mark.parametrize("backend", SPARSE)
@pytest.mark.parametrize("wanted", [*itertools.combinations(range(5), 1), (1, 2, 3, 4), (1, 3)])
def test_only_wanted_gradients(backend: str, wanted: tuple[int, ...]) -> None:
    given = [tensor.detach().requires_grad_(place in wanted) for place, tensor in enumerate(inputs())]
    choose = CHOICES["token with auxiliary"]
    same(everything(given, choose, backend=backend), everything(given, choose, backend="dense"), 1e-10)


@pytest.mark.parametrize("backend", [*SPARSE, "dense"])
@pytest.mark.parametrize("used", ["values", "x_hat", "aux_values", "aux_hat"])
def test_a_loss_of_one_output(backend: str, used: str) -> None:
    given = inputs()
    gradients = []
    for name in (backend, "dense"):
        got = encode_decode(*given, CHOICES["token with auxiliary"], backend=name)  # type: ignore[misc, arg-type]
        assert got.aux_code is not None
        assert got.aux_hat is not None
        outputs = {"values": got.code.values, "x_hat": got.x_hat, "aux_values": got.aux_code.values}
        out = {**outputs, "aux_hat": got.aux_hat}[used]
        gradients.append(torch.autograd.grad(out.square().sum(), given, allow_unused=True, materialize_grads=True))
    same(list(gradients[0]), list(gradients[1]), 1e-10)
    assert float(gradients[0][1].abs().max()) > 0  # the encoder learns from each of them


@pytest.mark.parametrize("backend", SPARSE)
def test_the_same_in_every_run(backend: str) -> None:
    given = inputs(torch.float32)
    runs = [everything(given, CHOICES["token with auxiliary"], backend=backend) for _ in range(3)]
    for run in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(run, runs[0], strict=True))


def test_the_reconstruction_may_be_changed_in_place() -> None:
    given = inputs()
    got = encode_decode(*given, CHOICES["token with auxiliary"], backend="cpu")  # type: ignore[misc, arg-type]
    got.x_hat.add_(given[4]).square().sum().backward()
    assert given[4].grad is not None


def test_bags_two_ways() -> None:
    generator = torch.Generator().manual_seed(0)
    table, weights = torch.randn(6, 3, generator=generator), torch.randn(20, generator=generator)
    numbers = torch.randint(6, (20,), generator=generator)
    offsets = torch.tensor([0, 0, 5, 5, 19, 20])
    for budget in (None, 1, 100):
        torch.testing.assert_close(
            bags_by_adding(numbers, offsets, weights, table, budget_bytes=budget),
            bags(numbers, offsets, weights, table),
        )


@pytest.mark.parametrize("chunk", [1, 50, 1 << 16])
def test_rows_in_place(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae.kernels.rows._CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    gradient, w_dec = torch.randn(12, 5, generator=generator), torch.randn(12, 5, generator=generator)
    w_dec[3] = 0
    projected, normed = without_parallel(gradient, w_dec), unit_rows(w_dec)
    torch.testing.assert_close(take_parallel_(gradient, w_dec), projected)
    assert torch.equal(gradient[3], projected[3])
    torch.testing.assert_close(unit_rows_(w_dec), normed)


def test_refusals() -> None:
    given = inputs()
    choose = CHOICES["token"]
    with pytest.raises(UserError, match="b_enc is"):
        encode_decode(given[0], given[1], given[2][:-1], given[3], given[4], choose)
    with pytest.raises(UserError, match="one float type"):
        encode_decode(given[0], given[1], given[2], given[3].float(), given[4], choose)
    with pytest.raises(UserError, match="does not run"):
        encode_decode(*given, choose, backend="metal")  # type: ignore[misc, arg-type]
    with pytest.raises(UserError, match="budget_bytes"):
        encode_decode(*given, choose, budget_bytes=0)  # type: ignore[misc, arg-type]
    with pytest.raises(UserError, match="a code of 3 tokens"):
        encode_decode(*given, lambda z: Selection(token_choice(z[:3], 2)))  # type: ignore[misc, arg-type]
    with pytest.raises(UserError, match="aux_share"):
        encode_decode(*given, lambda z: Selection(idle(z, 2), idle(z, 2), z.new_ones(1)))  # type: ignore[misc, arg-type]
    with pytest.raises(UserError, match="floating-point"):
        encode_decode(given[0].detach().long(), *given[1:], choose)  # type: ignore[misc, arg-type]
