"""Activations on disk, and the stream that reads them: safetensors shards and a manifest, or plain safetensors files.

A shard holds, for some tokens, a `(tokens, hidden)` tensor a site (`resid.3`) and `token_ids`, `documents`,
`positions`. `manifest.json` says what they are and holds each shard's sha256, which is checked when a shard is first
read. Writing one is `sae.activations.writer`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lm.anatomy import Site
from lm.errors import UserError
from lm.sources import one_line
from sae.activations.batch import ActivationBatch, State, concatenate, parse_site, permutation, site_name
from sae.activations.sources import ActivationFiles
from sae.activations.state import require_same

FORMAT = "palimpsest-activations-1"
MANIFEST, STATISTICS = "manifest.json", "statistics.safetensors"
_INTEGERS = ("token_ids", "documents", "positions")


@dataclass(frozen=True, kw_only=True)
class ReadSpec:
    """How files are read."""

    shuffle: bool = True
    """Read shards in an order of its own each epoch, and rows in one within the shards held together."""
    together: int = 4
    """Shards that are held, and mixed, at a time."""
    epochs: int | None = None
    """How often the files are read; null: for as long as there is demand."""
    keep_last: bool = False
    """Serve the last, smaller batch of a finite number of epochs: for evaluation."""
    verify: bool = True
    """Check each shard's content when it is first read."""
    seed: int = 0
    """Of the order."""

    def __post_init__(self) -> None:
        if self.together < 1 or (self.epochs is not None and self.epochs < 1):
            raise UserError(f"together {self.together} and epochs {self.epochs}: give 1 or more (or epochs: null)")


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
        there = [name for name in _INTEGERS if name in names]
        tensors = read_tensors(shard.path, [*(self._keys[site] for site in sites), *there])
        found = dict(zip(there, tensors[len(sites) :], strict=True))
        integers = [found.get(name, torch.full((shard.rows,), -1, dtype=torch.int64)) for name in _INTEGERS]
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
    if not manifest.get("finished"):
        raise UserError(f"the cache {folder} is not finished: call write_cache with the same settings to go on with it")
    shards = [Shard(folder / one["file"], int(one["rows"]), one["sha256"]) for one in manifest["shards"]]
    for shard, one in zip(shards, manifest["shards"], strict=True):
        if not shard.path.is_file() or shard.path.stat().st_size != one["bytes"]:
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


