"""Write a cache of activations: harvested block by block, shuffled, in shards; a killed run goes on where it stopped.

`shuffle="global"` gives a true permutation of all tokens without holding them: each block is staged on disk, its rows
sorted by the shard that the permutation sends them to, and each shard is then put together from one slice of every
block. That needs room for the activations twice while it runs. `shuffle="block"` permutes within a block (as many tokens
as are held in memory) and writes once; the reader mixes blocks.

Every file is written whole or not at all, and a block holds the state from which the next one follows, so the shards of
an interrupted run are, byte for byte, those of an unbroken one. One process writes; others wait for it.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from lm.anatomy import Site
from lm.errors import UserError
from lm.load import DTYPES, Dtype, LanguageModel
from lm.run import environment, progress, write_atomic, write_json
from sae.activations.batch import (
    ActivationBatch,
    concatenate,
    pack_batch,
    parse_site,
    permutation,
    site_name,
    unpack_batch,
)
from sae.activations.cache import (
    FORMAT,
    MANIFEST,
    STATISTICS,
    ActivationCache,
    file_hash,
    open_cache,
    read_manifest,
    read_tensors,
)
from sae.activations.harvest import Harvester, HarvestSpec
from sae.activations.identity import provenance, settings
from sae.activations.moments import Moments
from sae.activations.sources import TextSource
from sae.activations.state import require_same

Shuffle = Literal["auto", "global", "block"]


@dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """How activations are kept on disk."""

    tokens: int
    """How many tokens, after masking."""
    shard_tokens: int = 65_536
    """Tokens of a file."""
    block_shards: int = 4
    """Files' worth of tokens that are harvested into memory at a time: what a killed run may lose."""
    dtype: Dtype | None = None
    """float32, bfloat16 or float16; null: the model's own, which loses nothing."""
    shuffle: Shuffle = "auto"
    """global (a true permutation, with the room twice while it is made), block, or auto: global if the disk has room."""

    def __post_init__(self) -> None:
        if min(self.tokens, self.shard_tokens, self.block_shards) < 1:
            raise UserError(
                "a cache needs 1 or more tokens, shard_tokens and block_shards: change the one that is less"
            )
        for what, value, choices in (("shuffle", self.shuffle, Shuffle), ("dtype", self.dtype, Dtype)):
            if value is not None and value not in get_args(choices):
                raise UserError(f"the {what} {value!r} is unknown: use one of {', '.join(get_args(choices))}")

    @property
    def block(self) -> int:
        """Tokens of a block."""
        return self.shard_tokens * self.block_shards


def write_cache(
    model: LanguageModel,
    source: TextSource,
    sites: Sequence[Site],
    folder: Path | str,
    *,
    cache: CacheSpec,
    harvest: HarvestSpec | None = None,
    show: bool = True,
) -> ActivationCache:
    """Harvest `cache.tokens` tokens at `sites` into `folder`, and open it.

    A finished cache of the same settings and content is opened as it is, an unfinished one is gone on with.

    Raises:
        UserError: the folder holds something else, or a cache of other settings; the disk is too small; or the source ends
            before there are enough tokens (`epochs: null` would read it again).
    """
    return _Writer(Harvester(model, source, sites, harvest or HarvestSpec()), Path(folder), cache).run(show=show)


