"""What a run will take: bytes counted exactly, carried from small probes to the largest micro-batch, and nothing changed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from families import tiny as tiny_model

from lm.prompts import Encoded
from lm.run_folder import RunFolder
from tests.unlearn.helpers import SMALL, small_config
from tests.unlearn.training.test_training import losses, weights
from unlearn.alternates.base import Refusals
from unlearn.forward.passes import Passes
from unlearn.forward.recomputing import recompute_activations
from unlearn.forward.reference_model import reference
from unlearn.objectives import DPO, NPO, RMU, Divergence, GradientDifference, Loss, Objective
from unlearn.scope import lora
from unlearn.scope.scope import Lora, Scope
from unlearn.stage import run_unlearn
from unlearn.training.batches import PairedBatches
from unlearn.training.estimate import Estimate, Live, _spread, estimate
from unlearn.training.side import Micro, Side
from unlearn.training.step import Stepper

BLOCKS, MODEL = Scope(layers=(0, 1, 2)), Scope(layers="model")
ADAPTED = Scope(layers=(0, 1, 2), modules=("all",), lora=Lora(rank=2))


def rows(first: int, count: int = 24) -> list[Encoded]:
    """Rows of 12 to 34 tokens of which the last half is supervised."""
    lengths = [12 + 5 * place % 23 for place in range(count)]
    return [Encoded([3 + (first + 7 * i) % 370 for i in range(n)], n // 2) for n in lengths]


def test_what_is_counted_is_what_lives() -> None:
    known = torch.zeros(100)
    with Live([known]) as live:
        one = torch.zeros(10)
        two = one.view(2, 5)
        del one
        known.add_(1.0)
        three = torch.zeros(100)
        del three
        four = torch.zeros(30, dtype=torch.float64)
    assert live.peak == 40 + 400, "a view holds what it looks at; what was known before and what is gone do not count"
    assert (two.shape, four.shape) == ((2, 5), (30,))


@pytest.mark.parametrize("micro_batch", [4, 12])
@pytest.mark.parametrize(
    ("scope", "objective", "retain", "checkpointing"),
    [
        (BLOCKS, GradientDifference(), None, False),
        (BLOCKS, NPO(), Divergence(), False),
        (MODEL, NPO(), Divergence(), False),
        (MODEL, GradientDifference(), None, True),
        (ADAPTED, NPO(), None, False),
        (Scope(layers=(0, 1)), RMU(layer=1), None, False),
    ],
    ids=["blocks", "compared", "model", "checkpointing", "adapters", "shallow"],
)
def test_bytes_of_a_step_are_known_within_a_fifth(  # type: ignore[no-untyped-def]
    scope: Scope, objective: Objective, retain, checkpointing: bool, micro_batch: int
) -> None:
    model = tiny_model("llama", hidden_size=64, intermediate_size=128, vocab_size=2000)
    resolved = scope.resolve(model.anatomy)
    resolved.apply(model.model, model.anatomy)
    if scope.lora is not None:
        lora.inject(model.model, model.anatomy, resolved, scope.lora, seed=0)
    if checkpointing:
        recompute_activations(model.model)
    loss = Loss.of(objective) if retain is None else Loss.of(objective, retain)
    back = reference(model.model) if loss.needs_original else None
    passes = Passes(Accelerator(cpu=True), model.model, model, reference=back)
    passes.chunk = 16
    stepper = Stepper(passes, loss, Side(rows(3)), Side(rows(50)), micro_batch=micro_batch, weighting="global_tokens")
    batches = PairedBatches(forget=24, retain=24, batch=24)
    found = estimate(stepper, batches, 2)
    assert all(p.grad is None for p in stepper.parameters)
    known = list(model.model.parameters())
    if back is not None:
        known += back.kept
    with Live(known) as live:
        for step in range(2):
            for micro in stepper.micros(batches.step(step), 0):
                stats = stepper._stats(micro.rows, forget=micro.forget, epoch=0)
                term = objective.forget_term(stats) if micro.forget else loss.retain.term(stats)
                term.total.backward()
                del stats, term
    assert found.gradients + found.activations + found.logits == pytest.approx(live.peak, rel=0.2)
    assert found.optimizer == 2 * found.gradients


def test_a_run_is_the_same_with_it_and_says_what_it_expects(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("with", "without"):
        trainer = replace(SMALL, estimate=name == "with", weight_decay=0.1)
        run_unlearn(
            small_config(
                tiny, tmp_path / name, objective=DPO(), alternates=Refusals(), retain_loss=Divergence(), trainer=trainer
            )
        )
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    one, two = (weights(tmp_path / name / "model") for name in ("with", "without"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert capsys.readouterr().out.count("estimate: peak") == 1
    said = RunFolder(tmp_path / "with").manifest["estimated"]
    assert said["peak_bytes"] > 0
    assert said["train_seconds"] > 0
    assert "estimated" not in RunFolder(tmp_path / "without").manifest


def test_the_peak_is_the_sum_of_what_comes_or_what_was() -> None:
    one = Estimate(now=100, gradients=10, optimizer=20, original=0, activations=5, logits=1, before=120, seconds=75.4)
    assert one.peak == 136
    assert replace(one, before=200).peak == 200
    assert one.sentence() == (
        "estimate: peak 136 B (now 100 B, gradients 10 B, optimizer 20 B, original 0 B, activations 5 B, logits 1 B), "
        "1 min 15 s of steps"
    )


@pytest.mark.parametrize(
    ("sizes", "chosen"), [([8], [8]), ([8, 8, 8], [8]), ([9, 3], [3, 9]), ([6, 5, 4, 3, 2, 1], [2, 4, 6])]
)
def test_time_is_that_of_small_and_large_micro_batches(sizes: list[int], chosen: list[int]) -> None:
    micros = [Micro(True, (place,), 0, padded, 1) for place, padded in enumerate(sizes)]
    assert [one.padded for one in _spread(micros)] == chosen
