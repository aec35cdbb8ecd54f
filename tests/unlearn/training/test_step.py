"""One step's gradient against a dense oracle: the whole batch in one tensor, the loss as the paper writes it."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from families import tiny as tiny_family
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax

from lm.devices import accelerator
from lm.loading import load
from lm.model import LanguageModel
from lm.prompts import Encoded, PromptSpec
from lm.row_files import load_rows
from tests.unlearn.helpers import Casts
from unlearn.forward.passes import Passes, collate
from unlearn.forward.recomputing import recompute_activations
from unlearn.forward.reference_model import Original
from unlearn.objectives import (
    DPO,
    NPO,
    Adaptive,
    Divergence,
    Fixed,
    GradientAscent,
    Joint,
    KLMinimization,
    Loss,
    Objective,
    RetainMemory,
)
from unlearn.training.batches import PairedBatches, StepRows
from unlearn.training.side import Side, encode_rows
from unlearn.training.step import Stepper, Weighting

CPU = torch.device("cpu")
ROWS = PairedBatches(forget=12, retain=12, batch=10).step(0)


@pytest.fixture(name="model")
def fixture_model(tiny: Path) -> LanguageModel:
    return load(str(tiny / "model"), device="cpu")


@pytest.fixture(name="sides")
def fixture_sides(tiny: Path, model: LanguageModel) -> tuple[list[Encoded], list[Encoded]]:
    forget, retain = (
        encode_rows(model, load_rows(str(tiny / f"{side}.jsonl")), PromptSpec()) for side in ("forget", "retain")
    )
    return forget, retain


def stepper(
    model: LanguageModel,
    sides: tuple[list[Encoded], list[Encoded]],
    loss: Loss,
    *,
    original: Original | None = None,
    micro_batch: int = 3,
    weighting: Weighting = "global_tokens",
) -> Stepper:
    passes = Passes(Accelerator(cpu=True), model.model, model, reference=original or Original(model.model))
    return Stepper(passes, loss, Side(sides[0]), Side(sides[1]), micro_batch=micro_batch, weighting=weighting)


def run(
    model: LanguageModel,
    sides: tuple[list[Encoded], list[Encoded]],
    objective: Objective | Loss,
    memory: RetainMemory,
    **options: object,
) -> tuple[dict[str, Tensor], object]:
    loss = objective if isinstance(objective, Loss) else Loss.of(objective)
    model.model.zero_grad()
    step = stepper(model, sides, loss, **options)  # type: ignore[arg-type]
    result = step.gradient(ROWS, memory)
    return {name: p.grad.clone() for name, p in model.model.named_parameters() if p.grad is not None}, result


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("weighting", ["global_tokens", "micro_batch_mean"])
@pytest.mark.parametrize("family", ["olmo", "gpt2"])  # a head of its own, and a tied one
def test_weights_are_made_small_once_a_step(
    family: str, weighting: Weighting, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under autocast, between passes of the original that read other weights; and no bit of the gradient is another."""
    rows = [[Encoded([first + 7 * i + j for j in range(4 + i)], 2) for i in range(6)] for first in (3, 40)]

    def step() -> tuple[list[Tensor], int]:
        model = tiny_family(family)
        if checkpointing:
            recompute_activations(model.model)
        acc = accelerator(mixed_precision="bf16", cpu=True)
        passes = Passes(acc, acc.prepare(model.model), model, reference=Original(model.model))
        block = model.model.get_submodule(model.anatomy.block_path(0))
        shape = next(p.shape for p in block.parameters() if p.ndim == 2)
        with torch.no_grad():
            for parameter in model.model.parameters():
                parameter.add_(torch.ones_like(parameter), alpha=0.01)
        steps = Stepper(
            passes,
            Loss.of(NPO(), Divergence()),
            Side(rows[0]),
            Side(rows[1]),
            micro_batch=2,
            weighting=weighting,
        )
        order = StepRows(tuple((side, row) for row in range(6) for side in (True, False)))
        with Casts(shape) as casts:
            steps.gradient(order, RetainMemory())
        return [p.grad for p in model.model.parameters() if p.grad is not None], casts.count

    try:
        once, few = step()
        monkeypatch.setattr(Passes, "same_weights", lambda _: nullcontext())
        each, many = step()
    finally:
        accelerator(cpu=True)  # else the tests to come would be under autocast too
    assert few < many
    assert len(once) == len(each) > 10
    assert all(torch.equal(one, two) for one, two in zip(once, each, strict=True))


