"""Activations on disk, and the stream that reads them: safetensors shards and a manifest, or plain safetensors files.

A shard holds, for some tokens, a `(tokens, hidden)` tensor a site (`resid.3`) and `token_ids`, `documents`,
`positions`. `manifest.json` says what they are and holds each shard's sha256, which is checked when a shard is first
read. Writing one is `sae.activations.cache.writing`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lm.anatomy import Site
from lm.data.files import parse_json, read_text
from lm.errors import UserError, one_line
from sae.activations.batch import ActivationBatch, parse_site, site_name
from sae.activations.sources import ActivationFiles

FORMAT = "palimpsest-activations-1"
MANIFEST, STATISTICS = "manifest.json", "statistics.safetensors"
INTEGERS = ("token_ids", "documents", "positions")


@dataclass(frozen=True)
class Shard:
    """One file."""

    path: Path
    rows: int
    sha256: str | None = None


class ActivationCache:
    """Files of activations, opened. `facts` is the manifest (what is known of plain files)."""

    def __init__(self, shards: Sequence[Shard], keys: dict[Site, str], facts: dict[str, Any], folder: Path) -> None:
        self.shards, self.facts, self.folder = tuple(shards), facts, folder
        self._keys, self._verified = keys, set[Path]()
        self.sites, self.tokens = tuple(keys), sum(shard.rows for shard in shards)
        if not self.tokens:
            raise UserError(f"{folder} holds no activations: make the cache again, or give other files")
        self.hidden = int(self._shape(self.shards[0].path, next(iter(keys.values())))[1])

    def statistics(self, site: Site) -> tuple[Tensor, Tensor]:
        """Mean and variance, each `(hidden,)` float64, over all tokens of a cache (divided by their number)."""
        path = self.folder / STATISTICS
        if site not in self._keys or not path.is_file():
            raise UserError(f"{self.folder} has no statistics of {site}: give a site of a cache that write_cache made")
        if file_hash(path) != self.facts["statistics"]["sha256"]:
            raise UserError(f"{path} is damaged (its content is not what the manifest says): make the cache again")
        tensors = read_tensors(path, [f"{site_name(site)}.mean", f"{site_name(site)}.variance"])
        return tensors[0], tensors[1]

    def read(self, index: int, sites: Sequence[Site] | None = None, *, verify: bool = True) -> ActivationBatch:
        """A whole shard, in the type it is stored in."""
        shard, sites = self.shards[index], tuple(sites or self.sites)
        if verify and shard.sha256 is not None and shard.path not in self._verified:
            if file_hash(shard.path) != shard.sha256:
                raise UserError(f"{shard.path} is damaged (its content is not what the manifest says): make it again")
            self._verified.add(shard.path)
        names = tensor_names(shard.path)
        there = [name for name in INTEGERS if name in names]
        tensors = read_tensors(shard.path, [*(self._keys[site] for site in sites), *there])
        stored = dict(zip(there, tensors[len(sites) :], strict=True))
        integers = [stored.get(name, torch.full((shard.rows,), -1, dtype=torch.int64)) for name in INTEGERS]
        values = dict(zip(sites, tensors, strict=False))
        if {len(item) for item in (*values.values(), *integers)} != {shard.rows}:
            raise UserError(f"{shard.path} holds tensors of unlike length: each needs {shard.rows} rows")
        return ActivationBatch(values, *integers)

    def _shape(self, path: Path, name: str) -> list[int]:
        with _reading(path), safe_open(path, framework="pt") as file:
            return list(file.get_slice(name).get_shape())


def open_cache(source: ActivationFiles | str | Path) -> ActivationCache:
    """Open a cache or plain files. Raises UserError for what is missing, unfinished, damaged or holds no activations."""
    source = source if isinstance(source, ActivationFiles) else ActivationFiles(path=str(source))
    path = Path(source.path).expanduser()
    return _open_manifest(path) if (path / MANIFEST).is_file() else _open_plain(path, source)


def _open_manifest(folder: Path) -> ActivationCache:
    manifest = read_manifest(folder)
    try:
        return _opened(folder, manifest)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{folder / MANIFEST} is no manifest of a cache ({type(error).__name__}: {one_line(error)}): make the cache again"
        ) from error


def _opened(folder: Path, manifest: dict[str, Any]) -> ActivationCache:
    if not manifest.get("finished"):
        raise UserError(f"the cache {folder} is not finished: call write_cache with the same settings to go on with it")
    shards = [Shard(folder / entry["file"], int(entry["rows"]), entry["sha256"]) for entry in manifest["shards"]]
    for shard, entry in zip(shards, manifest["shards"], strict=True):
        if not shard.path.is_file() or shard.path.stat().st_size != entry["bytes"]:
            raise UserError(f"{shard.path} is missing or cut short: make the cache again, or copy it whole")
    keys = {parse_site(name): name for name in manifest["settings"]["sites"]}
    return ActivationCache(shards, keys, manifest, folder)


def _open_plain(path: Path, source: ActivationFiles) -> ActivationCache:
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors")) if path.is_dir() else []
    if not files:
        raise UserError(f"{path} holds no .safetensors files: give a cache, a file of activations, or a folder of them")
    shards, widths = [], set()
    for file in files:
        if source.key not in (names := tensor_names(file)):
            raise UserError(f"{file} holds no tensor {source.key!r}, it has {', '.join(names)}: set key")
        with _reading(file), safe_open(file, framework="pt") as opened:
            shape = opened.get_slice(source.key).get_shape()
        if len(shape) != 2:
            raise UserError(f"{source.key!r} in {file} is {tuple(shape)} and not (tokens, hidden): reshape it")
        widths.add(shape[1])
        shards.append(Shard(file, shape[0]))
    if len(widths) > 1:
        raise UserError(f"the files in {path} hold activations of widths {sorted(widths)}: give files of one width")
    return ActivationCache(shards, {parse_site(source.site): source.key}, {"files": [f.name for f in files]}, path)


# ------------------------------------------------------------------------------------------------------------ files


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a cache, finished or not."""
    try:
        manifest = parse_json(read_text(folder / MANIFEST), str(folder / MANIFEST), remedy="make the cache again")
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise UserError(f"{folder / MANIFEST} is not of the format {FORMAT}: give a folder that write_cache made")
    except OSError as error:
        raise UserError(f"{folder / MANIFEST} cannot be read: {one_line(error)}; make the cache again") from error
    return manifest


def read_tensors(path: Path, names: Sequence[str]) -> list[Tensor]:
    """Tensors of a safetensors file, by name."""
    with _reading(path), safe_open(path, framework="pt") as file:
        return [file.get_tensor(name) for name in names]


def tensor_names(path: Path) -> list[str]:
    """What a safetensors file holds."""
    with _reading(path), safe_open(path, framework="pt") as file:
        return list(file.keys())


def file_hash(path: Path) -> str:
    """sha256 of a file."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from error


def describe(path: Path) -> dict[str, Any]:
    """What a manifest says of a file."""
    with _reading(path), safe_open(path, framework="pt") as file:
        lengths = [file.get_slice(name).get_shape()[0] for name in file.keys()]  # noqa: SIM118
    return {"file": path.name, "rows": lengths[0], "bytes": path.stat().st_size, "sha256": file_hash(path)}


class _reading:
    """Turns what safetensors raises for a damaged file into a sentence."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (SafetensorError, OSError, ValueError)) and not isinstance(error, UserError):
            raise UserError(f"{self.path} is damaged or missing: {one_line(error)}; make it again") from error
