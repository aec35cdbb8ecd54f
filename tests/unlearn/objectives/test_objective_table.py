"""What holds for every objective and every retain term: a new one is covered by its line in `objective_cases.CASES`."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.unlearn.helpers import ROOT
from tests.unlearn.objective_cases import CASES, HIDDEN, VOCABULARY, Batch, Case, draw, statistics
from unlearn.alternates.base import Alternates, NoAlternates
from unlearn.merging.merge import Merge
from unlearn.objectives import (
    AsPublished,
    AsPublishedWeight,
    Calibrated,
    Loss,
    NoForget,
    NoRetain,
    Objective,
    Retain,
    Weight,
)
from unlearn.perturbation import NoPerturbation, Perturbation


def each(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=[repr(case.of) for case in cases])


every = each(CASES)


def gradients(value: Tensor, batch: Batch) -> list[Tensor]:
    found = torch.autograd.grad(value, batch.leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if one is None else one for one, leaf in zip(found, batch.leaves, strict=True)]


def subclasses(of: type) -> set[type]:
    return {of}.union(*(subclasses(one) for one in of.__subclasses__()))


def test_every_objective_and_retain_term_is_in_the_table() -> None:
    known = {
        one for one in subclasses(Objective) | subclasses(Retain) if one.__module__.startswith("unlearn.objectives.")
    }
    assert known - {type(case.of) for case in CASES} == {
        Objective,
        Calibrated,
        NoForget,
        Retain,
        AsPublished,
        NoRetain,
    }


def test_the_page_of_methods_names_every_one_with_its_badges() -> None:
    page = (ROOT / "docs" / "methods.md").read_text().splitlines()
    axes = (Objective, Retain, Weight, Alternates, Merge, Perturbation)
    for kind in set[type]().union(*map(subclasses, axes)) - {
        *axes,
        AsPublished,
        AsPublishedWeight,
        Calibrated,
        NoAlternates,
        NoPerturbation,
    }:
        if kind.__module__.startswith("unlearn."):
            rows = "".join(line for line in page if line.startswith(f"| `{kind.__name__}`"))
            assert rows, kind.__name__
            badges = re.findall(r"\*\*(faithful|variant|reconstruction)\*\*", (kind.__doc__ or "").replace("\n", " "))
            assert all(badge in rows for badge in badges), (kind.__name__, badges)


@every
def test_value_and_gradient_are_those_of_the_papers_formula(case: Case) -> None:
    batch = draw()
    ours, theirs = case.mean(batch), case.naive(batch)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)  # the control vector is drawn in float32
    wanted = gradients(theirs, batch)
    assert sum(float(one.abs().sum()) for one in wanted) > 1e-3
    for one, two in zip(gradients(ours, batch), wanted, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-9)


@every
def test_padding_changes_nothing(case: Case) -> None:
    batch = draw()
    longer = batch.padded(3)
    torch.testing.assert_close(case.total(longer), case.total(batch))
    for long, short in zip(gradients(case.total(longer), longer), gradients(case.total(batch), batch), strict=True):
        torch.testing.assert_close(long[:, : short.shape[1]], short)
        assert not long[:, short.shape[1] :].any()


@every
def test_prompt_positions_get_no_gradient(case: Case) -> None:
    batch = draw()
    found = gradients(case.total(batch), batch)
    assert not found[0][~batch.mask].any()
    assert not found[1][~batch.hidden_mask].any()
    assert batch.alternate is not None
    assert not found[2][~batch.alternate.mask].any()


@every
def test_the_order_of_rows_does_not_matter(case: Case) -> None:
    batch = draw()
    torch.testing.assert_close(case.total(batch.rows([3, 0, 4, 1, 2])), case.total(batch))


@every
@pytest.mark.parametrize("cuts", [[[0], [1], [2], [3], [4]], [[4, 0], [2, 1, 3]]])
def test_micro_batches_add_up(case: Case, cuts: list[list[int]]) -> None:
    batch = draw()
    parts = [batch.rows(cut) for cut in cuts]
    torch.testing.assert_close(sum(case.total(part) for part in parts), case.total(batch))
    whole = gradients(case.total(batch), batch)
    for cut, part in zip(cuts, parts, strict=True):
        for one, all_rows in zip(gradients(case.total(part), part), whole, strict=True):
            torch.testing.assert_close(one, all_rows[cut])


@every
def test_a_row_without_supervised_tokens_counts_nothing(case: Case) -> None:
    emptied = [1, 3]

    def empty(name: str, values: Tensor) -> Tensor:
        if name in {"mask", "hidden_mask"}:
            values = values.clone()
            values[emptied] = False
        return values

    batch = draw()
    changed = batch.mapped(empty)
    torch.testing.assert_close(case.total(changed), case.total(batch.rows([0, 2, 4])))
    found = gradients(case.total(changed), changed)
    assert all(bool(one.isfinite().all()) for one in found)
    assert not any(one[emptied].any() for one in found)


@every
@pytest.mark.parametrize("scale", [1e3, 3e4])
def test_extreme_logits_give_finite_numbers(case: Case, scale: float) -> None:
    batch = draw(dtype=torch.float32, scale=scale)
    total = case.total(batch)
    assert bool(total.isfinite())
    assert all(bool(one.isfinite().all()) for one in gradients(total, batch))


@every
def test_a_certain_token_and_an_impossible_one_are_no_trouble(case: Case) -> None:
    for sign in (1.0, -1.0):

        def peaked(name: str, values: Tensor, sign: float = sign) -> Tensor:
            if name not in {"logits", "reference"}:
                return values
            result = torch.zeros_like(values)
            result[..., 0] = sign * 1e4
            return result

        batch = draw(dtype=torch.float32).mapped(lambda name, v: torch.zeros_like(v) if name == "targets" else v)
        batch = batch.mapped(peaked)
        total = case.total(batch)
        assert bool(total.isfinite())
        assert all(bool(one.isfinite().all()) for one in gradients(total, batch))


@every
def test_bf16_outputs_of_a_model_give_the_float64_answer(case: Case) -> None:
    def rounded(_: str, values: Tensor) -> Tensor:
        return values.to(torch.bfloat16).float() if values.is_floating_point() else values

    batch = draw().mapped(rounded)
    exact = batch.mapped(lambda _, values: values.double() if values.is_floating_point() else values)
    torch.testing.assert_close(case.mean(batch).double(), case.naive(exact), rtol=2e-5, atol=2e-5)


@each([case for case in CASES if case.needs.hidden is not None])
def test_hidden_states_in_bf16_are_compared_in_float32(case: Case) -> None:
    def low(name: str, values: Tensor) -> Tensor:
        return values.to(torch.bfloat16) if "hidden" in name and values.is_floating_point() else values.clone()

    batch = draw(dtype=torch.float32).mapped(low)
    total = case.total(batch)
    assert total.dtype == torch.float32
    same = batch.mapped(lambda _, values: values.float() if values.is_floating_point() else values)
    torch.testing.assert_close(total, case.total(same))


@every
def test_rows_that_count_alike_are_weighted_alike(case: Case) -> None:
    """`row_weight` multiplies what a token counts in a token mean; a term by rows or hidden states has no use for it."""
    batch = draw()
    stats = statistics(batch, case.needs)
    weighted = replace(stats, row_weight=torch.full((5, 1), 0.25, dtype=torch.float64))
    factor = 0.25 if case.term(stats).unit == "token" else 1.0
    torch.testing.assert_close(case.term(weighted).total, factor * case.term(stats).total)


@each([case for case in CASES if isinstance(case.of, Objective)])
def test_an_objective_brings_its_retain_term_and_weight(case: Case) -> None:
    assert isinstance(case.of, Objective)
    loss = Loss.of(case.of)
    assert not isinstance(loss.retain, AsPublished)
    assert not isinstance(loss.weight, AsPublishedWeight)
    assert loss.forget_needs == case.needs


def test_the_table_is_not_degenerate() -> None:
    batch = draw()
    assert batch.logits.shape == (5, 8, VOCABULARY)
    assert batch.hidden.shape == (5, 9, HIDDEN)
    assert (batch.hidden_mask.sum(1) > batch.mask.sum(1)).all(), "hidden states are asked for in the prompt too"