def mean_ce(model: nn.Module, rows: list[Encoded]) -> Tensor:
    inputs = collate(rows, 0, CPU)
    logits = model(input_ids=inputs.ids, attention_mask=inputs.attention).logits
    return cross_entropy(logits[:, :-1][inputs.mask], inputs.targets[inputs.mask])


def dense(model: LanguageModel, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def assert_same(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    for name, gradient in one.items():
        torch.testing.assert_close(
            gradient, two[name], rtol=2e-4, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def chosen(sides: tuple[list[Encoded], list[Encoded]], rows: StepRows = ROWS) -> tuple[list[Encoded], list[Encoded]]:
    return [sides[0][i] for i in rows.forget], [sides[1][i] for i in rows.retain]


@pytest.mark.parametrize("micro_batch", [1, 3, 64])
def test_joint_gradient_is_the_papers_whatever_the_micro_batch(model, sides, micro_batch: int) -> None:  # type: ignore[no-untyped-def]
    memory = RetainMemory(cross_entropy=2.0, tokens=1.0, epoch=1)  # a reference of 2 nats: the adaptive branch is taken
    objective = Loss.of(Joint(forget_cap=None), weight=Adaptive(alpha_max=1e6))
    got, result = run(model, sides, objective, memory, micro_batch=micro_batch)
    forget, retain = chosen(sides)
    ce_forget, ce_retain = mean_ce(model.model, forget), mean_ce(model.model, retain)
    alpha = 0.3 * 6 ** (float(ce_retain) - 2.0) + 0.8
    assert result.retain_weight == pytest.approx(alpha, rel=1e-5)
    assert result.loss == pytest.approx(float(-ce_forget + alpha * ce_retain), rel=1e-5)
    assert_same(got, dense(model, -ce_forget + alpha * ce_retain))


def test_ascent_alone_never_touches_the_retain_rows(model, sides) -> None:  # type: ignore[no-untyped-def]
    got, result = run(model, (sides[0], []), GradientAscent(), RetainMemory())
    assert result.retain_weight == 0.0
    assert_same(got, dense(model, -mean_ce(model.model, chosen(sides)[0])))


def test_kl_gradient_is_the_full_vocabulary_divergence_from_the_original(model, sides) -> None:  # type: ignore[no-untyped-def]
    original = Original(model.model)
    forget, retain = chosen(sides)
    inputs = collate(retain, 0, CPU)
    with torch.no_grad():
        before = log_softmax(
            model.model(input_ids=inputs.ids, attention_mask=inputs.attention).logits[:, :-1][inputs.mask], -1
        )
        for parameter in model.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)), alpha=0.01)
    stepper(model, sides, Loss.of(KLMinimization()), original=original).gradient(ROWS, RetainMemory())
    got = {name: p.grad.clone() for name, p in model.model.named_parameters() if p.grad is not None}
    after = log_softmax(
        model.model(input_ids=inputs.ids, attention_mask=inputs.attention).logits[:, :-1][inputs.mask], -1
    )
    divergence = (before.exp() * (before - after)).sum(-1).mean()
    assert float(divergence) > 1e-4
    assert_same(got, dense(model, -mean_ce(model.model, forget) + divergence))


def test_npo_averages_over_rows_and_knows_the_original(model, sides) -> None:  # type: ignore[no-untyped-def]
    _, result = run(model, sides, Loss.of(NPO(beta=0.1), weight=Fixed(factor=0.0)), RetainMemory())
    assert result.loss == pytest.approx((2 / 0.1) * 0.6931472, rel=1e-5), "an unchanged model: -2/beta * log sigmoid(0)"


def test_comparing_with_the_original_may_learn_in_small_means_too(model, sides) -> None:  # type: ignore[no-untyped-def]
    """The original's pass over the retain rows must not touch weights that the forget rows' graph still holds."""
    one, _ = run(model, sides, KLMinimization(), RetainMemory(), micro_batch=64, weighting="micro_batch_mean")
    two, _ = run(model, sides, KLMinimization(), RetainMemory(), micro_batch=64, weighting="global_tokens")
    assert_same(one, two)


