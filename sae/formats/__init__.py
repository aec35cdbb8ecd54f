"""Other tools' autoencoders, read and written: SAELens, sparsify, dictionary_learning, OpenAI, OpenMOSS' llamascopium.

| format | files of a folder | rules |
|---|---|---|
| `saelens` (native), `saelens5` | `cfg.json`, `sae_weights.safetensors` | ReLU, TopK, JumpReLU |
| `sparsify` | `cfg.json`, `sae.safetensors` | TopK |
| `dictionary_learning` | `config.json`, `ae.safetensors` | ReLU, TopK, BatchTopK, JumpReLU |
| `openai` | `autoencoder.safetensors` | TopK with layer norm, ReLU |
| `llamascopium` | `config.json`, `sae_weights.safetensors` | ReLU, TopK, BatchTopK, JumpReLU |

Files are read into `Weights`, a plain record, and written from one (`sae.model` makes a `SparseAutoencoder` of it, and knows no
file). Its forward pass is the one that the tool defines; the tests work that out from the file with plain tensors. What the
module cannot hold is refused with a sentence, never read as something else, and so
are tensors that a reader does not know.

**No pickles.** dictionary_learning and OpenAI publish `.pt` files, which are pickles. `torch.load(weights_only=True)`
restricts what they may do, but that restriction was broken before (CVE-2025-32434, torch before 2.6), it parses an attacker's
program all the same, and this project promises that a file from others cannot run code. So `.pt` is refused, with a command
of one line by which its owner, who knows where it comes from, makes a safetensors file of it; layout and settings are read
from that. Writing holds no such risk: for those two tools the `.pt` that their own loaders need is written as well.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lm.errors import UserError
from lm.hub import fetch
from sae.formats import dictionary_learning, llamascopium, openai, saelens, sparsify
from sae.formats.files import PICKLES, Tensors, write
from sae.formats.sites import Provenance, hook_name, site_of
from sae.formats.weights import Weights

__all__ = [
    "SPARSITY",
    "Format",
    "Provenance",
    "Weights",
    "hook_name",
    "read_densities",
    "read_weights",
    "site_of",
    "write_weights",
]

Format = Literal["saelens", "saelens5", "sparsify", "dictionary_learning", "openai", "llamascopium"]
SPARSITY = "sparsity.safetensors"
_READERS = {
    "saelens": saelens.read,
    "saelens5": saelens.read,
    "sparsify": sparsify.read,
    "dictionary_learning": dictionary_learning.read,
    "openai": openai.read,
    "llamascopium": llamascopium.read,
}
_WRITERS = {
    "saelens": saelens.write,
    "saelens5": saelens.write_old,
    "sparsify": sparsify.write,
    "dictionary_learning": dictionary_learning.write,
    "openai": openai.write,
    "llamascopium": llamascopium.write,
}
_FILES: dict[Format, tuple[str, ...]] = {
    "saelens": (saelens.CONFIG, saelens.WEIGHTS),
    "sparsify": (sparsify.CONFIG, sparsify.WEIGHTS),
    "dictionary_learning": (dictionary_learning.CONFIG, dictionary_learning.WEIGHTS),
    "openai": (openai.WEIGHTS,),
    "llamascopium": (llamascopium.CONFIG, llamascopium.WEIGHTS),
}
_HUB = re.compile(r"\w[\w.-]*(/\w[\w.-]*)+")
_CONVERT = {dictionary_learning.PICKLE: dictionary_learning.CONVERT, openai.PICKLE: openai.CONVERT}


def read_weights(
    path: str | Path,
    format: Format | Literal["auto"] = "auto",
    *,
    scale: float | None = None,
    revision: str | None = None,
) -> Weights:
    """The numbers of the autoencoder in a folder or on the hub, float32, on the CPU, with what the file says of them.

    Args:
        path: a folder; or a hub id with the folder inside it, `owner/name/folder` (a revision: `revision`).
        format: whose files they are; `auto` tells by their names.
        scale: the constant by which activations were multiplied in training, for files that leave it to their owner; it
            is folded in, thresholds included.

    Raises:
        UserError: what is missing, damaged, a pickle, or beyond what `SparseAutoencoder` can hold.
    """
    _known(format, ("auto", *get_args(Format)))
    folder = Path(path)
    if folder.suffix in PICKLES and folder.is_file():
        raise _pickle(folder)
    if not folder.is_dir():
        folder = _from_hub(str(path), revision)
    elif revision is not None:
        raise UserError(f"revision {revision!r} belongs to a hub id and {path} is on this machine: leave revision out")
    return _READERS[_detected(folder) if format == "auto" else format](folder, scale)


def write_weights(
    numbers: Weights,
    path: str | Path,
    *,
    format: Format = "saelens",
    metadata: dict[str, Any] | None = None,
    densities: Tensor | None = None,
) -> None:
    """Write the files of one autoencoder into a folder, float32, each whole or not at all.

    `metadata` (what JSON can hold; `Provenance` makes it) is added to `numbers.metadata`. `densities` (features,), shares of
    tokens on which each feature fires, are written as `sparsity.safetensors`, log10, as SAELens does. Refused before a file
    is touched: what the format cannot hold.
    """
    _known(format, get_args(Format))
    features = len(numbers.b_enc)
    if densities is not None and (
        densities.shape != (features,) or not bool(((densities >= 0) & (densities <= 1)).all())
    ):
        raise UserError(
            f"densities of shape {tuple(densities.shape)}: give {features} shares of tokens, each from 0 to 1"
        )
    folder = Path(path)
    _WRITERS[format](numbers, folder, metadata or {})
    if densities is not None:
        write(folder, SPARSITY, {"sparsity": (densities.double() + 1e-10).log10()})


def read_densities(path: str | Path) -> Tensor:
    """The (features,) float64 densities that stand in a folder's `sparsity.safetensors`; 0 where it says 1e-10."""
    densities = 10 ** Tensors(Path(path) / SPARSITY).take("sparsity", None).double()
    return torch.where(densities < 2e-10, 0.0, densities).clamp(max=1)


