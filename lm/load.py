"""Load the language model under study: a hub id, a folder, or the built-in one, ready to trace, train and score.

Safetensors only, no code from the hub, every weight present and finite, a fast tokenizer with an EOS token, an
architecture whose parts have names that were checked. Anything else ends in one sentence. Placement on many devices
is not done here (`lm.devices`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from lm.anatomy import Anatomy, anatomy_of, known_architecture
from lm.check import check_anatomy, check_weights
from lm.errors import UserError

Dtype = Literal["float32", "bfloat16", "float16"]
Attention = Literal["eager", "sdpa", "flash_attention_2"]
DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
BROKEN = (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError, HfHubHTTPError)
"""What transformers, safetensors and the hub raise for a model that is missing or damaged."""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Which model, and how to hold it. What configs hold."""

    path: str = "builtin"
    """`builtin`, `builtin:retain_only`, a folder, or a hub id."""
    dtype: Dtype = "float32"
    device: str | None = None
    """None: cuda if there is one, else cpu."""
    attention: Attention | None = None
    """None: what transformers chooses."""
    revision: str | None = None
    """A commit, branch or tag of a hub id."""
    adapter: str | None = None
    """A PEFT adapter (folder or hub id), merged into the weights on load."""
    tokenizer: str | None = None
    """Another folder or hub id for the tokenizer, for a model that ships without one."""


@dataclass(frozen=True)
class LanguageModel:
    """A model in eval mode, its tokenizer, and the names of its parts."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    anatomy: Anatomy
    name: str

    @property
    def device(self) -> torch.device:
        """Where the first parameter is: where input ids go."""
        return next(self.model.parameters()).device


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
    without a usable tokenizer.
    """
    given = {
        "dtype": dtype,
        "device": device,
        "attention": attention,
        "revision": revision,
        "adapter": adapter,
        "tokenizer": tokenizer,
    }
    base = ModelSpec(path=spec) if isinstance(spec, str) else spec
    spec = replace(base, **{key: value for key, value in given.items() if value is not None})  # type: ignore[arg-type]
    if spec.dtype not in DTYPES:
        raise UserError(f"the dtype {spec.dtype!r} is unknown: use one of {', '.join(DTYPES)}")
    place = _device(spec.device)
    source = resolve(spec.path)
    model = _load_weights(spec, source)
    if spec.adapter is not None:
        model = _merge_adapter(model, spec.adapter)
    check_weights(model, spec.path)
    tokens = _load_tokenizer(spec, source)
    rows = model.get_input_embeddings().num_embeddings
    # Added tokens may lie beyond the embeddings (Gemma-3's image token does); those in use may not.
    largest = max(tokens.vocab_size - 1, tokens.eos_token_id, tokens.bos_token_id or 0)
    if largest >= rows:
        raise UserError(
            f"{spec.path}: the tokenizer has ids up to {largest} but the model has only {rows} embeddings: pass the "
            "tokenizer that belongs to it as tokenizer"
        )
    nn.Module.to(model, place).train(False)
    loaded = LanguageModel(model, tokens, anatomy_of(model), spec.path)
    check_anatomy(loaded)
    return loaded


def resolve(path: str) -> str:
    """The folder or hub id behind a spec's path. Raises UserError for a path that can be neither."""
    if path == "builtin" or path.startswith("builtin:"):
        from lm.builtin import Variant, model_path

        return str(model_path(cast(Variant, path.partition(":")[2] or "memorised")))
    folder = Path(path).expanduser()
    if folder.is_dir():
        return str(folder)
    if folder.exists():
        raise UserError(f"{path} is a file: give the folder that holds config.json and the safetensors weights")
    looks_local = path.startswith((".", "/", "~")) or path.endswith("/") or path.count("/") > 1 or "\\" in path
    if looks_local or not HUB_ID.fullmatch(path):
        raise UserError(f"the folder {path} does not exist: check it, or give a hub id such as allenai/OLMo-1B-hf")
    return path


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(f"the device {name!r} is not there: use cpu, or leave device out to take what is") from None
    return device


