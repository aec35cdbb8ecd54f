"""Unlearning on objects in memory does what the stage does from files, and leaves alone what it was given."""

from __future__ import annotations

import doctest
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import unlearn
from lm.errors import UserError
from lm.loading import load
from lm.model import LanguageModel, fingerprint
from lm.prompts import PromptSpec
from lm.run_folder import RunFolder
from tests.unlearn.helpers import SMALL, reworded, small_config
from unlearn.config import UnlearnConfig
from unlearn.generation.generate import generate
from unlearn.objectives import (
    CrossEntropy,
    Fixed,
    Joint,
    LearnAlternate,
    NoRetain,
    Objective,
    Retain,
    Term,
    TokenStats,
    Weight,
)
from unlearn.scope.scope import Lora, Scope
from unlearn.stage import run_unlearn

SCOPE = Scope(layers=(1,))


@pytest.fixture
def model(tiny: Path) -> LanguageModel:
    return load(str(tiny / "model"), device="cpu")


def rows(tiny: Path) -> list[tuple[unlearn.Row, ...]]:
    return [unlearn.load_rows(tiny / f"{side}.jsonl") for side in ("forget", "retain")]


def weights(model: LanguageModel) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.model.named_parameters()}


def same_as_saved(result: unlearn.Unlearned, config: UnlearnConfig) -> None:
    saved = load_file(run_unlearn(config) / "model.safetensors")
    ours = weights(result.model)
    assert {*saved} == {*ours}
    assert all(torch.equal(saved[name], ours[name]) for name in saved)
    assert result.log == RunFolder(config.out).metrics()


def test_what_the_stage_does_from_files(model: LanguageModel, tiny: Path, tmp_path: Path) -> None:
    before = fingerprint(model)
    result = unlearn.unlearn(model, *rows(tiny), scope=SCOPE, trainer=SMALL)
    assert fingerprint(model) == before, "the given model was changed"
    assert fingerprint(result.model) != before
    changed = {name for name, tensor in weights(result.model).items() if not torch.equal(tensor, weights(model)[name])}
    assert changed
    assert all(".layers.1.mlp." in name for name in changed)
    same_as_saved(result, small_config(tiny, tmp_path / "run"))


def test_in_place_and_by_names(model: LanguageModel, tiny: Path) -> None:
    expected = unlearn.unlearn(model, *rows(tiny), scope=SCOPE, trainer=SMALL)
    sources = [str(tiny / f"{side}.jsonl") for side in ("forget", "retain")]
    named = unlearn.unlearn(str(tiny / "model"), *sources, scope=SCOPE, trainer=SMALL)
    own = unlearn.unlearn(model, *rows(tiny), scope=SCOPE, trainer=SMALL, in_place=True)
    assert own.model.model is model.model
    assert fingerprint(model) == fingerprint(expected.model) == fingerprint(named.model)


@pytest.mark.parametrize("in_place", [False, True])
def test_adapters_are_merged(model: LanguageModel, tiny: Path, tmp_path: Path, in_place: bool) -> None:
    scope = replace(SCOPE, lora=Lora(rank=2, alpha=4))
    names = [*weights(model)]
    result = unlearn.unlearn(model, *rows(tiny), scope=scope, trainer=SMALL, in_place=in_place)
    assert [*weights(result.model)] == names
    assert all(parameter.requires_grad for parameter in result.model.model.parameters())
    same_as_saved(result, small_config(tiny, tmp_path / "run", scope=scope))


@pytest.mark.parametrize("autocast", ["no", "bf16"])
def test_the_result_is_a_plain_model(model: LanguageModel, tiny: Path, autocast: str) -> None:
    trainer = replace(SMALL, steps=2, gradient_checkpointing=True, autocast=autocast)
    result = unlearn.unlearn(model, *rows(tiny), scope=SCOPE, trainer=trainer).model
    plain = result.model
    assert not plain.training
    assert not plain.is_gradient_checkpointing
    assert "forward" not in plain.__dict__
    assert all(parameter.grad is None for parameter in plain.parameters())
    (text,) = generate(result, ["What is"], prompt=PromptSpec(), max_new_tokens=3, batch_size=1)
    assert isinstance(text, str)
    again = unlearn.unlearn(result, *rows(tiny), scope=SCOPE, trainer=replace(SMALL, steps=1))
    assert [entry["step"] for entry in again.log] == [1]