def _known(format: str, known: tuple[str, ...]) -> None:
    if format not in known:
        raise UserError(f"the format {format!r} is unknown: use one of {', '.join(known)}")


def _from_hub(name: str, revision: str | None) -> Path:
    """The files of `owner/name` or `owner/name/folder/in/it`, without pickles."""
    if not _HUB.fullmatch(name):
        raise UserError(
            f"{name} is no folder: give one with the files of one autoencoder, or a hub id owner/name/folder"
        )
    owner, repository, *inside = name.split("/")
    files = sorted({file for names in _FILES.values() for file in names} | {SPARSITY, saelens.SCALER})
    folder = fetch(f"{owner}/{repository}", files, inside="/".join(inside), revision=revision)
    if not folder.is_dir() or not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{name} has no safetensors autoencoder there (pickles such as ae.pt are not fetched): give owner/name/folder "
            "with the folder that holds one"
        )
    return folder


def _detected(folder: Path) -> Format:
    here = {entry.name for entry in folder.iterdir()}
    formats = [format for format, names in _FILES.items() if here.issuperset(names)]
    if len(formats) == 1:
        return formats[0]
    if formats:
        raise UserError(f"{folder} holds files of {' and '.join(formats)}: say which with format=...")
    for name in sorted(here):
        if name in _CONVERT or Path(name).suffix in PICKLES:
            raise _pickle(folder / name)
    kinds = {".safetensors", *PICKLES}
    folders = [entry for entry in folder.iterdir() if entry.is_dir()]
    inside = sorted(entry.name for entry in folders if any(file.suffix in kinds for file in entry.iterdir()))
    if inside:
        raise UserError(
            f"{folder} holds no autoencoder itself: give one of its folders, such as {', '.join(inside[:3])}"
        )
    known = "; ".join(f"{format}: {' and '.join(names)}" for format, names in _FILES.items())
    raise UserError(f"{folder} holds no autoencoder of a known format ({known}): check the folder")


def _pickle(path: Path) -> UserError:
    command = _CONVERT.get(path.name)
    remedy = (
        f'if you trust where it comes from, run in its folder: python -c "{command}"'
        if command
        else "name it ae.pt if it is dictionary_learning's, autoencoder.pt if it is OpenAI's, and ask again for the command"
    )
    return UserError(f"{path} is a pickle, which can run code when it is read (safetensors only here): {remedy}")
