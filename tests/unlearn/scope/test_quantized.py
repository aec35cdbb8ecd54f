"""QLoRA: four bits while training, the dense model with an update afterwards. Skips without bitsandbytes."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import tiny as tiny_model
from transformers import AutoTokenizer, OlmoConfig, OlmoForCausalLM

from lm.errors import UserError
from tests.unlearn.helpers import SMALL, small_config
from tests.unlearn.training.test_training import losses, weights
from unlearn import export
from unlearn.objectives import NPO
from unlearn.scope import lora
from unlearn.scope.scope import Lora, Scope
from unlearn.stage import run_unlearn

SCOPE = Scope(layers=(1,), modules=("all",), lora=Lora(rank=2, quantize=True))
CPU = torch.device("cpu")
WIDE = {"hidden_size": 64, "intermediate_size": 128}


def test_without_bitsandbytes_it_is_refused_before_anything_loads(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == "bitsandbytes" else find(name, *a))
    monkeypatch.setattr("unlearn.stage.load", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        run_unlearn(small_config(tiny, tmp_path / "run", scope=SCOPE))
    assert not (tmp_path / "run").exists()


def test_combinations_that_cannot_be_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="do not go together"):
        Lora(quantize=True, use_dora=True)
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: object())
    with pytest.raises(UserError, match="DDP, not FSDP"):
        lora.require(Lora(quantize=True), sharded=True)
    lora.require(Lora(), sharded=True)


def test_linear_layers_of_the_blocks_alone_are_quantized() -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    model = tiny_model("qwen2", **WIDE)
    before = {name: p.detach().clone() for name, p in model.model.named_parameters()}
    ids = torch.arange(12).view(1, 12)
    lora.quantize(model.model, model.anatomy, CPU)
    small = {name for name, p in model.model.named_parameters() if p.dtype == torch.uint8}
    assert small == {name for name, p in before.items() if p.ndim == 2 and name.startswith(f"{model.anatomy.blocks}.")}
    again = tiny_model("qwen2", **WIDE).model
    for name in small:
        weight = model.model.get_parameter(name)
        found = functional.dequantize_4bit(weight.data, weight.quant_state)
        assert 0 < float((found - before[name]).norm() / before[name].norm()) < 0.15, (
            "four bits are near, and not the same"
        )
        again.get_parameter(name).data.copy_(found)
    assert torch.allclose(model.model(ids).logits, again(ids).logits, atol=1e-5)
    lora.inject(model.model, model.anatomy, Scope(layers=(1,)).resolve(model.anatomy), Lora(rank=2), seed=0)
    dense = tiny_model("qwen2", **WIDE).model
    merged = export.gather_weights(model.model, main=True, dense=dense)
    assert merged.keys() == before.keys() | {name for name, _ in dense.named_buffers() if name in dense.state_dict()}
    assert all(torch.equal(merged[name], value) for name, value in before.items()), "nothing was learned yet"
    with pytest.raises(UserError, match="reads 32 numbers, no multiple of 64"):
        lora.quantize(tiny_model("qwen2").model, model.anatomy, CPU)
    gpt2 = tiny_model("gpt2")
    with pytest.raises(UserError, match="no plain linear layers"):
        lora.quantize(gpt2.model, gpt2.anatomy, CPU)


def test_a_run_saves_a_dense_model_whose_frozen_weights_are_bit_identical(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    wide = tmp_path / "wide"
    AutoTokenizer.from_pretrained(tiny / "model").save_pretrained(wide)
    OlmoForCausalLM(OlmoConfig.from_pretrained(tiny / "model", **WIDE)).save_pretrained(wide)
    config = small_config(tiny, tmp_path / "run", scope=SCOPE, objective=NPO())
    config = replace(config, model=replace(config.model, path=str(wide)))
    after, before = weights(run_unlearn(config)), weights(wide)
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        if name.startswith("model.layers.1."):
            assert 1 <= torch.linalg.matrix_rank(after[name] - tensor, rtol=1e-3) <= 2, name
        else:
            assert torch.equal(after[name], tensor), name
    recomputed = replace(config, out=str(tmp_path / "two"), trainer=replace(SMALL, gradient_checkpointing=True))
    run_unlearn(recomputed)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "run"), rel=1e-5)
