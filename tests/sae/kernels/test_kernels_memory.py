"""What the node keeps, what it makes, parts within a budget, and the measured choice of a backend."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sae import SparseCode, feature_choice, mutual_choice, token_choice
from sae.kernels import Selection, calibrate, choose_backend, encode_decode, measured_costs

T, H, F = 64, 8, 512
K = 4


def inputs(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(T, H), (F, H), (F,), (F, H), (H,)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def run(
    choose: Callable[..., Selection], **options: object
) -> tuple[SparseCode, SparseCode | None, list[Tensor], list[int]]:
    """Codes, outputs with gradients, and the bytes of everything saved for backward that is not an input."""
    given = inputs()
    known = {tensor.data_ptr() for tensor in given}
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in known:
            saved.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        got = encode_decode(*given, choose, **options)  # type: ignore[misc, arg-type]
    total = got.x_hat.square().sum() + (0 if got.aux_hat is None else got.aux_hat.sin().sum())
    gradients = torch.autograd.grad(total, given)
    return got.code, got.aux_code, [got.x_hat.detach(), *gradients], saved


class Largest(TorchDispatchMode):
    """The largest size, and the storages of (tokens, features) size, that any operation makes while this is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.dense: set[int] = set()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
                self.largest = max(self.largest, tensor.numel())
                if tensor.numel() >= T * F:
                    self.dense.add(tensor.untyped_storage().data_ptr())
        return out


def with_auxiliary(z: Tensor) -> Selection:
    part = token_choice(z[:, ::8], 2)
    return Selection(token_choice(z, K), SparseCode(part.indices * 8, part.values, part.offsets, F))


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_nothing_dense_is_kept(backend: str) -> None:
    code, aux, _, saved = run(with_auxiliary, backend=backend)
    assert aux is not None
    matches = code.matches + aux.matches
    assert saved
    assert sum(saved) <= (8 + 8) * matches + 8 * (2 * T + 1)  # indices, values, offsets
    *_, kept = run(with_auxiliary, backend="dense")
    assert sum(kept) > 8 * T * F


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_the_pre_activations_are_the_only_dense_tensor(backend: str) -> None:
    given = inputs()
    with torch.no_grad():
        fixed = encode_decode(*given, with_auxiliary)  # type: ignore[misc, arg-type]
    choice = Selection(fixed.code, fixed.aux_code)
    with Largest() as forward:
        got = encode_decode(*given, lambda _: choice, backend=backend)  # type: ignore[misc, arg-type]
    assert len(forward.dense) == 1
    assert got.aux_hat is not None
    with Largest() as backward:
        torch.autograd.grad((got.x_hat + got.aux_hat).square().sum(), given)
    assert not backward.dense
    assert backward.largest <= F * H  # a weight's gradient


def test_rows_gathered_keep_to_the_budget() -> None:
    given = inputs()
    got = encode_decode(*given, with_auxiliary, backend="torch", budget_bytes=3000)  # type: ignore[misc, arg-type]
    with Largest() as whole:
        one = torch.autograd.grad(got.x_hat.square().sum(), given)
    plain = encode_decode(*given, with_auxiliary, backend="dense")  # type: ignore[misc, arg-type]
    assert whole.largest <= F * H
    for left, right in zip(one, torch.autograd.grad(plain.x_hat.square().sum(), given), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-10 * max(1.0, float(right.abs().max())))


@pytest.mark.parametrize("features_first", [False, True])
@pytest.mark.parametrize("budget", [1, 5 * 8 * F, 8 * T * F, None])
def test_token_parts_equal_the_whole(budget: int | None, features_first: bool) -> None:
    starts: list[tuple[int, int]] = []

    def part(z: Tensor, start: int) -> Selection:
        starts.append((start, len(z)))
        assert z.numel() * z.element_size() <= max(budget or 1 << 26, 8 * F)
        return with_auxiliary(z)

    whole = run(with_auxiliary, backend="cpu")
    parts = run(part, backend="cpu", splits="tokens", budget_bytes=budget, features_first=features_first)
    assert sum(size for _, size in starts) == T
    assert [start for start, _ in starts] == [sum(size for _, size in starts[:n]) for n in range(len(starts))]
    assert (len(starts) > 1) == (budget is not None and budget < 8 * T * F)
    equal(whole, parts)


@pytest.mark.parametrize("features_first", [False, True])
@pytest.mark.parametrize("budget", [1, 7 * 8 * T, None])
def test_feature_parts_equal_the_whole(budget: int | None, features_first: bool) -> None:
    budgets = torch.arange(F) % 5

    def whole_choice(z: Tensor) -> Selection:
        main, aux = feature_choice(z, budgets), feature_choice(z, 1)
        return Selection(main, aux, aux.values.sigmoid())

    def part_choice(z: Tensor, start: int) -> Selection:
        main, aux = feature_choice(z, budgets[start : start + z.shape[1]]), feature_choice(z, 1)
        return Selection(main, aux, aux.values.sigmoid())

    whole = run(whole_choice, backend="cpu", features_first=True)
    parts = run(part_choice, backend="cpu", splits="features", budget_bytes=budget, features_first=features_first)
    equal(whole, parts)


def equal(
    one: tuple[SparseCode, SparseCode | None, list[Tensor], list[int]],
    other: tuple[SparseCode, SparseCode | None, list[Tensor], list[int]],
) -> None:
    for left, right in zip(one[:2], other[:2], strict=True):
        assert left is not None
        assert right is not None
        assert torch.equal(left.indices, right.indices)
        assert torch.equal(left.offsets, right.offsets)
        torch.testing.assert_close(left.values, right.values, rtol=1e-12, atol=1e-12)
        right.check()
    for left_tensor, right_tensor in zip(one[2], other[2], strict=True):
        torch.testing.assert_close(left_tensor, right_tensor, rtol=1e-10, atol=1e-10)


def test_a_part_of_the_memory_is_used_again() -> None:
    """What `choose` is told: the tensor it sees is overwritten by the next part."""
    places = set()

    def part(z: Tensor, start: int) -> Selection:
        places.add(z.data_ptr())
        return Selection(token_choice(z, K))

    run(part, splits="tokens", budget_bytes=8 * F * 16)
    assert len(places) == 1


def test_the_cheapest_as_measured(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(calibrate, "_costs", {})
    shape = {"tokens": 40, "hidden": 8, "features": 64, "matches": 160, "dtype": torch.float32}
    device = torch.device("cpu")
    with caplog.at_level(logging.INFO, logger="sae.kernels.calibrate"):
        costs = measured_costs(**shape, device=device)  # type: ignore[arg-type]
        again = measured_costs(**shape, device=device)  # type: ignore[arg-type]
    assert costs.keys() == {"cpu", "torch", "dense"}
    assert all(cost > 0 for cost in costs.values())
    assert again is costs
    assert len(caplog.records) == 1
    for cheapest in ("dense", "torch", "cpu"):
        costs[cheapest] = min(costs.values()) / 2
        assert choose_backend(**shape, device=device) == cheapest  # type: ignore[arg-type]


def test_dense_is_no_candidate_where_it_would_keep_much() -> None:
    costs = measured_costs(
        tokens=4096, hidden=4, features=2048, matches=8192, dtype=torch.float32, device=torch.device("cpu")
    )
    assert costs.keys() == {"cpu", "torch"}


def test_auto_equals_dense() -> None:
    choose: Callable[[Tensor], Selection] = lambda z: Selection(mutual_choice(z, K * T))  # noqa: E731
    equal_values = [run(choose, backend=name)[2] for name in ("auto", "dense")]
    for left, right in zip(*equal_values, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10)
