"""From what a config names to a folder on this machine: the built-in model, a folder, or a hub id fetched into the cache.

Only names and files: whether the files hold a usable model is for `lm.load` to say. Hub repositories are fetched
without pickles, code or nested folders, so everything after this sees one kind of thing, a folder.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from lm.errors import UserError, one_line

HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
CONFIGS = ("*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt")
WEIGHTS = ("model*.safetensors",)
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
BROKEN = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    AssertionError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
)
"""What transformers, peft and safetensors raise for files that are damaged or do not fit."""


def find_folder(path: str, files: tuple[str, ...], *, revision: str | None = None) -> Path:
    """The folder that `path` names; of a hub id, fetch `files` (patterns) at `revision`.

    Raises UserError for a path that does not exist, a hub id that cannot be had, and a revision of something that is not
    on the hub.
    """
    folder = _here(path)
    if folder is None:
        return fetch(path, files, revision=revision)
    if revision is not None:
        raise UserError(f"revision {revision!r} belongs to a hub id and {path} is on this machine: leave revision out")
    return folder


def require_model_files(name: str, folder: Path) -> None:
    """Raise UserError, naming what is missing, unless a folder has a config, safetensors weights and no adapter beside."""
    adapter = (folder / "adapter_config.json").is_file()
    weights = {path.name for path in folder.glob("*.safetensors")} - {"adapter_model.safetensors"}
    if adapter and not (weights and (folder / "config.json").is_file()):
        raise UserError(f"{name} is a PEFT adapter: give its base model as path and {name} as adapter")
    if adapter:
        raise UserError(
            f"{name} holds a model and a PEFT adapter (adapter_config.json), and which is meant cannot be known: move the "
            "adapter's files to a folder of their own, and give that as adapter if it is to be merged"
        )
    if not (folder / "config.json").is_file():
        raise UserError(f"{name} has no config.json: give a folder that save_pretrained wrote, or a hub id")
    if weights:
        return
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in {".bin", ".pt", ".pth", ".ckpt"})
    if pickles:
        raise UserError(
            f"{name} holds its weights as {pickles[0]}, which can run code when it is read (safetensors only here): "
            "convert it with save_pretrained(..., safe_serialization=True)"
        )
    raise UserError(f"{name} holds no *.safetensors weights: give a folder or hub id that does")


def _here(path: str) -> Path | None:
    """The folder if `path` names one on this machine, None if it can only be a hub id."""
    if path == "builtin" or path.startswith("builtin:"):
        from lm.builtin import Variant, model_path

        return model_path(cast(Variant, path.partition(":")[2] or "memorized"))
    if not path:
        raise UserError("the model path is empty: give builtin, a folder, or a hub id such as allenai/OLMo-1B-hf")
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{path} is a file: give the folder that holds config.json and the safetensors weights")
    if not HUB_ID.fullmatch(path):
        raise UserError(f"the folder {path} does not exist: check it, or give a hub id such as allenai/OLMo-1B-hf")
    return None


def fetch(name: str, files: Sequence[str], *, inside: str = "", revision: str | None = None) -> Path:
    """The folder on this machine that holds `files` (patterns) of a hub repository, or of its folder `inside`."""
    patterns = [f"{inside}/{file}" for file in files] if inside else [*files]
    try:
        here = snapshot_download(
            name, revision=revision, allow_patterns=patterns, ignore_patterns=[f"{inside}/*/*" if inside else "*/*"]
        )
        return Path(here) / inside
    except (OSError, ValueError) as error:
        at = f" at revision {revision}" if revision else ""
        raise UserError(
            f"{name}{at} is no folder here and could not be had from the hub, check the name and the connection: "
            f"{one_line(error)}"
        ) from error
