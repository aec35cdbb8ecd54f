"""The original's distribution kept for each token: whole it changes nothing, of k tokens it is what a formula by hand says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lm.run_folder import RunFolder
from tests.unlearn.helpers import SMALL, small_config
from unlearn.forward.known_logits import joined, likeliest
from unlearn.objectives import UNDIAL, GradientAscent, KLMinimization, Objective
from unlearn.objectives.retain import divergence
from unlearn.stage import run_unlearn

CPU = torch.device("cpu")


def test_of_k_tokens_the_others_count_as_one() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, original = (torch.randn(6, 11, generator=generator, dtype=torch.float64) * 2 for _ in range(2))
    logits.requires_grad_()
    kept = joined([likeliest(original[:2], 3), likeliest(original[2:], 3)], CPU)
    ours = divergence(logits, torch.zeros(6), kept.whole(logits).double())
    p, q = original.softmax(dim=-1), logits.softmax(dim=-1)
    best = original.topk(3, dim=-1).indices
    few = [
        torch.cat([each.gather(1, best), 1 - each.gather(1, best).sum(dim=1, keepdim=True)], dim=1) for each in (p, q)
    ]
    wanted = (few[0] * (few[0] / few[1]).log()).sum(dim=1)
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)
    slopes = [torch.autograd.grad(each.sum(), logits, retain_graph=True)[0] for each in (ours, wanted)]
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-5, atol=1e-6)
    assert (wanted <= divergence(logits, torch.zeros(6), original) + 1e-12).all(), "never above the whole one"


def test_all_tokens_are_the_distribution_itself() -> None:
    original = torch.randn(4, 11, generator=torch.Generator().manual_seed(1))
    for most in (11, 50):
        kept = joined([likeliest(original, most)], CPU)
        torch.testing.assert_close(kept.whole(torch.zeros(4, 11)), original.log_softmax(dim=-1))
    assert likeliest(original, 10).shape == (4, 11, 2)


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in RunFolder(run).metrics()]


@pytest.mark.parametrize("objective", [KLMinimization(), UNDIAL()], ids=["retain side", "forget side"])
def test_a_run_with_all_of_it_kept_is_the_run_that_asks_every_time(
    tiny: Path, tmp_path: Path, objective: Objective, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = small_config(tiny, tmp_path / "live", objective=objective)
    run_unlearn(usual)
    monkeypatch.setattr("unlearn.training.loop.reference", lambda *_: pytest.fail("a second copy was made"))
    run_unlearn(replace(usual, out=str(tmp_path / "kept"), trainer=replace(SMALL, cached_logits=1000)))
    assert losses(tmp_path / "kept") == pytest.approx(losses(tmp_path / "live"), rel=1e-5)
    assert len(set(losses(tmp_path / "kept"))) == SMALL.steps


def test_the_error_of_a_few_tokens_falls_with_their_number(tiny: Path, tmp_path: Path) -> None:
    first = {}
    for most in (2, 20, 100, 1000):
        config = small_config(
            tiny, tmp_path / str(most), objective=KLMinimization(), trainer=replace(SMALL, steps=6, cached_logits=most)
        )
        run_unlearn(config)
        first[most] = RunFolder(config.out).metrics()[-1]["retain_loss"]
    assert first[2] < first[20] < first[100] < first[1000]


def test_nothing_that_compares_keeps_nothing(tiny: Path, tmp_path: Path) -> None:
    config = small_config(tiny, tmp_path / "run", objective=GradientAscent(), trainer=replace(SMALL, cached_logits=5))
    run_unlearn(config)
    plain = small_config(tiny, tmp_path / "plain", objective=GradientAscent())
    run_unlearn(plain)
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")