class _Writer:
    def __init__(self, harvester: Harvester, folder: Path, spec: CacheSpec) -> None:
        self.harvester, self.folder, self.spec, self.stage = harvester, folder, spec, folder / "stage"
        self.dtype = DTYPES[spec.dtype] if spec.dtype else next(harvester.model.model.parameters()).dtype
        self.shards = -(-spec.tokens // spec.shard_tokens)
        self.blocks = -(-spec.tokens // spec.block)

    def run(self, *, show: bool) -> ActivationCache:
        asked = {**settings(self.harvester), "cache": asdict(self.spec)}
        manifest = self._begin(asked)
        if not manifest["finished"]:
            self.harvester.limits = {parse_site(k): float(v) for k, v in manifest["outlier_limits"].items()}
            self.mode = manifest["shuffle"]
            self._harvest(show=show)
            self._finish(manifest, show=show)
        return open_cache(self.folder)

    def _begin(self, asked: dict[str, Any]) -> dict[str, Any]:
        if (self.folder / MANIFEST).is_file():
            manifest = read_manifest(self.folder)
            require_same(manifest["settings"], asked, f"the cache {self.folder}")
            return manifest
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise UserError(f"{self.folder} holds something that is no cache: give a new or empty folder")
        manifest = {
            "format": FORMAT,
            "finished": False,
            "settings": asked,
            "shuffle": self._choose_shuffle(),
            "dtype": str(self.dtype).removeprefix("torch."),
            **provenance(self.harvester),
            "environment": environment(),
        }
        write_json(self.folder / MANIFEST, manifest)
        return manifest

    def _choose_shuffle(self) -> str:
        row = len(self.harvester.sites) * self.harvester.hidden * self.dtype.itemsize + 24
        there = next(path for path in (self.folder, *self.folder.absolute().parents) if path.is_dir())
        needed, free = row * self.spec.tokens, shutil.disk_usage(there).free
        wanted = self.spec.shuffle
        chosen = wanted if wanted != "auto" else "global" if free > 2.1 * needed else "block"
        room = needed * (2.05 if chosen == "global" else 1.02)
        if free < room:
            raise UserError(
                f"{self.spec.tokens} tokens, shuffle: {chosen}, need {room / 1e9:.1f} GB while they are written and {there} has "
                f"{free / 1e9:.1f} GB free: ask for fewer, or another folder"
            )
        return chosen

    # ------------------------------------------------------------------------------------------------ harvesting

    def _harvest(self, *, show: bool) -> None:
        """Stage every block that is not there yet."""
        done = 0
        state: dict[str, Any] = {"contexts": None, "skip": 0}
        while done < self.blocks and (kept := self._staged(done)) is not None:
            state, done = kept, done + 1
        first = min(done * self.spec.block, self.spec.tokens)
        order = permutation(self.spec.tokens, "cache", self.harvester.spec.seed) if self.mode == "global" else None
        with progress(self.spec.tokens, label="harvest", unit="tokens", done=first, enabled=show) as advance:
            passes = self._passes(state)
            held: list[ActivationBatch] = []
            for number in range(done, self.blocks):
                start = number * self.spec.block
                size = min(self.spec.block, self.spec.tokens - start)
                counts = Counter[str]()
                while (have := sum(map(len, held))) < size:
                    made = next(passes, None)
                    if made is None:
                        self._too_short(start + have)
                    rows, masked, state = made
                    counts += masked
                    held.append(rows)
                    advance(len(rows))
                joined = concatenate(held)
                rest = joined.select(slice(size, None))
                held = [rest] if len(rest) else []
                # The rest is of the last forward pass, which a killed run runs again.
                again = {"contexts": state["before"], "skip": state["rows"] - len(rest)}
                follows = again if held else {"contexts": state["after"], "skip": 0}
                self._put(number, joined.select(slice(0, size)), follows, counts, order)

    def _passes(self, state: dict[str, Any]) -> Iterator[tuple[ActivationBatch, Counter[str], dict[str, Any]]]:
        """One forward pass after the other from a state on: rows, what was masked, and the states round the pass."""
        walk, skip = self.harvester.contexts(state["contexts"]), int(state["skip"])
        empty_since = walk.epoch
        while True:
            before = walk.state
            contexts = list(islice(walk, self.harvester.spec.forward_contexts))
            if not contexts:
                return
            rows, masked = self.harvester.rows(contexts)
            round_it = {"before": before, "after": walk.state, "rows": len(rows)}
            if len(rows):
                empty_since = walk.epoch
            elif walk.epoch > empty_since + 1:
                raise UserError(f"the masks leave no token of {self.harvester.documents.name}: loosen them")
            yield self._stored(rows.select(slice(skip, None))), Counter() if skip else masked, round_it
            skip = 0

    def _stored(self, rows: ActivationBatch) -> ActivationBatch:
        stored = rows.to("cpu", self.dtype)
        for site, value in stored.by_site.items():
            if self.dtype == torch.float16 and not bool(torch.isfinite(value).all()):
                raise UserError(f"{site} does not fit into float16: set dtype: bfloat16")
        return stored

    def _put(
        self, number: int, rows: ActivationBatch, state: dict[str, Any], counts: Counter[str], order: Tensor | None
    ) -> None:
        """Write one block: staged for `global`; as finished shards, then a note, for `block`."""
        tensors: dict[str, Tensor] = {}
        for site in rows.sites:
            moments = Moments.of(rows[site])
            tensors |= {f"{site_name(site)}.mean": moments.mean, f"{site_name(site)}.squares": moments.squares}
        size = self.spec.shard_tokens
        if order is not None:
            start = number * self.spec.block
            targets, place = order[start : start + len(rows)].sort()
            bounds = torch.searchsorted(targets, torch.arange(self.shards + 1) * size)
            tensors |= pack_batch(rows.select(place)) | {"targets": targets, "bounds": bounds}
        else:
            mixed = rows.select(permutation(len(rows), "block", self.harvester.spec.seed, number))
            for at in range(-(-len(rows) // size)):
                part = mixed.select(slice(at * size, (at + 1) * size))
                self._write(self._shard(number * self.spec.block_shards + at), pack_batch(part))
        facts = {"state": state, "rows": len(rows), "masked": dict(counts)}
        self._write(self._block(number), tensors, facts)

    def _staged(self, number: int) -> dict[str, Any] | None:
        """What follows a staged block; None if it is not there whole."""
        facts = self._facts(number)
        if facts is None:
            return None
        if self.mode == "block":
            first = number * self.spec.block_shards
            shards = range(first, min(first + self.spec.block_shards, self.shards))
            if not all(self._shard(one).is_file() for one in shards):
                return None
        state: dict[str, Any] = facts["state"]
        return state

    def _facts(self, number: int) -> dict[str, Any] | None:
        try:
            with safe_open(self._block(number), framework="pt") as file:
                facts: dict[str, Any] = json.loads(file.metadata()["facts"])
                return facts
        except Exception:  # whatever a missing or damaged file makes safetensors raise, the block is harvested again
            return None

    def _too_short(self, found: int) -> NoReturn:
        raise UserError(
            f"{self.harvester.documents.name} holds only {found} of the {self.spec.tokens} tokens asked for (after masking): "
            f"set epochs: null to read it again, or ask for {found}"
        )

    # ------------------------------------------------------------------------------------------------- finishing

    def _finish(self, manifest: dict[str, Any], *, show: bool) -> None:
        if self.mode == "global":
            bounds = [read_tensors(self._block(number), ["bounds"])[0] for number in range(self.blocks)]
            with progress(self.shards, label="shuffle", unit="shards", enabled=show) as advance:
                for shard in range(self.shards):
                    if not self._shard(shard).is_file():
                        self._assemble(shard, bounds)
                    advance()
        listed = []
        for number in range(self.shards):
            path = self._shard(number)
            rows = min(self.spec.shard_tokens, self.spec.tokens - number * self.spec.shard_tokens)
            listed.append({"file": path.name, "rows": rows, "bytes": path.stat().st_size, "sha256": file_hash(path)})
        tensors, scalars = self._statistics()
        self._write(self.folder / STATISTICS, tensors)
        masked: Counter[str] = Counter()
        for number in range(self.blocks):
            masked.update((self._facts(number) or {})["masked"])
        done = {"finished": True, "tokens": self.spec.tokens, "masked": dict(masked), "statistics": scalars}
        write_json(self.folder / MANIFEST, {**manifest, **done, "shards": listed})
        shutil.rmtree(self.stage, ignore_errors=True)

    def _assemble(self, shard: int, bounds: Sequence[Tensor]) -> None:
        """Put a shard together from its slice of every block, in the permutation's order."""
        names = [*map(site_name, self.harvester.sites), "token_ids", "documents", "positions", "targets"]
        parts, targets = [], []
        for number, bound in enumerate(bounds):
            begin, end = bound[shard : shard + 2].tolist()
            with safe_open(self._block(number), framework="pt") as file:
                slices = {name: file.get_slice(name)[begin:end] for name in names}
            parts.append(unpack_batch(slices, self.harvester.sites))
            targets.append(slices["targets"])
        self._write(self._shard(shard), pack_batch(concatenate(parts).select(torch.cat(targets).argsort())))

    def _statistics(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors: dict[str, Tensor] = {}
        scalars: dict[str, Any] = {}
        for site in self.harvester.sites:
            name, total = site_name(site), None
            for number in range(self.blocks):
                rows = int((self._facts(number) or {})["rows"])
                mean, squares = read_tensors(self._block(number), [f"{name}.mean", f"{name}.squares"])
                part = Moments(rows, mean, squares)
                total = part if total is None else total.merge(part)
            assert total is not None
            tensors |= {f"{name}.mean": total.mean, f"{name}.variance": total.variance}
            scalars[name] = {
                "mean_norm": float(total.mean.norm()),
                "variance": float(total.variance.mean()),  # over tokens and dimensions: the normaliser of a trainer
            }
        return tensors, scalars

    def _shard(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.safetensors"

    def _block(self, number: int) -> Path:
        return self.stage / f"block-{number:05d}.safetensors"

    def _write(self, path: Path, tensors: dict[str, Tensor], facts: dict[str, Any] | None = None) -> None:
        metadata = {"facts": json.dumps(facts)} if facts is not None else None
        write_atomic(path, save({name: value.contiguous() for name, value in tensors.items()}, metadata))
