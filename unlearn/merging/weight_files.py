"""Saved models as named tensors, read and written one at a time: what a whole model in memory would be too large for.

Only files: what is computed of the tensors is `unlearn.merging.merge`, and a model that runs is loaded by `lm.load`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig

from lm.errors import UserError, one_line
from lm.hub import BROKEN, CONFIGS, WEIGHTS, find_folder, require_model_files
from lm.run_folder import write_json
from lm.source.tokenizer import load_tokenizer
from lm.source.weights import require_plain
from unlearn.model_files import NO_MATTER

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 4 << 30


@dataclass(frozen=True)
class Checkpoint:
    """A saved model.

    Attributes:
        name: as it was named in a config.
        folder: where its files are.
        files: tensor name -> the file that holds it.
        shapes: tensor name -> shape.
    """

    name: str
    folder: Path
    files: dict[str, Path]
    shapes: dict[str, tuple[int, ...]]

    @classmethod
    def find(cls, name: str) -> Checkpoint:
        """A folder, a hub id or the built-in model. Raises UserError for one that is missing, damaged or no safetensors."""
        folder = find_folder(name, CONFIGS + WEIGHTS)
        require_model_files(name, folder)
        whole, index = folder / "model.safetensors", folder / INDEX
        try:
            if whole.is_file() or not index.is_file():
                parts = [whole] if whole.is_file() else sorted(folder.glob(WEIGHTS[0]))
            else:
                parts = sorted({folder / file for file in json.loads(index.read_text())["weight_map"].values()})
            files: dict[str, Path] = {}
            shapes: dict[str, tuple[int, ...]] = {}
            for part in parts:
                with safe_open(part, framework="pt") as opened:
                    for tensor in opened.keys():  # noqa: SIM118 (a file handle, not a dict)
                        files[tensor] = part
                        shapes[tensor] = tuple(opened.get_slice(tensor).get_shape())
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise UserError(f"the weights of {name} cannot be read, restore them: {one_line(error)}") from error
        require_plain(name, folder)
        return cls(name, folder, files, shapes)

    def read(self, tensor: str) -> Tensor:
        """One tensor, as it is stored."""
        with safe_open(self.files[tensor], framework="pt") as opened:
            found: Tensor = opened.get_tensor(tensor)
        return found

    def config(self) -> dict[str, Any]:
        """The settings of which the model's outputs depend."""
        try:
            settings = AutoConfig.from_pretrained(self.folder, trust_remote_code=False).to_dict()
        except BROKEN as error:
            raise UserError(f"{self.name} has a damaged config.json, restore it: {one_line(error)}") from error
        return {key: value for key, value in settings.items() if key not in NO_MATTER}

    def digest(self) -> str:
        """16 hex digits of the weight files, in order of their names."""
        digest = hashlib.sha256()
        for part in sorted(set(self.files.values())):
            with open(part, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()[:16]


def require_alike(one: Checkpoint, other: Checkpoint) -> None:
    """Raise UserError unless two checkpoints hold tensors of the same names and shapes, for one architecture."""
    ours, theirs = one.config(), other.config()
    for key in sorted(ours.keys() | theirs.keys()):
        if ours.get(key) != theirs.get(key):
            raise UserError(
                f"{other.name} has {key} {theirs.get(key)!r} in its config.json and {one.name} has {ours.get(key)!r}: merge "
                "checkpoints of one model"
            )
    odd = sorted(one.files.keys() ^ other.files.keys())
    if odd:
        which = (one, other) if odd[0] in one.files else (other, one)
        raise UserError(
            f"{which[0].name} stores {odd[0]} and {which[1].name} does not: merge checkpoints that were saved alike (both with "
            "tied embeddings, or both without)"
        )
    for tensor, shape in one.shapes.items():
        if other.shapes[tensor] != shape:
            raise UserError(
                f"{tensor} has shape {other.shapes[tensor]} in {other.name} and {shape} in {one.name}: merge checkpoints of one "
                "model"
            )


def write(folder: Path, like: Checkpoint, tensor: Callable[[str], Tensor], *, shard: int = SHARD_BYTES) -> None:
    """Write tensors of the same names as those of `like` into an existing folder, under the names that loaders look for.

    Args:
        tensor: its name -> the tensor, asked once and in order; no more than one file's are in memory at a time.
        shard: bytes a file, at most, unless a single tensor is larger.
    """
    files: dict[str, list[str]] = {}
    held: dict[str, Tensor] = {}
    size = total = 0
    for name in like.files:
        made = tensor(name).contiguous()
        if held and size + made.nbytes > shard:
            _flush(folder, files, held)
            size = 0
        held[name] = made
        size, total = size + made.nbytes, total + made.nbytes
    _flush(folder, files, held)
    _name_parts(folder, files, total)


def read_back(folder: Path, like: Checkpoint) -> None:
    """Raise UserError unless what was written holds finite tensors, named and shaped as `like`, and a tokenizer that loads."""
    written = Checkpoint.find(str(folder))
    assert written.shapes == like.shapes, "written under another name or shape"
    for tensor in written.files:
        if not bool(written.read(tensor).isfinite().all()):
            raise UserError(
                f"{tensor} of the merged model is too large for the type that it is saved in: set save_dtype to float32 or "
                "bfloat16"
            )
    load_tokenizer("the merged model", folder, AutoConfig.from_pretrained(folder, trust_remote_code=False))


def _flush(folder: Path, files: dict[str, list[str]], held: dict[str, Tensor]) -> None:
    part = f"part-{len(files):05d}"
    save_file(held, folder / part, metadata={"format": "pt"})
    files[part] = list(held)
    held.clear()


def _name_parts(folder: Path, files: dict[str, list[str]], total: int) -> None:
    """Give the parts the names that loaders look for; only now it is known how many there are."""
    if len(files) == 1:
        (folder / next(iter(files))).rename(folder / "model.safetensors")
        return
    places: dict[str, str] = {}
    for number, (part, names) in enumerate(files.items(), start=1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        (folder / part).rename(folder / file)
        places |= dict.fromkeys(names, file)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
