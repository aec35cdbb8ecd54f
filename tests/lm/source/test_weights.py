"""Weights are read as they are meant: FP8 with its scales, nothing left over, nothing that is only a code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import ids, tiny
from safetensors.torch import load_file, save_file
from torch import Tensor

from lm import UserError, load

UP = "model.layers.1.mlp.up_proj.weight"
Weights = dict[str, Tensor]


def saved(folder: Path, edit: Callable[[Weights], Any] = lambda weights: None, /, **config: Any) -> str:
    """A tiny model whose file and config are edited after it was saved."""
    model = tiny("llama", intermediate_size=192, hidden_size=64, head_dim=16)
    model.model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    weights = {name: weight.clone() for name, weight in load_file(folder / "model.safetensors").items()}
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    settings = {**json.loads((folder / "config.json").read_text()), **config}
    (folder / "config.json").write_text(
        json.dumps({key: value for key, value in settings.items() if value is not None})
    )
    return str(folder)


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


def to_fp8(weights: Weights) -> Weights:
    """Blocks of 128 x 128 with a scale each, as the FP8 checkpoints of Qwen and DeepSeek have them; what they stand for."""
    meant = dict(weights)
    for name in [name for name in weights if "proj" in name]:
        rows, columns = weights[name].shape
        scale = 0.001 + 0.001 * torch.rand(
            -(-rows // 128), -(-columns // 128), generator=torch.Generator().manual_seed(1)
        )
        codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
        whole = torch.empty(rows, columns)
        for row in range(rows):
            for column in range(0, columns, 128):
                one = scale[row // 128, column // 128]
                codes[row, column : column + 128] = (weights[name][row, column : column + 128] / one).to(codes.dtype)
                whole[row, column : column + 128] = codes[row, column : column + 128].float() * one
        weights[name], weights[f"{name}_scale_inv"], meant[name] = codes, scale, whole
    return meant


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fp8_blocks_are_multiplied_by_their_scales(dtype: Any, tmp_path: Path) -> None:
    """192 rows are a block of 128 and one of 64. transformers takes two of 96: weight_block_size is right."""
    meant: Weights = {}
    path = saved(tmp_path, lambda weights: meant.update(to_fp8(weights)), quantization_config=FP8)
    model = load(path, dtype=dtype, device="cpu").model
    for name, weight in model.named_parameters():
        assert torch.equal(weight, meant[name].to(weight.dtype)), name
    assert getattr(model.config, "quantization_config", None) is None


def one_scale(weights: Weights) -> None:
    weights[UP] = weights[UP].to(torch.float8_e4m3fn)
    weights[f"{UP}_scale_inv"] = torch.tensor(0.5)


def test_one_scale_for_a_whole_weight(tmp_path: Path) -> None:
    config = {"quant_method": "fp8", "activation_scheme": "static"}
    model = load(saved(tmp_path, one_scale, quantization_config=config), device="cpu").model
    stored = load_file(tmp_path / "model.safetensors")[UP]
    assert torch.equal(model.get_parameter(UP), stored.float() * 0.5)


def no_scale(weights: Weights) -> None:
    one_scale(weights)
    del weights[f"{UP}_scale_inv"]


def odd_scale(weights: Weights) -> None:
    one_scale(weights)
    weights[f"{UP}_scale_inv"] = torch.ones(3, 1)


def integers(weights: Weights) -> None:
    weights[UP] = weights[UP].to(torch.int8)


@pytest.mark.parametrize(
    ("edit", "config", "says"),
    [
        (no_scale, FP8, rf"in a way that is not known here \(the scale of {UP}\)"),
        (odd_scale, FP8, "restore weight_block_size"),
        (no_scale, None, f"stores {UP} as F8_E4M3, and its config.json does not say how"),
        (integers, None, f"stores {UP} as I8, and its config.json does not say how"),
        (lambda w: None, {"quant_method": "gptq", "bits": 4}, r"is quantized \(gptq\), and plain weights are needed"),
        (lambda w: None, {"quant_method": "mxfp4"}, r"is quantized \(mxfp4\)"),
        (lambda w: None, {"quant_method": "compressed-tensors"}, r"is quantized \(compressed-tensors\)"),
        (lambda w: None, {"load_in_4bit": True}, r"is quantized \(unknown\)"),
    ],
)
def test_other_quantized_weights_are_refused(edit: Any, config: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        load(saved(tmp_path, edit, quantization_config=config), device="cpu")


def test_a_quantized_part_of_a_config_is_seen(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is quantized \(awq\)"):
        load(saved(tmp_path, text_config={"quantization_config": {"quant_method": "awq"}}), device="cpu")


def biases(weights: Weights) -> None:
    weights["model.layers.0.mlp.up_proj.bias"] = torch.ones(192)


def test_weights_that_the_config_does_not_ask_for_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds 1 weights that its config.json does not ask for, .*0.mlp.up_proj.bias"):
        load(saved(tmp_path / "bias", biases), device="cpu")
    with pytest.raises(UserError, match=r"does not ask for, model.layers.2.input_layernorm.weight first: mend config"):
        load(saved(tmp_path / "layer", num_hidden_layers=2), device="cpu")


def frequencies(weights: Weights) -> None:
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)


def test_what_transformers_itself_leaves_out_does_no_harm(tmp_path: Path) -> None:
    """Older files hold what is computed from the config today."""
    with torch.no_grad():
        assert load(saved(tmp_path, frequencies), device="cpu").model(ids()).logits.isfinite().all()


def test_an_adapter_beside_a_model_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file({"a": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"holds a model and a PEFT adapter .* folder of their own"):
        load(path, device="cpu")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="is a PEFT adapter: give its base model as path"):
        load(path, device="cpu")


def test_a_pad_token_of_the_config_beyond_the_embeddings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has pad_token_id 100000 in its config.json and a vocab_size of 384"):
        load(saved(tmp_path, pad_token_id=100_000), device="cpu")
