"""Blocks and shards of a cache that is being written: where they stand, how blocks are spread over shards.

Which tokens a block holds is the writer's affair (`sae.activations.cache.writing`); here are only files, each whole or absent.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from lm.anatomy import Site
from lm.errors import UserError
from lm.model import Dtype
from lm.run_folder import write_atomic
from sae.activations.batch import ActivationBatch, concatenate, pack_batch, permutation, site_name, unpack_batch
from sae.activations.cache.manifest import INTEGERS, STATISTICS, describe, read_tensors
from sae.activations.cache.moments import Moments

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
    """global (a true permutation, with the room twice while it is made) or block (within what is in memory); auto is global."""

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


class Staging:
    """The files of one cache. `spread`: a permutation of all tokens (`shuffle: global`), or only within blocks."""

    spread = False

    def __init__(self, folder: Path, spec: CacheSpec, sites: Sequence[Site], seed: int) -> None:
        self.folder, self.spec, self.stage = folder, spec, folder / "stage"
        self._sites, self._seed = tuple(sites), seed
        self.shards = -(-spec.tokens // spec.shard_tokens)
        self.blocks = -(-spec.tokens // spec.block)

    @cached_property
    def _order(self) -> Tensor:
        """Where each token goes: `(tokens,)` int64."""
        return permutation(self.spec.tokens, "cache", self._seed)

    def put(self, number: int, rows: ActivationBatch, facts: dict[str, Any]) -> None:
        """Write one block: staged if it is to be spread; else as finished shards, and then a note that it is done."""
        tensors: dict[str, Tensor] = {}
        for site in rows.sites:
            moments = Moments.of(rows[site])
            tensors |= {f"{site_name(site)}.mean": moments.mean, f"{site_name(site)}.squares": moments.squares}
        size = self.spec.shard_tokens
        if self.spread:
            start = number * self.spec.block
            targets, place = self._order[start : start + len(rows)].sort()
            bounds = torch.searchsorted(targets, torch.arange(self.shards + 1) * size)
            tensors |= pack_batch(rows.select(place)) | {"targets": targets, "bounds": bounds}
        else:
            mixed = rows.select(permutation(len(rows), "block", self._seed, number))
            for at in range(-(-len(rows) // size)):
                part = mixed.select(slice(at * size, (at + 1) * size))
                self._write(self.shard(number * self.spec.block_shards + at), pack_batch(part))
        self._write(self._block(number), tensors, {**facts, "rows": len(rows), "of": self.spec.tokens})

    def staged(self, number: int) -> dict[str, Any] | None:
        """What follows a staged block; None if it is not there whole."""
        facts = self._facts(number)
        if facts is None:
            return None
        if not self.spread:
            first = number * self.spec.block_shards
            shards = range(first, min(first + self.spec.block_shards, self.shards))
            if not all(self.shard(one).is_file() for one in shards):
                return None
        state: dict[str, Any] = facts["state"]
        return state

    def shortened(self, tokens: int) -> Staging:
        """The same files for so many tokens, where the text held no more: blocks that were spread over more shards are spread
        anew, each written whole, so that what kills it leaves one or the other."""
        shorter = Staging(self.folder, dataclasses.replace(self.spec, tokens=tokens), self._sites, self._seed)
        shorter.spread = self.spread
        for number in range(shorter.blocks) if self.spread else ():
            facts = self._facts(number)
            if facts is not None and facts.get("of", self.spec.tokens) != tokens:
                path, stored = self._block(number), [*map(site_name, self._sites), *INTEGERS]
                named = dict(zip(stored, read_tensors(path, stored), strict=True))
                start = number * self.spec.block
                place = self._order[start : start + int(facts["rows"])].sort().indices
                shorter.put(number, unpack_batch(named, self._sites).select(place.argsort()), facts)
        return shorter

    def _facts(self, number: int) -> dict[str, Any] | None:
        try:
            with safe_open(self._block(number), framework="pt") as file:
                facts: dict[str, Any] = json.loads(file.metadata()["facts"])
                return facts
        except Exception:  # whatever a missing or damaged file makes safetensors raise, the block is harvested again
            return None

    def assemble(self) -> Iterator[Path]:
        """Put every shard together that is not there yet, if blocks are to be spread; yields each."""
        if not self.spread:
            return
        bounds = [read_tensors(self._block(number), ["bounds"])[0] for number in range(self.blocks)]
        for number in range(self.shards):
            if not self.shard(number).is_file():
                self._assemble(number, bounds)
            yield self.shard(number)

    def _assemble(self, shard: int, bounds: Sequence[Tensor]) -> None:
        """Put a shard together from its slice of every block, in the permutation's order."""
        names = [*map(site_name, self._sites), *INTEGERS, "targets"]
        parts, targets = [], []
        for number, bound in enumerate(bounds):
            begin, end = bound[shard : shard + 2].tolist()
            with safe_open(self._block(number), framework="pt") as file:
                slices = {name: file.get_slice(name)[begin:end] for name in names}
            parts.append(unpack_batch(slices, self._sites))
            targets.append(slices["targets"])
        self._write(self.shard(shard), pack_batch(concatenate(parts).select(torch.cat(targets).argsort())))

    def write_statistics(self) -> dict[str, Any]:
        """Mean and variance of every site from those of the blocks; gives what of them the manifest holds."""
        tensors: dict[str, Tensor] = {}
        scalars: dict[str, Any] = {}
        for site in self._sites:
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
                "variance": float(total.variance.mean()),  # over tokens and dimensions: the normalizer of a trainer
            }
        self._write(self.folder / STATISTICS, tensors)
        return {**scalars, **describe(self.folder / STATISTICS)}

    def masked(self) -> dict[str, int]:
        """How many tokens were masked, by reason."""
        total: Counter[str] = Counter()
        for number in range(self.blocks):
            total.update((self._facts(number) or {})["masked"])
        return dict(total)

    def clear(self) -> None:
        """Remove what is not needed in a finished cache."""
        shutil.rmtree(self.stage, ignore_errors=True)

    def shard(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.safetensors"

    def _block(self, number: int) -> Path:
        return self.stage / f"block-{number:05d}.safetensors"

    def _write(self, path: Path, tensors: dict[str, Tensor], facts: dict[str, Any] | None = None) -> None:
        metadata = {"facts": json.dumps(facts)} if facts is not None else None
        write_atomic(path, save({name: value.contiguous() for name, value in tensors.items()}, metadata))
