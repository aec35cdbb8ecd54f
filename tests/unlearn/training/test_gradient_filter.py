"""The filter beside a singular value decomposition, and in a step: the forget gradient alone passes through it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lm.errors import UserError
from lm.run_folder import RunFolder
from tests.unlearn.helpers import SMALL, small_config
from unlearn.gradient_filter import GradientFilter, collapsed
from unlearn.objectives import GradientAscent, GradientDifference
from unlearn.stage import run_unlearn


@pytest.mark.parametrize("shape", [(7, 12), (12, 7), (5, 5), (2, 9)])
@pytest.mark.parametrize("share", [0.1, 0.4, 0.99])
def test_leading_singular_values_fall_to_the_next_one(shape: tuple[int, int], share: float) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    count = min(math.ceil(share * len(s)), len(s) - 1)
    lowered = torch.cat([s[count].expand(count), s[count:]])
    torch.testing.assert_close(collapsed(matrix, share), u @ torch.diag(lowered) @ v)


def test_no_direction_at_all_stays_nothing() -> None:
    assert not collapsed(torch.zeros(4, 6), 0.3).any()
    one = torch.outer(torch.ones(4), torch.arange(6.0))
    torch.testing.assert_close(collapsed(one, 0.1), torch.zeros(4, 6), atol=1e-4, rtol=0.0)


def test_only_matrices_are_filtered() -> None:
    matrix, vector = torch.nn.Parameter(torch.zeros(4, 6)), torch.nn.Parameter(torch.zeros(4))
    matrix.grad, vector.grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), torch.ones(4)
    wanted = collapsed(matrix.grad, 0.5)
    GradientFilter(share=0.5).apply([matrix, vector])
    torch.testing.assert_close(matrix.grad, wanted)
    assert torch.equal(vector.grad, torch.ones(4))


def gradients(config: object, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Those of the first step, before they are clipped."""
    found: dict[str, torch.Tensor] = {}

    def keep(acc: object, parameters: object, limit: float) -> torch.Tensor:
        found.update({str(place): p.grad.clone() for place, p in enumerate(parameters) if p.grad is not None})  # type: ignore[arg-type,attr-defined]
        return torch.zeros(())

    with monkeypatch.context() as patch:
        patch.setattr("accelerate.Accelerator.clip_grad_norm_", keep)
        run_unlearn(config)  # type: ignore[arg-type]
    return found


def test_the_retain_gradient_joins_after_the_filter(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """(both, filtered) = filter(forget alone) + (both, unfiltered) - forget alone."""
    one = replace(SMALL, steps=1, batch=24)
    filtered = replace(one, gradient_filter=GradientFilter(share=0.2))
    both, passed = (
        gradients(small_config(tiny, tmp_path / name, objective=GradientDifference(), trainer=trainer), monkeypatch)
        for name, trainer in (("both", one), ("filtered", filtered))
    )
    alone = gradients(
        small_config(tiny, tmp_path / "alone", objective=GradientAscent(), trainer=replace(one, batch=12)), monkeypatch
    )
    assert both.keys() == passed.keys() == alone.keys()
    for name, forget in alone.items():
        torch.testing.assert_close(passed[name], collapsed(forget, 0.2) + both[name] - forget, rtol=1e-4, atol=1e-7)
        assert not torch.allclose(passed[name], both[name], rtol=1e-3)
    losses = [RunFolder(tmp_path / name).metrics()[0]["loss"] for name in ("filtered", "both")]
    assert losses[0] == pytest.approx(losses[1])


def test_mixed_micro_batches_have_no_forget_gradient_of_their_own() -> None:
    with pytest.raises(UserError, match="mixes both sides"):
        replace(SMALL, weighting="micro_batch_mean", gradient_filter=GradientFilter())
    with pytest.raises(UserError, match="share is 1"):
        GradientFilter(share=1.0)