def test_the_original_comes_back_and_goes_away_exactly(model) -> None:  # type: ignore[no-untyped-def]
    original = Original(model.model)
    first = {name: p.detach().clone() for name, p in model.model.named_parameters()}
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter.mul_(1.37)
    changed = {name: p.detach().clone() for name, p in model.model.named_parameters()}
    with original.restored():
        assert all(torch.equal(p, first[name]) for name, p in model.model.named_parameters())
    assert all(torch.equal(p, changed[name]) for name, p in model.model.named_parameters())


def test_micro_batch_mean_is_the_authors_average_of_averages(model, sides) -> None:  # type: ignore[no-untyped-def]
    memory = RetainMemory()
    got, result = run(model, sides, Joint(forget_cap=None), memory, micro_batch=4, weighting="micro_batch_mean")
    pieces = [ROWS.order[i : i + 4] for i in range(0, len(ROWS.order), 4)]
    loss = torch.zeros(())
    means = []
    for piece in pieces:
        loss = loss - mean_ce(model.model, [sides[0][i] for is_forget, i in piece if is_forget])
        retained = mean_ce(model.model, [sides[1][i] for is_forget, i in piece if not is_forget])
        means.append(float(retained))
        loss = loss + 1.2 * retained
    assert result.loss == pytest.approx(float(loss) / len(pieces), rel=1e-5)
    assert memory.batch_means == pytest.approx(sum(means), rel=1e-5)
    assert memory.rows == len(ROWS.retain)
    assert_same(got, dense(model, loss / len(pieces)))


@pytest.mark.parametrize("micro_batch", [2, 64])
def test_global_rows_is_the_mean_of_row_means(model, sides, micro_batch: int) -> None:  # type: ignore[no-untyped-def]
    got, result = run(
        model, sides, Joint(forget_cap=None), RetainMemory(), micro_batch=micro_batch, weighting="global_rows"
    )
    forget, retain = chosen(sides)
    means = [torch.stack([mean_ce(model.model, [one]) for one in rows]).mean() for rows in (forget, retain)]
    loss = -means[0] + 1.2 * means[1]
    assert result.loss == pytest.approx(float(loss), rel=1e-5)
    assert_same(got, dense(model, loss))


def test_the_two_weightings_differ(model, sides) -> None:  # type: ignore[no-untyped-def]
    one, _ = run(model, sides, Joint(), RetainMemory(), micro_batch=4)
    two, _ = run(model, sides, Joint(), RetainMemory(), micro_batch=4, weighting="micro_batch_mean")
    assert any((one[name] - two[name]).abs().max() > 1e-6 for name in one)


def test_a_batch_without_a_side_has_no_term_for_it(model, sides) -> None:  # type: ignore[no-untyped-def]
    rows = StepRows(tuple((True, i) for i in range(3)))
    for weighting in ("global_tokens", "micro_batch_mean"):
        model.model.zero_grad()
        loss = Loss.of(Joint(forget_cap=None))
        one = stepper(model, sides, loss, micro_batch=8, weighting=weighting)
        result = one.gradient(rows, RetainMemory())
        assert result.loss == pytest.approx(-float(mean_ce(model.model, sides[0][:3])), rel=1e-5)
        assert math.isnan(result.retain_cross_entropy), "0 would be a perfect one"
        only_retain = one.gradient(StepRows(((False, 0), (False, 1))), RetainMemory())
        assert only_retain.loss == pytest.approx(1.2 * float(mean_ce(model.model, sides[1][:2])), rel=1e-5)
        assert math.isnan(only_retain.forget_cross_entropy)


def test_a_micro_batchs_tokens_are_counted_with_its_alternates(model, sides) -> None:  # type: ignore[no-untyped-def]
    forget = Side(sides[0], [(row,) for row in sides[0]])
    passes = Passes(Accelerator(cpu=True), model.model, model, reference=Original(model.model))
    longest = max(len(row.ids) for row in sides[0])
    for loss, rows in ((Loss.of(DPO()), 2), (Loss.of(Joint()), 4)):
        step = Stepper(
            passes,
            loss,
            forget if rows == 2 else Side(sides[0]),
            Side(sides[1]),
            micro_batch=64,
            micro_tokens=4 * longest,
            weighting="global_tokens",
        )
        drawn = StepRows(tuple((True, place) for place in range(len(sides[0]))))
        micros = step.micros(drawn, epoch=0)
        assert sorted(place for micro in micros for place in micro.rows) == list(range(len(sides[0])))
        assert all(micro.padded <= 4 * longest for micro in micros)
        assert max(len(micro.rows) for micro in micros) >= min(rows, len(sides[0]))
