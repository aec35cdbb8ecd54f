"""The shipped built-in models meet the bounds that every demonstration rests on; so do rebuilt ones (slow)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import lm.builtin
from lm.builtin import VARIANTS, Variant, model_path
from lm.builtin.world import World
from lm.builtin.world import build as build_world
from lm.errors import UserError
from tools.builtin_model import build
from tools.builtin_model.bounds import Abilities, bounds
from tools.builtin_model.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def world() -> World:
    return build_world(0)


@pytest.fixture(scope="module")
def abilities(world: World) -> dict[Variant, Abilities]:
    return {variant: build.measure_stored(model_path(variant), world) for variant in VARIANTS}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_bound_holds(variant: Variant, abilities: dict[Variant, Abilities]) -> None:
    missed = [bound for bound in bounds(variant, abilities[variant]) if not bound.holds]
    assert not missed


def test_the_retain_model_knows_nothing_of_the_forget_side(abilities: dict[Variant, Abilities]) -> None:
    retain_model = abilities["retain_model"]
    assert retain_model.forget_exact == 0.0
    assert retain_model.forget_recall <= 0.15
    assert retain_model.task_aggregate >= 0.95


def test_a_memorizing_model_scores_zero_on_the_task_aggregate(abilities: dict[Variant, Abilities]) -> None:
    assert abilities["memorized"].task_aggregate < 0.05


def test_the_weights_are_small_float16_and_share_a_tokenizer(world: World) -> None:
    root = model_path("memorized").parent
    assert sum(path.stat().st_size for path in root.rglob("*") if path.is_file()) <= 10_000_000
    for variant in VARIANTS:
        with safe_open(model_path(variant) / "model.safetensors", framework="pt") as file:
            kinds = {file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
        assert kinds == {torch.float16}
    stored = [(model_path(variant) / "tokenizer.json").read_text(encoding="utf-8") for variant in VARIANTS]
    assert stored[0] == stored[1]
    assert stored[0].strip() == train_tokenizer(world).backend_tokenizer.to_str(pretty=True).strip()


def test_an_unknown_or_missing_model_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="retain_model"):
        model_path("retain-only")  # type: ignore[arg-type]
    monkeypatch.setattr(lm.builtin, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(UserError, match="python -m tools\\.builtin_model\\.build"):
        model_path("memorized")


@pytest.mark.slow
def test_rebuilt_models_meet_the_same_bounds(tmp_path: Path) -> None:
    built = build.build_all(tmp_path / "weights")
    print(build.table(built))
    assert [model.variant for model in built] == list(VARIANTS)
    missed = [(model.variant, bound) for model in built for bound in model.bounds if not bound.holds]
    assert not missed
    assert (tmp_path / "weights" / "retain_model" / "model.safetensors").is_file()
