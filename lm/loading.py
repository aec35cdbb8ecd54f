"""Load the language model under study: a hub id, a folder, or the built-in one, ready to trace, train and score.

Safetensors only, no code from the hub, every weight present and finite, a fast tokenizer with an EOS token, an
architecture whose parts have names that were checked. Anything else ends in one sentence. Placement on many devices
is not done here (`lm.devices`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from logging import ERROR
from pathlib import Path
from typing import Any, get_args

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from lm.anatomy import anatomy_of, known_architecture
from lm.checks import check_anatomy, check_weights
from lm.errors import UserError
from lm.hub import ADAPTER, CONFIGS, TOKENIZER_FILES, WEIGHTS, find_folder, one_line, require_model_files
from lm.model import DTYPES, Attention, Dtype, LanguageModel, ModelSpec

BROKEN = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
)
"""What transformers, peft and safetensors raise for files that are damaged or do not fit."""


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
    spec = replace(base, **{key: value for key, value in replaced.items() if value is not None})
    for what, value, choices in (("dtype", spec.dtype, Dtype), ("attention", spec.attention, Attention)):
        if value is not None and value not in get_args(choices):
            raise UserError(f"the {what} {value!r} is unknown: use one of {', '.join(get_args(choices))}")
    target = _device(spec.device)
    folder = find_folder(spec.path, CONFIGS + WEIGHTS, revision=spec.revision)
    require_model_files(spec.path, folder)
    _require_known(spec.path, folder)
    own_tokenizer = _load_tokenizer(spec, folder)
    adapter_folder = find_folder(spec.adapter, ADAPTER) if spec.adapter else None
    model = _load_weights(spec, folder)
    if spec.adapter and adapter_folder:
        model = _merge_adapter(model, spec.adapter, adapter_folder)
    check_weights(model, spec.path)
    nn.Module.to(model, target).train(False)
    loaded = LanguageModel(model, own_tokenizer, anatomy_of(model), spec.path)
    _require_fit(loaded)
    check_anatomy(loaded)
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


def _require_known(name: str, folder: Path) -> None:
    """Raise UserError for a config that is damaged, or of an architecture that `lm.anatomy` does not know."""
    try:
        config, _ = PretrainedConfig.get_config_dict(folder)
        if "model_type" not in config:
            raise UserError(f"{name} has no model_type in its config.json: give a folder that save_pretrained wrote")
        known_architecture(config["model_type"])
        for key in ("attn_implementation", "_attn_implementation"):  # another value may name code on the hub
            if config.get(key) not in (None, *get_args(Attention)):
                raise UserError(
                    f"{name} asks for the attention {config[key]!r} in its config.json, which is not one of "
                    f"{', '.join(get_args(Attention))}: take the key {key} out, no code is fetched"
                )
        AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except UserError:
        raise
    except BROKEN as error:
        raise UserError(f"{name} has a damaged config.json, restore it: {one_line(error)}") from error


def _load_weights(spec: ModelSpec, folder: Path) -> PreTrainedModel:
    options: dict[str, Any] = {} if spec.attention is None else {"attn_implementation": spec.attention}
    try:
        with _quiet():
            result: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=DTYPES[spec.dtype],
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # so that they are listed, and refused below by name
                **options,
            )
    except ImportError as error:
        raise UserError(
            f"{spec.path} needs a package that is not here, or another attention: {one_line(error)}"
        ) from error
    except BROKEN as error:
        raise UserError(f"{spec.path} cannot be loaded, mend or replace its files: {one_line(error)}") from error
    model, info = result
    for what, names in (("lacks", info["missing_keys"]), ("has another shape for", info["mismatched_keys"])):
        if names:
            first = sorted(key if isinstance(key, str) else key[0] for key in names)[0]
            raise UserError(
                f"{spec.path}: the checkpoint {what} {len(names)} weights, {first} first: use one saved whole"
            )
    assert isinstance(model, PreTrainedModel)
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' table of missing weights: `load` says it in a sentence."""
    before = logging.get_verbosity()
    logging.set_verbosity(ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _load_tokenizer(spec: ModelSpec, model_folder: Path) -> PreTrainedTokenizerFast:
    name = spec.tokenizer or spec.path
    folder = find_folder(spec.tokenizer, CONFIGS) if spec.tokenizer else model_folder
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        raise UserError(f"{name} has no tokenizer files: pass the folder or hub id that has them as tokenizer")
    try:
        tokens: Any = AutoTokenizer.from_pretrained(folder, use_fast=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
        raise UserError(
            f"the tokenizer of {name} cannot be loaded, mend it or pass another as tokenizer: {one_line(error)}"
        ) from error
    if not isinstance(tokens, PreTrainedTokenizerFast):
        raise UserError(f"the tokenizer of {name} is a slow one, without offsets: pass a fast one as tokenizer")
    if tokens.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {name} has no EOS token, so no answer can end: set eos_token in tokenizer_config.json"
        )
    if tokens.pad_token_id is None:
        tokens.pad_token = tokens.eos_token
    return tokens


def _require_fit(model: LanguageModel) -> None:
    """Raise UserError for a tokenizer that is larger than the model's embedding matrix.

    Added tokens may lie beyond it (Gemma-3's image token does); those in use may not.
    """
    tokens = model.tokenizer
    largest = max(tokens.vocab_size - 1, tokens.eos_token_id or 0, tokens.bos_token_id or 0)
    if largest >= model.anatomy.vocabulary:
        raise UserError(
            f"{model.name}: the tokenizer has ids up to {largest} but the model has only {model.anatomy.vocabulary} "
            "embeddings: pass the tokenizer that belongs to it as tokenizer"
        )


def _merge_adapter(model: PreTrainedModel, name: str, folder: Path) -> PreTrainedModel:
    """Merge a PEFT adapter into the weights, refusing one whose tensors do not match the model one for one."""
    from peft import PeftModel, get_peft_model_state_dict

    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise UserError(f"the adapter {name} has no adapter_model.safetensors: save it again as safetensors")
    try:
        with safe_open(weights, framework="pt") as file:
            stored = set(file.keys())
        wrapped = PeftModel.from_pretrained(model, str(folder), is_trainable=False)
        odd = sorted(stored ^ set(get_peft_model_state_dict(wrapped)))
        merged = wrapped.merge_and_unload()
    except BROKEN as error:
        raise UserError(f"the adapter {name} cannot be merged into this model: {one_line(error)}") from error
    if odd:
        raise UserError(f"the adapter {name} does not fit this model, {odd[0]} first: use the base it was made for")
    assert isinstance(merged, PreTrainedModel)
    return merged
