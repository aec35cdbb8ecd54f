"""The result as a plain Hugging Face folder: whatever was sharded, wrapped or adapted, `from_pretrained` reads it."""

from __future__ import annotations

import json

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lm.run_folder import RunFolder, write_json
from lm.shards import gather, reshard
from unlearn.scope import lora

MODEL = "model"


def gather_weights(
    model: nn.Module, *, main: bool, dtype: torch.dtype | None = None, dense: nn.Module | None = None
) -> dict[str, Tensor]:
    """Every parameter and saved buffer, whole, on the main process's CPU (tied ones once). Every process must call it.

    Args:
        dense: where all but the adapters is taken from, if `model` holds it quantized.
    """
    own = _saved(model)
    if dense is not None:
        own = {**_saved(dense), **{name: tensor for name, tensor in own.items() if lora.merged_name(name) is None}}
    weights: dict[str, Tensor] = {}
    for name, tensor in own.items():
        whole = gather(tensor)
        if main:
            weights[name] = whole.contiguous()
    if not main:
        return {}
    merged = lora.merge(model, weights, dtype=dtype)  # before anything is rounded
    return {
        name: tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
        for name, tensor in merged.items()
    }


def _saved(model: nn.Module) -> dict[str, Tensor]:
    reshard(model)
    kept = set(model.state_dict().keys())
    return {name: tensor for name, tensor in [*model.named_parameters(), *model.named_buffers()] if name in kept}


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    run: RunFolder,
    *,
    dtype: torch.dtype | None = None,
    dense: PreTrainedModel | None = None,
) -> None:
    """Write `model/` in the run folder, atomically: config, safetensors, tokenizer. Every process must call it.

    Args:
        dtype: the type on disk; None keeps the type that was trained in. In that type frozen weights are bit-identical.
        dense: the model as it was loaded, if `model` holds its frozen weights quantized; the main process's will do.
    """
    weights = gather_weights(model, main=run.main, dtype=dtype, dense=dense)
    if run.main:
        with run.writing(MODEL) as folder:
            (dense or model).save_pretrained(folder, state_dict=weights)
            tokenizer.save_pretrained(folder)
            if dtype is not None:  # save_pretrained writes the type of the model in memory
                config = json.loads((folder / "config.json").read_text())
                key = "dtype" if "dtype" in config else "torch_dtype"
                write_json(folder / "config.json", {**config, key: str(dtype).removeprefix("torch.")})
