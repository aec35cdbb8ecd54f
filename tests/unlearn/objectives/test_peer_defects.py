"""Defects that were found in other unlearning frameworks, each as a test that the objectives here do not share it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lm.config import dump_yaml, parse_config
from lm.run_folder import RunFolder
from tests.unlearn.helpers import SMALL, small_config
from tests.unlearn.objective_cases import CASES, Case, draw, statistics
from unlearn.alternates.base import NoAlternates, Refusals
from unlearn.config import UnlearnConfig
from unlearn.objectives import (
    DPO,
    NPO,
    PDU,
    RMU,
    UNDIAL,
    WGA,
    AdaptiveRMU,
    Divergence,
    Dual,
    GradientDifference,
    Loss,
    Objective,
    SatImp,
)
from unlearn.stage import run_unlearn


def case_of(kind: type) -> Case:
    return next(case for case in CASES if type(case.of) is kind)


def test_undial_does_not_count_prompt_and_padding_or_use_a_label_of_minus_100() -> None:
    """A mean over all positions, and -100 as an index, which falls on a real token of the vocabulary."""
    case, batch = case_of(UNDIAL), draw()
    expected = case.mean(batch)
    torch.testing.assert_close(case.mean(batch.padded(7)), expected)
    elsewhere = replace(batch, targets=batch.targets.where(batch.mask, -100))
    torch.testing.assert_close(case.mean(elsewhere), expected)


def test_the_divergence_does_not_count_prompt_and_padding() -> None:
    """Flattened over all positions, with the number of rows as divisor."""
    case, batch = case_of(Divergence), draw()
    torch.testing.assert_close(case.mean(batch.padded(7)), case.mean(batch))


def test_the_margin_is_that_of_the_logits_which_predict_the_answer() -> None:
    """No mask at all for eleven weeks, then one that lies a position too late: the first answer token was not flattened."""
    case, batch = case_of(PDU), draw()
    torch.testing.assert_close(case.mean(batch.padded(7)), case.mean(batch))
    (slope,) = torch.autograd.grad(case.total(batch), batch.logits)
    assert torch.equal(slope.any(dim=2), batch.mask)


@pytest.mark.parametrize("objective", [WGA(), SatImp(), PDU(), GradientDifference()], ids=repr)
def test_an_objective_that_reads_no_original_model_asks_for_none(objective: Objective) -> None:
    """A second model in memory that is never used."""
    assert not Loss.of(objective).needs_original
    assert Loss.of(objective, Divergence()).needs_original, "the retain term may ask for it"


@pytest.mark.parametrize("objective", [NPO(), DPO(), UNDIAL(), AdaptiveRMU(layer=1), RMU(layer=1)], ids=repr)
def test_an_objective_that_compares_says_so(objective: Objective) -> None:
    assert Loss.of(objective).needs_original


def test_misdirection_asks_for_nothing_above_its_layer() -> None:
    """The whole depth was computed although one layer was read."""
    loss = Loss.of(RMU(layer=7))
    for needs in (loss.forget_needs, loss.retain_needs):
        assert needs.hidden is not None
        assert needs.hidden.layer == 7
        assert not needs.vocabulary


@pytest.mark.parametrize("case", CASES, ids=[repr(case.of) for case in CASES])
def test_a_term_reads_no_more_than_it_declares(case: Case) -> None:
    """What is not declared is not there: a key that only some data sets have failed deep inside training."""
    batch, needs = draw(), case.needs
    stats = statistics(batch, needs)
    assert (stats.reference_logprob is None) == (not needs.reference_logprob)
    assert (stats.alternate is None) == (not needs.alternate)
    assert (stats.hidden is None) == (needs.hidden is None)
    if not needs.logprob:
        stats = replace(stats, logprob=torch.full_like(stats.logprob, torch.nan))
    assert bool(case.term(stats).total.isfinite())


def test_the_dual_variable_is_that_of_the_global_batch(tiny: Path, tmp_path: Path) -> None:
    """It followed each micro-batch, and each process's own loss."""
    seen = []
    for size in (1, 4):
        config = small_config(
            tiny,
            tmp_path / str(size),
            objective=GradientDifference(),
            trainer=replace(SMALL, micro_batch=size),
            retain_weight=Dual(tolerance=1.0, rate=0.5),
        )
        logged = RunFolder(run_unlearn(config).parent).metrics()
        seen.append([line["alpha"] for line in logged])
    assert len(set(seen[0])) > 3, "it moves"
    assert seen[0] == pytest.approx(seen[1], rel=1e-5)


@pytest.mark.parametrize("case", [c for c in CASES if isinstance(c.of, Objective)], ids=lambda case: repr(case.of))
def test_every_objective_is_read_back_from_its_config(case: Case, tmp_path: Path) -> None:
    """Settings that were silently ignored."""
    assert isinstance(case.of, Objective)
    alternates = Refusals() if case.of.forget_needs().alternate else NoAlternates()
    (tmp_path / "config.yaml").write_text(dump_yaml(UnlearnConfig(objective=case.of, alternates=alternates)))
    assert parse_config(UnlearnConfig, ["--config", str(tmp_path / "config.yaml")]).objective == case.of


def test_an_objective_is_chosen_by_name_on_the_command_line() -> None:
    words = ["--objective", "AdaptiveRMU", "--objective.layer", "2", "--objective.scale", "3"]
    config = parse_config(UnlearnConfig, words)
    assert config.objective == AdaptiveRMU(layer=2, scale=3.0)
    assert config.loss.retain_needs.hidden == config.loss.forget_needs.hidden
