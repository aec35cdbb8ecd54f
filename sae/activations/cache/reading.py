"""The stream that reads a cache, or plain files of activations, in a shuffled order: exact, and the same for any number of
processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lm.anatomy import Site
from lm.errors import UserError
from sae.activations.batch import ActivationBatch, State, concatenate, permutation, site_name
from sae.activations.cache.manifest import ActivationCache
from sae.activations.stream_state import require_same


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
            raise UserError(f"{cache.folder} holds no {absent[0]}: name one of {', '.join(map(str, cache.sites))}")
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

    @property
    def rounds(self) -> float:
        """How often all tokens were read so far."""
        return self.batches * self.batch_tokens / self.cache.tokens

    @property
    def serves(self) -> int | None:
        """How many tokens it will serve in whole batches; None where it goes round for ever."""
        return None if self.spec.epochs is None else self._end // self.batch_tokens * self.batch_tokens

    def _order(self, epoch: int) -> list[int]:
        shards = len(self.cache.shards)
        return permutation(shards, "shards", self.spec.seed, epoch).tolist() if self.spec.shuffle else [*range(shards)]

    def _group(self, epoch: int, row: int) -> tuple[int, int, int]:
        """Which group of shards holds a row of the epoch: its number, its first row, and the row after its last."""
        order, first = self._order(epoch), 0
        for group, begin in enumerate(range(0, len(order), self.spec.together)):
            last = first + sum(self.cache.shards[number].rows for number in order[begin : begin + self.spec.together])
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
