"""Every objective and retain term through the engine, against its naive formula on the whole batch's logits and states."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import cross_entropy

from lm.loading import load
from lm.model import LanguageModel
from lm.prompts import Encoded, PromptSpec
from lm.row_files import load_rows
from tests.unlearn.objective_cases import CASES, Batch, Case
from unlearn.alternates.base import RandomTokens, Refusals
from unlearn.forward.passes import Passes, collate
from unlearn.forward.reference_model import Original
from unlearn.objectives import Fixed, GradientAscent, Loss, NoRetain, Objective, RetainMemory
from unlearn.training.batches import StepRows
from unlearn.training.side import Side, encode_rows
from unlearn.training.step import Stepper

CPU = torch.device("cpu")
LAYER = 1
ROWS = StepRows(tuple((side, row) for row in (7, 2, 5, 0, 9) for side in (True, False)))


@pytest.fixture(name="learned", scope="module")
def fixture_learned(tiny: Path) -> dict[str, Tensor]:
    """Weights that half know the rows: with a random model's, some terms would have hardly a slope."""
    model = load(str(tiny / "model"), device="cpu")
    rows = [row for side in ("forget", "retain") for row in load_rows(str(tiny / f"{side}.jsonl"))]
    inputs = collate(encode_rows(model, rows, PromptSpec()), 0, CPU)
    optimizer = torch.optim.Adam(model.model.parameters(), lr=1e-2)
    for _ in range(25):
        logits = model.model(input_ids=inputs.ids, attention_mask=inputs.attention).logits[:, :-1]
        optimizer.zero_grad()
        cross_entropy(logits[inputs.mask], inputs.targets[inputs.mask]).backward()
        optimizer.step()
    return model.model.state_dict()


def loaded(tiny: Path, weights: dict[str, Tensor]) -> LanguageModel:
    model = load(str(tiny / "model"), device="cpu")
    model.model.load_state_dict(weights)
    return model


def outputs(model: LanguageModel, rows: list[Encoded]) -> tuple[Tensor, Tensor]:
    """Logits that predict each next token, and the stream after block `LAYER`."""
    inputs = collate(rows, 0, CPU)
    out = model.model(input_ids=inputs.ids, attention_mask=inputs.attention, output_hidden_states=True)
    return out.logits[:, :-1].double(), out.hidden_states[LAYER + 1].double()


def whole(model: LanguageModel, original: LanguageModel, rows: list[Encoded], alternates: list[Encoded]) -> Batch:
    """The naive formulas' batch, straight from the two models."""
    inputs = collate(rows, 0, CPU)
    with torch.no_grad():
        reference, reference_hidden = outputs(original, rows)
    logits, hidden = outputs(model, rows)
    return Batch(
        logits=logits,
        reference=reference,
        targets=inputs.targets,
        mask=inputs.mask,
        hidden=hidden,
        reference_hidden=reference_hidden,
        hidden_mask=inputs.attention.bool(),
        alternate=whole(model, original, alternates, []) if alternates else None,
    )


@pytest.mark.parametrize("case", CASES, ids=[repr(case.of) for case in CASES])
def test_gradient_through_the_engine_is_the_papers(tiny: Path, learned: dict[str, Tensor], case: Case) -> None:
    model, original = loaded(tiny, learned), loaded(tiny, learned)
    rows = [load_rows(str(tiny / f"{side}.jsonl")) for side in ("forget", "retain")]
    documents = case.needs.documents and isinstance(case.of, Objective)
    forget = encode_rows(model, rows[0], PromptSpec(), documents=documents)
    retain = encode_rows(model, rows[1], PromptSpec())
    measured = {
        name: [first + 0.3 * row for row in range(len(forget))] for name, first in (("value", 2.0), ("spread", 0.1))
    }
    alternates = [
        *RandomTokens(seed=1).encode(model, rows[0][:6], PromptSpec()),
        *Refusals(per_row=2).encode(model, rows[0][6:], PromptSpec()),
    ]
    before = Original(model.model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    objective = case.of if isinstance(case.of, Objective) else GradientAscent()
    loss = (
        Loss.of(objective, NoRetain())
        if isinstance(case.of, Objective)
        else Loss(objective=objective, retain=case.of, weight=Fixed(factor=0.7))
    )
    passes = Passes(Accelerator(cpu=True), model.model, model, reference=before)
    sides = Side(forget, alternates, of=rows[0]), Side(retain)
    step = Stepper(passes, loss, *sides, micro_batch=2, weighting="global_tokens")
    epoch = 3
    result = step.gradient(ROWS, RetainMemory(epoch=epoch), targets=measured)
    got = {name: p.grad.clone() for name, p in model.model.named_parameters() if p.grad is not None}

    chosen = [alternates[row][epoch % len(alternates[row])] for row in ROWS.forget]
    batch = replace(
        whole(model, original, [forget[i] for i in ROWS.forget], chosen),
        row_value=torch.tensor([measured["value"][row] for row in ROWS.forget]),
        row_spread=torch.tensor([measured["spread"][row] for row in ROWS.forget]),
        row_document=torch.tensor([rows[0][row].kind == "sc" for row in ROWS.forget]),
    )
    wanted = case.naive(
        batch if isinstance(case.of, Objective) else whole(model, original, [retain[i] for i in ROWS.retain], [])
    )
    if not isinstance(case.of, Objective):
        ascent = next(one for one in CASES if one.of == GradientAscent())
        wanted = ascent.naive(whole(model, original, [forget[i] for i in ROWS.forget], [])) + 0.7 * wanted
    assert result.loss == pytest.approx(float(wanted.detach()), rel=1e-4)
    names, parameters = zip(*model.model.named_parameters(), strict=True)
    found = torch.autograd.grad(wanted, parameters, allow_unused=True)
    largest = max(float(one.abs().max()) for one in found if one is not None)
    assert largest > 1e-5
    for name, gradient in zip(names, found, strict=True):
        expected = torch.zeros(()) if gradient is None else gradient
        torch.testing.assert_close(
            got.get(name, torch.zeros(())) + torch.zeros_like(expected), expected, rtol=1e-3, atol=1e-4 * largest
        )
