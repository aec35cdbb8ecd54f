"""Adapters stay inside their scope, are merged exactly, and refuse what they cannot adapt."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lm.errors import UserError
from lm.load import LanguageModel, load
from lm.run import RunFolder
from tests.lm.families import tiny as tiny_model
from tests.unlearn.helpers import small_config
from tests.unlearn.test_training import weights
from unlearn import export, lora
from unlearn.scope import Lora, Scope
from unlearn.stage import run_unlearning


def test_lora_is_merged_into_its_scope(tiny: Path, tmp_path: Path) -> None:
    scope = Scope(layers=(1,), lora=Lora(rank=2, alpha=4))
    after, before = weights(run_unlearning(small_config(tiny, tmp_path / "run", scope=scope))), weights(tiny / "model")
    assert after.keys() == before.keys()
    for name in before:
        update = after[name] - before[name]
        if name.startswith("model.layers.1.mlp."):
            assert 1 <= torch.linalg.matrix_rank(update, rtol=1e-3) <= 2, name
        else:
            assert torch.equal(after[name], before[name]), name


def test_lora_in_memory_and_on_disk_say_the_same(tiny: Path, tmp_path: Path) -> None:
    model = load(str(tiny / "model"), device="cpu")
    scope = Scope(layers=(0, 1, 2), modules=("all",)).resolve(model.anatomy)
    lora.inject(model.model, model.anatomy, scope, Lora(rank=3), seed=0)
    with torch.no_grad():
        for name, parameter in model.model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    ids = torch.arange(12).view(1, 12)
    adapted = model.model(ids).logits
    export.save(model.model, model.tokenizer, RunFolder(tmp_path))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(plain(ids).logits, adapted, rtol=1e-4, atol=1e-4)


def adapted(model: LanguageModel, scope: Scope) -> None:
    """Inject, and give the second factor values, so that the adapters matter."""
    resolved = scope.resolve(model.anatomy)
    lora.inject(model.model, model.anatomy, resolved, Lora(rank=3), seed=0)
    with torch.no_grad():
        for name, parameter in model.model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))


def test_gpt2_keeps_its_weights_the_other_way_round() -> None:
    model = tiny_model("gpt2")
    adapted(model, Scope(layers=(1,), modules=("mlp",)))
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