def _load_weights(spec: ModelSpec, source: str) -> PreTrainedModel:
    folder = Path(source)
    if folder.is_dir():
        _require_model_files(spec.path, folder)
    try:
        config = AutoConfig.from_pretrained(source, revision=spec.revision, trust_remote_code=False)
        model_type = str(config.model_type)
    except BROKEN as error:
        raise _unloadable(spec, source, error) from error
    known_architecture(model_type)
    options: dict[str, Any] = {} if spec.attention is None else {"attn_implementation": spec.attention}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            revision=spec.revision,
            dtype=DTYPES[spec.dtype],
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
        model, info = loaded
    except BROKEN as error:
        raise _unloadable(spec, source, error) from error
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"{spec.path}: the checkpoint lacks {len(missing)} weights, {missing[0]} first: use one saved whole"
        )
    assert isinstance(model, PreTrainedModel)
    return model


def _require_model_files(name: str, folder: Path) -> None:
    """The files that a model folder must have, so that a missing one is named here and not deep in a library."""
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise UserError(f"{name} is a PEFT adapter: give its base model as path and {name} as adapter")
        raise UserError(f"{name} has no config.json: give a folder that save_pretrained wrote, or a hub id")
    if not any(folder.glob("*.safetensors")):
        found = sorted(path.name for path in folder.iterdir() if path.suffix in {".bin", ".pt", ".pth", ".ckpt"})
        if found:
            raise UserError(
                f"{name} holds its weights as {found[0]}, and a pickle can run code: convert it to safetensors "
                "with save_pretrained(..., safe_serialization=True)"
            )
        raise UserError(f"{name} holds no *.safetensors weights: give a folder that save_pretrained wrote")


def _unloadable(spec: ModelSpec, source: str, error: BaseException) -> UserError:
    cause = _first_line(error)
    if Path(source).is_dir():
        return UserError(f"{spec.path} cannot be loaded, mend or replace its files: {cause}")
    at = f" at revision {spec.revision}" if spec.revision else ""
    return UserError(
        f"{spec.path}{at} is neither a folder here nor a model that could be had from the hub, check the name and the "
        f"connection: {cause}"
    )


def _load_tokenizer(spec: ModelSpec, source: str) -> PreTrainedTokenizerFast:
    name = spec.tokenizer or spec.path
    where = resolve(spec.tokenizer) if spec.tokenizer else source
    folder = Path(where)
    if folder.is_dir() and not any((folder / file).is_file() for file in TOKENIZER_FILES):
        raise UserError(f"{name} has no tokenizer files: pass the folder or hub id that has them as tokenizer")
    try:
        tokens: Any = AutoTokenizer.from_pretrained(
            where, revision=None if spec.tokenizer else spec.revision, use_fast=True, trust_remote_code=False
        )
    except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
        raise UserError(
            f"the tokenizer of {name} cannot be loaded, mend it or pass another as tokenizer: {_first_line(error)}"
        ) from error
    if not tokens.is_fast:
        raise UserError(f"the tokenizer of {name} is a slow one, without offsets: pass a fast one as tokenizer")
    if tokens.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {name} has no EOS token, so no answer can end: set eos_token in tokenizer_config.json"
        )
    if tokens.pad_token_id is None:
        tokens.pad_token = tokens.eos_token
    assert isinstance(tokens, PreTrainedTokenizerFast)
    return tokens


def _merge_adapter(model: PreTrainedModel, adapter: str) -> PreTrainedModel:
    """Merge a PEFT adapter into the weights, refusing one whose tensors do not match the model one for one."""
    from peft import PeftModel, get_peft_model_state_dict

    source = resolve(adapter)
    try:
        folder = Path(source)
        if not folder.is_dir():
            folder = Path(snapshot_download(source, allow_patterns=["adapter_config.json", "*.safetensors"]))
        weights = folder / "adapter_model.safetensors"
        if not weights.is_file():
            raise UserError(f"the adapter {adapter} has no adapter_model.safetensors: save it again as safetensors")
        with safe_open(weights, framework="pt") as file:
            stored = set(file.keys())
        wrapped = PeftModel.from_pretrained(model, str(folder), is_trainable=False)
        expected = set(get_peft_model_state_dict(wrapped))
        if stored != expected:
            odd = sorted(stored ^ expected)[0]
            raise UserError(f"the adapter {adapter} does not fit this model, {odd} first: use the base it was made for")
        merged = wrapped.merge_and_unload()
    except UserError:
        raise
    except BROKEN as error:
        raise UserError(f"the adapter {adapter} cannot be merged into this model: {_first_line(error)}") from error
    assert isinstance(merged, PreTrainedModel)
    return merged


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