class CachedActivations(Iterator[ActivationBatch]):
    """A stream (`ActivationStream`) of batches from files; float32.

    All rows in the order of an epoch, then of the next, are cut into global batches; row `i` of the whole belongs to
    process `(i mod batch_tokens) mod world`, which holds no others. So the state is the number of batches.
    """

    def __init__(
        self,
        cache: ActivationCache,
        sites: Sequence[Site] | None = None,
        *,
        batch_tokens: int,
        reading: ReadSpec | None = None,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        self.cache, self.spec = cache, reading or ReadSpec()
        self.sites, self.hidden, self.batch_tokens = tuple(sites or cache.sites), cache.hidden, batch_tokens
        if absent := [str(site) for site in self.sites if site not in cache.sites]:
            raise UserError(f"{cache.folder} holds no {absent[0]}, only {', '.join(map(str, cache.sites))}")
        if batch_tokens < 1 or not 0 <= rank < world:
            raise UserError(f"batches of {batch_tokens} tokens for process {rank} of {world} cannot be: check them")
        if self.spec.epochs is not None and self._end < (1 if self.spec.keep_last else batch_tokens):
            raise UserError(
                f"{cache.folder} holds {self._end} tokens, less than a batch of {batch_tokens}: make it smaller"
            )
        self.rank, self.world, self.batches = rank, world, 0
        self._device = device
        self._held: tuple[int, int, np.ndarray[Any, np.dtype[np.int64]], ActivationBatch] | None = None

    def __next__(self) -> ActivationBatch:
        start = self.batches * self.batch_tokens
        end = min(start + self.batch_tokens, self._end)
        if end <= start or (end - start < self.batch_tokens and not self.spec.keep_last):
            raise StopIteration
        parts, at = [], start
        while at < end:
            epoch, row = divmod(at, self.cache.tokens)
            group, first, last = self._group(epoch, row)
            until = min(end, epoch * self.cache.tokens + last)
            owned, rows = self._hold(epoch, group, epoch * self.cache.tokens + first)
            low, high = np.searchsorted(owned, [at, until])
            parts.append(rows.select(slice(int(low), int(high))))
            at = until
        self.batches += 1
        return concatenate(parts).to(self._device, torch.float32)

    @property
    def _end(self) -> int:
        return 2**62 if self.spec.epochs is None else self.spec.epochs * self.cache.tokens

    def _order(self, epoch: int) -> list[int]:
        shards = len(self.cache.shards)
        return permutation(shards, "shards", self.spec.seed, epoch).tolist() if self.spec.shuffle else [*range(shards)]

    def _group(self, epoch: int, row: int) -> tuple[int, int, int]:
        """Which group of shards holds a row of the epoch: its number, its first row, and the row after its last."""
        order, first = self._order(epoch), 0
        for group, begin in enumerate(range(0, len(order), self.spec.together)):
            last = first + sum(self.cache.shards[one].rows for one in order[begin : begin + self.spec.together])
            if row < last:
                return group, first, last
            first = last
        raise AssertionError("a row beyond the end of an epoch")

    def _hold(self, epoch: int, group: int, start: int) -> tuple[np.ndarray[Any, np.dtype[np.int64]], ActivationBatch]:
        """This process's rows of a group, `start` being the first one's number in the whole, and their numbers."""
        if self._held is None or self._held[:2] != (epoch, group):
            self._held = None  # the old group's memory first
            begin = group * self.spec.together
            numbers = self._order(epoch)[begin : begin + self.spec.together]
            shards = [self.cache.read(number, self.sites, verify=self.spec.verify) for number in numbers]
            size = sum(len(shard) for shard in shards)
            order = permutation(size, "rows", self.spec.seed, epoch, group) if self.spec.shuffle else torch.arange(size)
            rows = torch.arange(start, start + size)
            mine = (rows % self.batch_tokens) % self.world == self.rank
            self._held = (epoch, group, rows[mine].numpy(), concatenate(shards).select(order[mine]))
        return self._held[2:]

    def facts(self) -> dict[str, Any]:
        """The manifest, and how it is read."""
        return {**self.cache.facts, "reading": self._settings()}

    def _settings(self) -> dict[str, Any]:
        return {
            "files": [[shard.path.name, shard.rows, shard.sha256] for shard in self.cache.shards],
            "sites": [site_name(site) for site in self.sites],
            "batch_tokens": self.batch_tokens,
            "together": self.spec.together,
            "shuffle": self.spec.shuffle,
            "seed": self.spec.seed,
        }

    def state_dict(self) -> State:
        """How many batches were served: the same for every process, whatever their number."""
        return {"facts": {"batches": self.batches, "settings": self._settings()}, "tensors": {}}

    def load_state_dict(self, state: State) -> None:
        """Go on from there. UserError for a state of other files or settings."""
        require_same(state["facts"].get("settings", {}), self._settings())
        self.batches = int(state["facts"]["batches"])


# ------------------------------------------------------------------------------------------------------------ files


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a cache, finished or not."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest.get("format") != FORMAT:
            raise UserError(f"{folder / MANIFEST} is not of the format {FORMAT}: give a folder that write_cache made")
    except (OSError, json.JSONDecodeError, AttributeError) as error:
        raise UserError(f"{folder / MANIFEST} cannot be read: {one_line(error)}; make the cache again") from error
    assert isinstance(manifest, dict)
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


class _reading:
    """Turns what safetensors raises for a damaged file into a sentence."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (SafetensorError, OSError, ValueError)) and not isinstance(error, UserError):
            raise UserError(f"{self.path} is damaged or missing: {one_line(error)}; make it again") from error
