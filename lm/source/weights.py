"""The weights of a model as its files have them, whole: none missing, none left over, none read as another number than is meant.

Quantized files are made plain where that is exact up to one rounding (FP8 with its scales), and refused otherwise: what is
trained or measured here is a plain model, and so is what is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from logging import ERROR
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from lm.errors import UserError, one_line
from lm.hub import BROKEN
from lm.model import DTYPES, Attention, Dtype

_SCALE = ".weight_scale_inv"
_NO_WEIGHTS = (_SCALE, ".activation_scale", ".input_scale")
"""What stands in an FP8 file beside the weights: what they are multiplied by, and how an FP8 kernel would round its input."""


def load_weights(name: str, folder: Path, *, dtype: Dtype, attention: Attention | None) -> PreTrainedModel:
    """The causal language model of a folder, in `dtype`, on the CPU.

    Raises UserError, calling the model `name`, for weights that are damaged, missing, of another shape, more than the config
    asks for (but for those that transformers itself leaves out), or quantized in a way that is not known here.
    """
    method = quantization(name, folder)
    if method != "fp8":
        require_plain(name, folder)
    options: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    if method is not None:
        options["config"] = _plain_config(folder)
    try:
        with _quiet():
            result: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=DTYPES[dtype],
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # so that they are listed, and refused below by name
                **options,
            )
    except ImportError as error:
        raise UserError(f"{name} needs a package that is not here, or another attention: {one_line(error)}") from error
    except BROKEN as error:
        if attention is not None and isinstance(error, ValueError):
            _require_attention(name, folder, attention)
        raise UserError(f"{name} cannot be loaded, mend or replace its files: {one_line(error)}") from error
    model, info = result
    assert isinstance(model, PreTrainedModel)
    for what, names in (("lacks", info["missing_keys"]), ("has another shape for", info["mismatched_keys"])):
        if names:
            first = sorted(key if isinstance(key, str) else key[0] for key in names)[0]
            raise UserError(f"{name}: the checkpoint {what} {len(names)} weights, {first} first: use one saved whole")
    scales = {} if method is None else _scales(folder)
    over = sorted(key for key in info["unexpected_keys"] if not (scales and key.endswith(_NO_WEIGHTS)))
    if over:
        raise UserError(
            f"{name}: the checkpoint holds {len(over)} weights that its config.json does not ask for, {over[0]} first: mend "
            "config.json (layers, biases), or take them out of the file"
        )
    if method is not None:
        _multiply(name, folder, model, scales, DTYPES[dtype])
    return model


def outline(config: PretrainedConfig, **options: Any) -> PreTrainedModel:
    """The causal language model of a config with all its parts and no numbers in them."""
    with torch.device("meta"), _quiet():
        model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False, **options)  # type: ignore[no-untyped-call]
    assert isinstance(model, PreTrainedModel)
    return model


def _require_attention(name: str, folder: Path, attention: Attention) -> None:
    """Raise UserError if it is the architecture that lacks the attention, whatever its files are."""
    try:
        outline(AutoConfig.from_pretrained(folder, trust_remote_code=False), attn_implementation=attention)
    except ValueError as error:
        raise UserError(
            f"the architecture of {name} lacks the attention {attention!r}, use another or leave it out: {one_line(error)}"
        ) from error


def require_plain(name: str, folder: Path) -> None:
    """Raise UserError if the weights of a folder are quantized, or are codes with nothing that says what they stand for."""
    method = quantization(name, folder)
    if method is not None:
        raise UserError(
            f"{name} is quantized ({method}), and plain weights are needed: give the model that it was made from, or make a "
            "plain one with from_pretrained, dequantize and save_pretrained"
        )
    try:
        kinds = [(tensor, kind) for tensor, kind, _ in tensors(folder)]
    except BROKEN as error:
        raise UserError(f"{name} cannot be loaded, mend or replace its files: {one_line(error)}") from error
    for tensor, kind in kinds:
        if kind.startswith("F8") or (kind in ("I8", "U8", "I32") and tensor.endswith("weight")):
            raise UserError(
                f"{name} stores {tensor} as {kind}, and its config.json does not say how it was quantized: restore the "
                "quantization_config, or give the model that it was made from"
            )


def quantization(name: str, folder: Path) -> str | None:
    """How the weights of a folder are quantized, by the name that transformers has for it; None if they are plain."""
    try:
        config, _ = PretrainedConfig.get_config_dict(folder)
    except BROKEN as error:
        raise UserError(f"{name} has a damaged config.json, restore it: {one_line(error)}") from error
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):  # also a text_config's
        found = part.get("quantization_config") or part.get("compression_config")
        if found:
            return str(found.get("quant_method", "unknown")) if isinstance(found, dict) else str(found)
    return None


def tensors(folder: Path) -> Iterator[tuple[str, str, Path]]:
    """`(name, type as safetensors calls it, file)` of every tensor of a model's files; nothing is read but their heads."""
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (a file handle, not a dict)
                yield name, str(opened.get_slice(name).get_dtype()), file


def _plain_config(folder: Path) -> PretrainedConfig:
    config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    for part in {id(each): each for each in (config, config.get_text_config())}.values():
        part.__dict__.pop("quantization_config", None)
    return config


def _scales(folder: Path) -> dict[str, Tensor]:
    """Name of each FP8 weight -> what its blocks are multiplied by: (rows / block, columns / block), or one number."""
    found = {}
    for name, _, file in tensors(folder):
        if name.endswith(_SCALE):
            with safe_open(file, framework="pt") as opened:
                found[name.removesuffix("_scale_inv")] = opened.get_tensor(name).float()
    return found


@torch.no_grad()
def _multiply(name: str, folder: Path, model: PreTrainedModel, scales: dict[str, Tensor], dtype: torch.dtype) -> None:
    """`w = w8 * s`, each block with its own scale; in float32, rounded once. Every FP8 number is exact in every type here."""
    config, _ = PretrainedConfig.get_config_dict(folder)
    asked = config["quantization_config"].get("weight_block_size")
    weights = dict(model.named_parameters())
    stored = {tensor for tensor, kind, _ in tensors(folder) if kind.startswith("F8")}
    for tensor in sorted(stored ^ scales.keys() | scales.keys() - weights.keys()):
        raise UserError(
            f"{name} is quantized (fp8) in a way that is not known here (the scale of {tensor}): give the model that it was "
            "made from"
        )
    for tensor, scale in scales.items():
        weight = weights[tensor]
        block = asked if asked and scale.numel() > 1 else weight.shape
        if scale.numel() > 1 and [-(-size // one) for size, one in zip(weight.shape, block, strict=True)] != [
            *scale.shape
        ]:
            raise UserError(
                f"{name}: the scale of {tensor} has shape {tuple(scale.shape)}, which blocks of {block} in {tuple(weight.shape)} "
                "do not: restore weight_block_size in config.json"
            )
        wide = scale
        for dim, one in enumerate(block if scale.numel() > 1 else ()):
            wide = wide.repeat_interleave(one, dim=dim).narrow(dim, 0, weight.shape[dim])
        weight.data = (weight.float() * wide).to(dtype)  # transformers 4 left it in 8 bits


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' table of missing weights: `load` says it in a sentence."""
    before = logging.get_verbosity()
    logging.set_verbosity(ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)
