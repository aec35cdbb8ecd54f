"""The small files beside a model's weights, config and tokenizer: copied as they stand, and told what changed.

What transformers writes today older versions misread in silence or not at all (`rope_parameters`, `TokenizersBackend`), so a
result has the files of the model that it was made from.
"""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from lm.errors import UserError
from lm.hub import CONFIGS, TOKENIZER_FILES, find_folder
from lm.run_folder import write_json

NO_MATTER = (
    "_attn_implementation",
    "_name_or_path",
    "architectures",
    "attn_implementation",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "pad_token_id",
    "quantization_config",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)
"""Settings in which two checkpoints of one model may differ: nothing is computed from them."""
_OF_THE_MODEL = ("config.json", "generation_config.json")
_NOT_OF_A_TOKENIZER = (*_OF_THE_MODEL, "*.index.json", "adapter_config.json")
_TOKENIZER_CONFIG = "tokenizer_config.json"


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a folder, as it stands."""
    found: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return found


def copy_config(source: Path, folder: Path) -> None:
    """Copy a model's settings."""
    for file in _OF_THE_MODEL:
        if (source / file).is_file():
            shutil.copyfile(source / file, folder / file)


def set_config(
    folder: Path, *, dtype: torch.dtype | None = None, tied: bool | None = None, plain: bool = False
) -> None:
    """Write into a folder's config what changed.

    Args:
        dtype: the type that the weights are saved in, None if it is unchanged.
        tied: whether head and embedding are one, None if that is unchanged.
        plain: the weights are not quantized, whatever those were that the config was copied from.
    """
    config = read_config(folder)
    changed = dict(config)
    if dtype is not None:
        changed["torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"] = str(
            dtype
        ).removeprefix("torch.")
    if tied is not None and ("tie_word_embeddings" in config or not tied):
        changed["tie_word_embeddings"] = tied
    if plain:
        changed.pop("quantization_config", None)
    if changed != config:
        write_json(folder / "config.json", changed)


def copy_tokenizer(source: str, folder: Path, *, revision: str | None = None) -> None:
    """Copy a tokenizer's files. Raises UserError if there are none."""
    found = find_folder(source, CONFIGS, revision=revision)
    if not any((found / file).is_file() for file in TOKENIZER_FILES):
        raise UserError(f"{source} has no tokenizer files: name the folder or hub id that has them as tokenizer")
    for file in sorted(found.iterdir()):
        wanted = any(fnmatch(file.name, pattern) for pattern in CONFIGS)
        if file.is_file() and wanted and not any(fnmatch(file.name, other) for other in _NOT_OF_A_TOKENIZER):
            shutil.copyfile(file, folder / file.name)


def for_every_version(folder: Path, tokenizer: PreTrainedTokenizerFast | None = None) -> None:
    """Let transformers 4 and 5 make the same of a folder's tokenizer files.

    `TokenizersBackend` and a list of `extra_special_tokens` are unknown to 4; 5 builds some classes anew that 4 reads from
    tokenizer.json. `PreTrainedTokenizerFast` is that file's tokenizer in both.

    Args:
        tokenizer: what is to be read; the special tokens that its class has by default are written out.
    """
    file = folder / _TOKENIZER_CONFIG
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    changed = dict(config)
    plain = tokenizer is not None and type(tokenizer) is PreTrainedTokenizerFast
    if (folder / "tokenizer.json").is_file() and (plain or config.get("tokenizer_class") == "TokenizersBackend"):
        changed["tokenizer_class"] = "PreTrainedTokenizerFast"
        special = ("bos_token", "eos_token", "pad_token", "unk_token") if changed != config else ()
        for name in special:
            if tokenizer is not None and config.get(name) is None and getattr(tokenizer, name) is not None:
                changed[name] = str(getattr(tokenizer, name))
    if isinstance(config.get("extra_special_tokens"), list):
        extra = changed.pop("extra_special_tokens")
        changed["additional_special_tokens"] = [*config.get("additional_special_tokens", []), *extra]
    if changed != config:
        write_json(file, changed)
