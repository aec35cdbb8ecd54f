"""Write a cache of activations: harvested block by block, shuffled, in shards; a killed run goes on where it stopped.

`shuffle="global"` gives a true permutation of all tokens without holding them: each block is staged on disk, its rows
sorted by the shard that the permutation sends them to, and each shard is then put together from one slice of every
block. That needs room for the activations twice while it runs. `shuffle="block"` permutes within a block (as many tokens
as are held in memory) and writes once; the reader mixes blocks.

Every file is written whole or not at all, and a block holds the state from which the next one follows, so the shards of
an interrupted run are, byte for byte, those of an unbroken one. One process writes; others wait for it.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from lm.anatomy import Site
from lm.config import as_of_today
from lm.errors import UserError
from lm.model import DTYPES, LanguageModel
from lm.run_folder import LOCK, environment, hold, is_leftover, progress, stage, sweep, write_json
from sae.activations.batch import ActivationBatch, concatenate, parse_site
from sae.activations.cache.manifest import FORMAT, MANIFEST, ActivationCache, describe, open_cache, read_manifest
from sae.activations.cache.staging import CacheSpec, Staging
from sae.activations.harvesting import Harvester, HarvestSpec
from sae.activations.provenance import provenance, settings, settings_of_today
from sae.activations.sources import TextSource
from sae.activations.stream_state import require_same


@stage
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

    A source that ends before gives a cache of what it holds, whose `tokens` say so (`epochs: null` reads it again and again).

    Raises:
        UserError: the folder holds something else, or a cache of other settings; the disk is too small.
    """
    return _Writer(Harvester(model, source, sites, harvest or HarvestSpec()), Path(folder), cache).run(show=show)


class _Writer:
    def __init__(self, harvester: Harvester, folder: Path, spec: CacheSpec) -> None:
        self.harvester, self.folder, self.spec = harvester, folder, spec
        self.dtype = DTYPES[spec.dtype] if spec.dtype else next(harvester.model.model.parameters()).dtype
        self.files = Staging(folder, spec, harvester.sites, harvester.spec.seed)

    def run(self, *, show: bool) -> ActivationCache:
        asked = {**settings(self.harvester), "cache": asdict(self.spec)}
        manifest = self._begin(asked)
        if not manifest["finished"]:
            self.harvester.limits = {parse_site(k): float(v) for k, v in manifest["outlier_limits"].items()}
            self.files.spread = manifest["shuffle"] == "global"
            if "found" in manifest:  # it was stopped while the blocks of a shorter cache were spread
                self.files = self.files.shortened(manifest["found"])
            self._harvest(manifest, show=show)
            self._finish(manifest, show=show)
        self.files.clear()
        return open_cache(self.folder)

    def _begin(self, asked: dict[str, Any]) -> dict[str, Any]:
        hold(self.folder)
        if (self.folder / MANIFEST).is_file():
            sweep(self.folder)
            manifest = read_manifest(self.folder)
            stored = settings_of_today(manifest["settings"])
            stored["cache"] = as_of_today(stored.get("cache"), CacheSpec)
            require_same(stored, asked, f"the cache {self.folder}")
            return manifest
        if any(path.name != LOCK and not is_leftover(path.name) for path in self.folder.iterdir()):
            raise UserError(f"{self.folder} holds something that is no cache: give a new or empty folder")
        sweep(self.folder)
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
        chosen = "global" if wanted == "auto" else wanted
        block = needed * 1.02
        room = needed * 2.05 if chosen == "global" else block
        if free < room:
            less = f"set shuffle: block, which needs {block / 1e9:.1f} GB, " if block <= free else ""
            raise UserError(
                f"{self.spec.tokens} tokens, shuffle: {chosen}, need {room / 1e9:.1f} GB while they are written and {there} has "
                f"{free / 1e9:.1f} GB free: {less}ask for fewer, or give another folder"
            )
        return chosen

    def _harvest(self, manifest: dict[str, Any], *, show: bool) -> None:
        """Stage every block that is not there yet."""
        done = 0
        state: dict[str, Any] = {"contexts": None, "skip": 0}
        while done < self.files.blocks and (kept := self.files.staged(done)) is not None:
            state, done = kept, done + 1
        wanted = self.files.spec.tokens
        first = min(done * self.spec.block, wanted)
        with progress(wanted, label="harvest", unit="tokens", done=first, enabled=show) as advance:
            passes = self._passes(state)
            held: list[ActivationBatch] = []
            for number in range(done, self.files.blocks):
                start = number * self.spec.block
                size = min(self.spec.block, wanted - start)
                counts = Counter[str]()
                while (have := sum(map(len, held))) < size:
                    made = next(passes, None)
                    if made is None:
                        break
                    rows, masked, state = made
                    counts += masked
                    held.append(rows)
                    advance(len(rows))
                if have < size:
                    self._shorten(start + have, manifest)
                    if not have:
                        return
                joined = concatenate(held)
                rest = joined.select(slice(size, None))
                held = [rest] if len(rest) else []
                # The rest is of the last forward pass, which a killed run runs again.
                again = {"contexts": state["before"], "skip": state["rows"] - len(rest)}
                follows = again if held else {"contexts": state["after"], "skip": 0}
                self.files.put(number, joined.select(slice(0, size)), {"state": follows, "masked": dict(counts)})
                if have < size:
                    return

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

    def _shorten(self, found: int, manifest: dict[str, Any]) -> None:
        """Go on with as many tokens as the text holds after masking, and keep that in the manifest first."""
        if not found:
            raise UserError(f"the masks leave no token of {self.harvester.documents.name}: loosen them")
        manifest["found"] = found
        write_json(self.folder / MANIFEST, manifest)
        self.files = self.files.shortened(found)

    def _finish(self, manifest: dict[str, Any], *, show: bool) -> None:
        """Put the shards together where that is left to do, and close the manifest."""
        with progress(self.files.shards, label="shuffle", unit="shards", enabled=show and self.files.spread) as advance:
            for _ in self.files.assemble():
                advance()
        scalars = self.files.write_statistics()
        done = {
            "finished": True,
            "tokens": self.files.spec.tokens,
            "masked": self.files.masked(),
            "statistics": scalars,
        }
        shards = [describe(self.files.shard(number)) for number in range(self.files.shards)]
        write_json(self.folder / MANIFEST, {**manifest, **done, "shards": shards})
