"""What is computed once before a run says what it would have said at every step, and survives an interruption."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from families import tiny as tiny_model
from torch import nn

from lm.errors import UserError
from lm.prompts import Encoded
from lm.run_folder import RunFolder
from tests.unlearn.helpers import SMALL, small_config
from tests.unlearn.training.test_training import losses, weights
from tests.unlearn.training.test_training_resume import _Stop, _stop_after
from unlearn.config import UnlearnConfig
from unlearn.forward.passes import Passes, first_block
from unlearn.objectives import NPO, Divergence, HiddenDistance, Joint
from unlearn.scope.scope import Lora, Scope
from unlearn.stage import run_unlearn
from unlearn.training.tensor_store import STORES, stored

LIVE = replace(SMALL, reference="live")


def blocks_run(monkeypatch: pytest.MonkeyPatch, config: UnlearnConfig) -> list[int]:
    """How often each of the three blocks ran in a whole run."""
    counts = [0, 0, 0]

    def count(module: nn.Module, *_: object) -> None:
        counts[module.self_attn.layer_idx] += 1  # type: ignore[union-attr, index]

    handle = nn.modules.module.register_module_forward_pre_hook(
        lambda module, _: count(module) if type(module).__name__ == "OlmoDecoderLayer" else None
    )
    try:
        run_unlearn(config)
    finally:
        handle.remove()
    return counts


@pytest.mark.parametrize("lora", [None, Lora(rank=2)], ids=["weights", "adapters"])
def test_log_probabilities_known_beforehand_are_those_asked_for_live(
    tiny: Path, tmp_path: Path, lora: Lora | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    scope = Scope(layers=(1,), lora=lora)
    cached = small_config(tiny, tmp_path / "cached", objective=NPO(), scope=scope)
    live = small_config(tiny, tmp_path / "live", objective=NPO(), scope=scope, trainer=LIVE)
    monkeypatch.setattr("unlearn.training.loop.reference", lambda _: pytest.fail("the original was kept"))
    once = blocks_run(monkeypatch, cached)
    monkeypatch.undo()
    every = blocks_run(monkeypatch, live)
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "live"), rel=1e-6)
    assert len(set(losses(tmp_path / "cached"))) == SMALL.steps
    steps, forget_micros, retain_micros = 6, 1, 1  # of batch 8 in micro-batches of 4
    check = 2  # the model is checked when it is loaded and when what was written is read back
    assert every[2] == steps * (2 * forget_micros + retain_micros) + check
    assert once[2] == steps * (forget_micros + retain_micros) + 12 // 4 + check, "12 forget rows are drawn, once each"
    assert not (tmp_path / "cached" / STORES).exists(), "a finished run needs none"


@pytest.mark.parametrize(
    "loss",
    [
        {"objective": Joint()},
        {"objective": NPO(), "retain_loss": Divergence()},
        {"objective": NPO(), "retain_loss": HiddenDistance(layer=2)},
        {"objective": Joint(), "scope": Scope(layers=(2,), modules=("all",), lora=Lora(rank=2))},
    ],
    ids=["joint", "npo-divergence", "npo-hidden", "adapters"],
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_below_the_scope_run_once_and_change_nothing(
    tiny: Path, tmp_path: Path, loss: dict[str, object], checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = replace(SMALL, gradient_checkpointing=checkpointing)
    settings = {"scope": Scope(layers=(2,)), **loss}
    usual = small_config(tiny, tmp_path / "usual", trainer=trainer, **settings)
    kept = small_config(tiny, tmp_path / "kept", trainer=replace(trainer, cache_below=True), **settings)
    before, after = blocks_run(monkeypatch, usual), blocks_run(monkeypatch, kept)
    assert losses(tmp_path / "kept") == pytest.approx(losses(tmp_path / "usual"), rel=1e-6)
    one, two = weights(tmp_path / "usual" / "model"), weights(tmp_path / "kept" / "model")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-6, msg=name)
    logprobs = 12 // 4 if isinstance(settings.get("objective"), NPO) else 0
    assert after[2] == before[2] == 2 + logprobs + SMALL.steps * (3 if "retain_loss" in loss else 2)
    assert after[0] == after[1] == 2 + 2 * (12 // 4), (
        "the checks on loading and reading back, and each side's rows once"
    )
    assert before[1] > after[1], "however short the run"


def test_a_scope_that_begins_at_the_bottom_has_nothing_below(tiny: Path, tmp_path: Path) -> None:
    trainer = replace(SMALL, cache_below=True)
    for name, scope in (("a", Scope(layers=(0, 2))), ("b", Scope(layers="model"))):
        with pytest.raises(UserError, match="nothing below the scope stays the same"):
            run_unlearn(small_config(tiny, tmp_path / name, trainer=trainer, scope=scope))


@pytest.mark.parametrize("at", [2, 4])
def test_going_on_is_exact_with_everything_kept(tiny: Path, tmp_path: Path, at: int) -> None:
    trainer = replace(SMALL, cache_below=True)
    config = small_config(tiny, tmp_path / "whole", objective=NPO(), scope=Scope(layers=(2,)), trainer=trainer)
    whole = weights(run_unlearn(config))
    part = replace(config, out=str(tmp_path / "part"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unlearn.training.loop._Loop._milestones", _stop_after(at))
        with pytest.raises(_Stop):
            run_unlearn(part)
    kept = {path.name for path in (tmp_path / "part" / STORES).iterdir()}
    assert {name.rpartition("-")[0] for name in kept} == {"forget-original", "forget-stream-1", "retain-stream-1"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unlearn.forward.passes.Passes.logprobs", lambda *_: pytest.fail("computed again"))
        resumed = weights(run_unlearn(replace(part, resume=True)))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def rows(count: int) -> list[Encoded]:
    return [Encoded([3 + place] * (2 + place % 4), 1) for place in range(count)]


def test_a_store_gives_back_each_row_from_files_of_a_bounded_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unlearn.training.tensor_store._PART", 100)
    texts, asked = rows(11), list[int]()

    def compute(some: list[int]) -> list[torch.Tensor]:
        asked.extend(some)
        return [torch.full((len(texts[place].ids), 3), 3.0 + place) for place in some]

    def make(made_from: str = "weights", used: tuple[int, ...] = (0, 2, 3, 7, 10)) -> Callable[[int], torch.Tensor]:
        store = stored(
            Accelerator(cpu=True), RunFolder(tmp_path), "x", texts, used, compute, made_from=made_from, size=2
        )
        return store.__getitem__

    get = make()
    assert len(list((tmp_path / STORES).glob("x-*/*.safetensors"))) > 1
    for place in (0, 2, 3, 7, 10):
        assert torch.equal(get(place), torch.full((2 + place % 4, 3), 3.0 + place))
    with pytest.raises(KeyError):
        get(1)
    assert len(asked) == 5
    make()
    assert len(asked) == 5, "it was there already"
    make("other weights")
    make(used=(0, 2))
    assert len(asked) == 12, "other content is another store"


@pytest.mark.parametrize("family", ["olmo", "gpt2"])
def test_the_first_block_that_may_change(family: str) -> None:
    model = tiny_model(family)
    for scope, first in (
        (Scope(layers=(1, 2)), 1),
        (Scope(layers="model"), 0),
        (Scope(layers=(2,), modules=("attn",)), 2),
    ):
        scope.resolve(model.anatomy).apply(model.model, model.anatomy)
        assert first_block(model) == first
        assert Passes(Accelerator(cpu=True), model.model, model).start == first
    for name, parameter in model.model.named_parameters():
        parameter.requires_grad_(name.startswith(model.anatomy.norm))
    assert first_block(model) == 3, "only the final norm learns"