@dataclass(frozen=True, kw_only=True)
class Halved(Objective):
    """As in a notebook: half of what gradient ascent takes."""

    published_retain: ClassVar[Retain] = NoRetain()
    published_weight: ClassVar[Weight] = Fixed()

    def forget_term(self, stats: TokenStats) -> Term:
        return Term(-0.5 * stats.total(stats.cross_entropy))


def test_an_objective_of_ones_own(model: LanguageModel, tiny: Path) -> None:
    forget, _ = rows(tiny)
    trainer = replace(SMALL, clip=None)
    halved = unlearn.unlearn(model, forget, objective=Halved(), scope=SCOPE, trainer=trainer)
    whole = unlearn.unlearn(model, forget, objective=unlearn.objectives.GradientAscent(), scope=SCOPE, trainer=trainer)
    assert halved.log[0]["loss"] == pytest.approx(0.5 * whole.log[0]["loss"])
    assert "retain_ce" not in halved.log[0]
    assert halved.log[-1]["forget_ce"] > halved.log[0]["forget_ce"]


def test_validation_rows_choose(model: LanguageModel, tiny: Path, tmp_path: Path) -> None:
    trainer = replace(SMALL, evaluate_every=2, checkpoint="lowest_joint_loss")
    split = reworded(tiny, tmp_path)
    assert split.forget is not None
    assert split.retain is not None
    validation = (unlearn.load_rows(split.forget), unlearn.load_rows(split.retain))
    result = unlearn.unlearn(model, *rows(tiny), scope=SCOPE, trainer=trainer, validation=validation)
    assert [entry["step"] for entry in result.log if "validation/joint_loss" in entry] == [2, 4, 6]
    same_as_saved(result, small_config(tiny, tmp_path / "run", trainer=trainer, validation=split))


def test_nothing_is_left_on_disk(
    model: LanguageModel, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    objective = unlearn.objectives.NPO()  # whose reference is computed once, and kept
    unlearn.unlearn(model, *rows(tiny), objective=objective, scope=SCOPE, trainer=SMALL)
    assert not [*tmp_path.iterdir()]
    with pytest.raises(UserError, match="the loss became"):
        unlearn.unlearn(model, *rows(tiny), scope=SCOPE, trainer=replace(SMALL, learning_rate=1e30, clip=None))
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trainer": replace(SMALL, evaluate_every=1)}, "evaluate_every is set but there is nothing to score"),
        ({"objective": LearnAlternate()}, "LearnAlternate reads alternate answers and none are given: set alternates"),
        (
            {"objective": Joint(), "retain_loss": NoRetain(), "retain_weight": Fixed()},
            "retain_weight is given and Joint has no retain term here",
        ),
        ({"retain": ()}, "Joint needs retain rows and there are none"),
        ({"scope": Scope(layers=(9,))}, "layer 9 is not in this model"),
        ({"in_place": True, "scope": Scope(lora=Lora(quantize=True))}, "in_place is true with scope.lora.quantize"),
    ],
)
def test_what_cannot_be_is_refused(model: LanguageModel, tiny: Path, settings: dict, message: str) -> None:  # type: ignore[type-arg]
    forget, retain = rows(tiny)
    before = fingerprint(model)
    with pytest.raises(UserError, match=message):
        unlearn.unlearn(model, forget, **{"retain": retain, "scope": SCOPE, "trainer": SMALL, **settings})
    assert fingerprint(model) == before


def test_a_row_on_both_sides_is_refused(model: LanguageModel, tiny: Path) -> None:
    forget, _ = rows(tiny)
    with pytest.raises(UserError, match="is in both the forget and the retain rows"):
        unlearn.unlearn(model, forget, forget, retain_loss=CrossEntropy(), scope=SCOPE, trainer=SMALL)


@pytest.mark.parametrize("function", [unlearn.unlearn, unlearn.attack])
def test_the_example_in_the_help(function: object) -> None:
    (example,) = doctest.DocTestFinder().find(function, "example", globs={})
    assert len(example.examples) > 3
    result = doctest.DocTestRunner().run(example)
    assert result.failed == 0
