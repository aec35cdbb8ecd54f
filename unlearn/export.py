"""The result as a plain Hugging Face folder: whatever was sharded, wrapped or adapted, `from_pretrained` reads it.

It is the input's own files with other weights, so that every version of transformers that read the input reads it. Nothing is
moved into place before it was loaded again and found to be, to the bit, what is in memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lm.errors import UserError
from lm.hub import CONFIGS, find_folder
from lm.loading import load
from lm.model import DTYPES, ModelSpec, tokenizer_fingerprint
from lm.run_folder import RunFolder
from lm.shards import gather, reshard
from unlearn import model_files
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
    tokenizer: PreTrainedTokenizerFast,
    run: RunFolder,
    *,
    source: ModelSpec | None = None,
    dtype: torch.dtype | None = None,
    dense: PreTrainedModel | None = None,
) -> None:
    """Write `model/` in the run folder, atomically: config, safetensors, tokenizer. Every process must call it.

    Args:
        source: what `model` was loaded from, whose config and tokenizer are copied; None writes them as they are in memory.
        dtype: the type on disk; None keeps the type that was trained in. In that type frozen weights are bit-identical.
        dense: the model as it was loaded, if `model` holds its frozen weights quantized; the main process's will do.

    Raises:
        UserError: what was written does not load, or is not what is in memory (in `dtype` a weight is too large, say); then
            nothing is moved into place.
    """
    weights = gather_weights(model, main=run.main, dtype=dtype, dense=dense)
    if run.main:
        whole = dense or model
        for name, tensor in weights.items():
            if not bool(tensor.isfinite().all()):
                raise UserError(
                    f"the weight {name} is too large for {str(tensor.dtype).removeprefix('torch.')}: set save_dtype to bfloat16 "
                    "or null and run again with --resume true; the checkpoints are kept"
                )
        with run.writing(MODEL) as folder:
            whole.save_pretrained(folder, state_dict=weights)
            if source is None:
                tokenizer.save_pretrained(folder)
            else:
                revision = None if source.tokenizer else source.revision
                model_files.copy_tokenizer(source.tokenizer or source.path, folder, revision=revision)
                _copy_config(whole, source, folder)
            model_files.set_config(folder, dtype=dtype or whole.dtype)
            model_files.for_every_version(folder, tokenizer)
            _read_back(folder, whole, tokenizer, weights, dtype or whole.dtype)


def _copy_config(model: PreTrainedModel, source: ModelSpec, folder: Path) -> None:
    """The source's config in place of what transformers wrote, whose keys older versions pass over (`rope_parameters`)."""
    found = find_folder(source.path, CONFIGS, revision=source.revision)
    if model_files.read_config(found).get("model_type") != model.config.model_type:
        return  # a part of what the source holds, with a config of its own
    model_files.copy_config(found, folder)
    model_files.set_config(folder, tied=bool(model.config.tie_word_embeddings), plain=True)


def _read_back(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    weights: dict[str, Tensor],
    dtype: torch.dtype,
) -> None:
    """Raise UserError unless the folder loads as what is in memory."""
    names = {kind: name for name, kind in DTYPES.items()}
    try:
        again = load(ModelSpec(path=str(folder), dtype=names[dtype], device="cpu"))  # type: ignore[arg-type]
    except UserError as error:
        raise UserError(f"what was to be exported cannot be used, and the checkpoints are kept: {error}") from error
    found = _saved(again.model)
    odd = sorted(weights.keys() ^ found.keys()) or [
        name for name, tensor in weights.items() if not torch.equal(tensor, found[name])
    ]
    settings = _settings(model), _settings(again.model)
    odd += [f"{key} of the config" for key in settings[0].keys() | settings[1].keys() if _differ(*settings, key)]
    if tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(again.tokenizer):
        odd.append("the tokenizer")
    odd += [
        f"{name} of the tokenizer"
        for name in ("eos_token", "bos_token", "pad_token", "chat_template")
        if getattr(tokenizer, name) != getattr(again.tokenizer, name)
    ]
    if odd:
        raise UserError(
            f"what was to be exported reads back as another model ({odd[0]} first), and the checkpoints are kept: report this "
            "with the model's name and the versions in manifest.json"
        )


def _settings(model: PreTrainedModel) -> dict[str, Any]:
    """What a model computes with, beside its weights."""
    return {key: value for key, value in model.config.to_dict().items() if key not in model_files.NO_MATTER}


def _differ(one: dict[str, Any], other: dict[str, Any], key: str) -> bool:
    return bool(one.get(key) != other.get(key))
