"""Load the language model under study: a hub id, a folder, or the built-in one, ready to trace, train and score.

Safetensors only, no code from the hub, every weight present and finite, a fast tokenizer with an EOS token, an
architecture whose parts have names that were checked. Anything else ends in one sentence. Placement on many devices
is not done here (`lm.devices`).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from lm.anatomy import KNOWN, anatomy_of
from lm.checks import check_anatomy, check_positions, check_weights
from lm.errors import UserError, one_line
from lm.hub import ADAPTER, BROKEN, CONFIGS, WEIGHTS, find_folder, require_model_files
from lm.model import Attention, Dtype, LanguageModel, ModelSpec
from lm.source.adapter import merge_adapter
from lm.source.tokenizer import load_tokenizer
from lm.source.weights import load_weights, outline


def load(
    spec: str | ModelSpec,
    *,
    dtype: Dtype | None = None,
    device: str | None = None,
    attention: Attention | None = None,
    revision: str | None = None,
    adapter: str | None = None,
    tokenizer: str | None = None,
) -> LanguageModel:
    """Load a model for study, in eval mode. Keywords that are given replace the spec's.

    Raises UserError for a model that is missing, damaged, incomplete, not in safetensors, of an unknown architecture or
    without a usable tokenizer. What can be refused cheaply is refused before the weights are read.
    """
    replaced: dict[str, Any] = {
        "dtype": dtype,
        "device": device,
        "attention": attention,
        "revision": revision,
        "adapter": adapter,
        "tokenizer": tokenizer,
    }
    base = ModelSpec(path=spec) if isinstance(spec, str) else spec
    _device(base.device)  # what a config asks for must be there, also where a stage puts the model elsewhere at first
    spec = replace(base, **{key: value for key, value in replaced.items() if value is not None})
    for what, value, choices in (("dtype", spec.dtype, Dtype), ("attention", spec.attention, Attention)):
        if value is not None and value not in get_args(choices):
            raise UserError(f"the {what} {value!r} is unknown: use one of {', '.join(get_args(choices))}")
    target = _device(spec.device)
    folder = find_folder(spec.path, CONFIGS + WEIGHTS, revision=spec.revision)
    require_model_files(spec.path, folder)
    config = _known_config(spec.path, folder)
    tokenizer_folder = find_folder(spec.tokenizer, CONFIGS) if spec.tokenizer else folder
    own_tokenizer = load_tokenizer(spec.tokenizer or spec.path, tokenizer_folder, config)
    adapter_folder = find_folder(spec.adapter, ADAPTER) if spec.adapter else None
    model = load_weights(spec.path, folder, dtype=spec.dtype, attention=spec.attention)
    if spec.adapter and adapter_folder:
        model = merge_adapter(model, spec.adapter, adapter_folder)
    check_weights(model, spec.path)
    nn.Module.to(model, target).train(False)
    loaded = LanguageModel(model, own_tokenizer, anatomy_of(model), spec.path)
    _require_fit(loaded)
    check_anatomy(loaded)
    check_positions(loaded)
    return loaded


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(f"the device {name!r} is not there: use cpu, or leave device out to take what is") from None
    return device


def _known_config(name: str, folder: Path) -> PretrainedConfig:
    """The config. Raises UserError for one that is damaged, or of an architecture whose parts `lm.anatomy` cannot name."""
    try:
        config, _ = PretrainedConfig.get_config_dict(folder)
        if "model_type" not in config:
            raise UserError(f"{name} has no model_type in its config.json: give a folder that save_pretrained wrote")
        if config["model_type"] not in CONFIG_MAPPING:
            raise UserError(
                f"{name} is of the architecture {config['model_type']!r}, which transformers {transformers.__version__} does not "
                "have: use one that has it, or another model"
            )
        for key in ("attn_implementation", "_attn_implementation"):  # another value may name code on the hub
            if config.get(key) not in (None, *get_args(Attention)):
                raise UserError(
                    f"{name} asks for the attention {config[key]!r} in its config.json, which is not one of "
                    f"{', '.join(get_args(Attention))}: take the key {key} out, no code is fetched"
                )
        known: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        text = known.get_text_config()
        pad, rows = getattr(text, "pad_token_id", None), getattr(text, "vocab_size", None)
        if isinstance(pad, int) and isinstance(rows, int) and pad >= rows:
            raise UserError(
                f"{name} has pad_token_id {pad} in its config.json and a vocab_size of {rows}: set pad_token_id to null, or to a "
                "token that the model has"
            )
    except UserError:
        raise
    except BROKEN as error:
        raise UserError(f"{name} has a damaged config.json, restore it: {one_line(error)}") from error
    if known.model_type not in KNOWN:
        try:
            empty = outline(known)
        except BROKEN as error:
            raise UserError(
                f"the architecture {known.model_type!r} of {name} is none of a causal language model, use another model: "
                f"{one_line(error)}"
            ) from error
        anatomy_of(empty)
    return known


def _require_fit(model: LanguageModel) -> None:
    """Raise UserError for a tokenizer that is larger than the model's embedding matrix.

    Added tokens may lie beyond it (Gemma-3's image token does); those in use may not, nor may one that a text holds
    (`lm.prompts.check_ids`).
    """
    tokens = model.tokenizer
    if tokens.pad_token_id is not None and tokens.pad_token_id >= model.anatomy.vocabulary:
        raise UserError(
            f"{model.name}: the pad token {tokens.pad_token!r} has the id {tokens.pad_token_id} and the model only "
            f"{model.anatomy.vocabulary} embeddings: set pad_token in tokenizer_config.json to one that it has, EOS for instance"
        )
    largest = max(tokens.vocab_size - 1, tokens.eos_token_id or 0, tokens.bos_token_id or 0)
    if largest >= model.anatomy.vocabulary:
        raise UserError(
            f"{model.name}: the tokenizer has ids up to {largest} but the model has only {model.anatomy.vocabulary} "
            "embeddings: pass the tokenizer that belongs to it as tokenizer"
        )
