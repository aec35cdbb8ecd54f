"""Adapters stay inside their scope, are merged exactly, and refuse what they cannot adapt."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lm.errors import UserError
from lm.loading import load
from lm.model import LanguageModel
from lm.run_folder import RunFolder
from tests.lm.families import tiny as tiny_model
from tests.unlearn.helpers import SMALL, small_config
from tests.unlearn.training.test_training import losses, weights
from unlearn import export
from unlearn.objectives import NPO
from unlearn.scope import lora
from unlearn.scope.scope import Lora, Scope
from unlearn.stage import run_unlearn


def test_lora_is_merged_into_its_scope(tiny: Path, tmp_path: Path) -> None:
    scope = Scope(layers=(1,), lora=Lora(rank=2, alpha=4))
    after, before = weights(run_unlearn(small_config(tiny, tmp_path / "run", scope=scope))), weights(tiny / "model")
    assert after.keys() == before.keys()
    for name in before:
        update = after[name] - before[name]
        if name.startswith("model.layers.1.mlp."):
            assert 1 <= torch.linalg.matrix_rank(update, rtol=1e-3) <= 2, name
        else:
            assert torch.equal(after[name], before[name]), name


@pytest.mark.parametrize("use_dora", [False, True])
def test_lora_in_memory_and_on_disk_say_the_same(tiny: Path, tmp_path: Path, use_dora: bool) -> None:
    model = load(str(tiny / "model"), device="cpu")
    adapted(model, Scope(layers=(0, 1, 2), modules=("all",)), use_dora=use_dora)
    ids = torch.arange(12).view(1, 12)
    said = model.model(ids).logits
    export.save(model.model, model.tokenizer, RunFolder(tmp_path))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(plain(ids).logits, said, rtol=1e-4, atol=1e-4)


def adapted(model: LanguageModel, scope: Scope, *, use_dora: bool = False) -> None:
    """Inject, and give the second factor (and the lengths) values, so that the adapters matter."""
    resolved = scope.resolve(model.anatomy)
    lora.inject(model.model, model.anatomy, resolved, Lora(rank=3, use_dora=use_dora), seed=0)
    with torch.no_grad():
        for name, parameter in model.model.named_parameters():
            generator = torch.Generator().manual_seed(len(name))
            if ".lora_B." in name:
                parameter.normal_(generator=generator)
            if ".lora_magnitude_vector." in name:
                parameter.mul_(0.5 + torch.rand(parameter.shape, generator=generator))


@pytest.mark.parametrize("use_dora", [False, True])
def test_gpt2_keeps_its_weights_the_other_way_round(use_dora: bool) -> None:
    model = tiny_model("gpt2")
    adapted(model, Scope(layers=(1,), modules=("mlp",)), use_dora=use_dora)
    inside = {name.partition(".lora_")[0] for name, p in model.model.named_parameters() if p.requires_grad}
    assert inside == {"transformer.h.1.mlp.c_fc", "transformer.h.1.mlp.c_proj"}
    ids = torch.arange(12).view(1, 12)
    said = model.model(ids).logits
    merged = export.gather_weights(model.model, main=True)
    plain = tiny_model("gpt2", seed=1).model
    plain.load_state_dict(merged, strict=False)
    torch.testing.assert_close(plain(ids).logits, said, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(tiny_model("gpt2").model(ids).logits, said, atol=1e-3)


def test_stacked_experts_are_refused_and_the_attention_beside_them_is_not() -> None:
    model = tiny_model("olmoe")
    with pytest.raises(UserError, match=r"experts.*scope\.modules to attn"):
        adapted(model, Scope(layers=(0,), modules=("mlp",)))
    adapted(model, Scope(layers=(0,), modules=("attn",)))
    assert any(".lora_A." in name for name, _ in model.model.named_parameters())


def test_a_tied_head_is_not_adapted_through_its_other_name(tiny: Path) -> None:
    model = load(str(tiny / "model"), device="cpu")
    head: nn.Module = model.model.get_submodule(model.anatomy.head)
    adapted(model, Scope(layers="model"))
    assert model.model.get_submodule(model.anatomy.head) is head
    assert any("layers.2.mlp" in name and ".lora_A." in name for name, _ in model.model.named_parameters())


def test_the_sum_is_rounded_once() -> None:
    model = tiny_model("olmo")
    adapted(model, Scope(layers=(1,)))
    whole = export.gather_weights(model.model, main=True)
    rounded = export.gather_weights(model.model, main=True, dtype=torch.bfloat16)
    assert rounded.keys() == whole.keys()
    for name, tensor in whole.items():
        assert torch.equal(rounded[name], tensor.to(torch.bfloat16)), name


@pytest.mark.parametrize("lora", [Lora(rank=2, alpha=4), Lora(rank=2, use_dora=True)], ids=["lora", "dora"])
def test_adapters_learn_under_gradient_checkpointing(tiny: Path, tmp_path: Path, lora: Lora) -> None:
    """Other frameworks' adapters learn nothing there, since no input of a recomputed layer requires a gradient."""
    scope = Scope(layers=(0, 2), modules=("all",), lora=lora)
    found = {}
    for name in ("plain", "checkpointing"):
        trainer = replace(SMALL, gradient_checkpointing=name == "checkpointing")
        config = small_config(tiny, tmp_path / name, scope=scope, trainer=trainer, objective=NPO())
        found[name] = weights(run_unlearn(config))
    assert losses(tmp_path / "plain") == pytest.approx(losses(tmp_path / "checkpointing"), rel=1e-6)
    before = weights(tiny / "model")
    for name, tensor in before.items():
        inside = name.startswith(("model.layers.0.", "model.layers.2.")) and tensor.ndim == 2
        assert torch.equal(found["checkpointing"][name], tensor) != inside, name
        torch.testing.assert_close(found["checkpointing"][name], found["plain"][name], rtol=1e-4, atol=1e-6, msg=name)


def test_lengths_alone_may_change_with_dora(tiny: Path, tmp_path: Path) -> None:
    """With the direction left as it was, an output's row keeps its direction and gets another length."""
    model = load(str(tiny / "model"), device="cpu")
    before = {name: p.detach().clone() for name, p in model.model.named_parameters()}
    lora.inject(model.model, model.anatomy, Scope(layers=(1,)).resolve(model.anatomy), Lora(use_dora=True), seed=0)
    with torch.no_grad():
        for name, parameter in model.model.named_parameters():
            if ".lora_magnitude_vector." in name:
                parameter.mul_(3.0)
    after = export.gather_weights(model.model, main=True)
    for name, tensor in before.items():
        factor = 3.0 if name.startswith("model.layers.1.mlp.") else 1.0
        torch.testing.assert_close(after[name], factor * tensor, msg=name)
