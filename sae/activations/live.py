"""Activations harvested while they are used, mixed in a shuffling buffer; the same batches for any number of processes.

The buffer is divided into *lanes*. Contexts are dealt to lanes in turn, and row `i` of every batch comes from lane
`i mod lanes`. A process owns the lanes `rank, rank + world, ...`, so its rows `rank::world` come from its own lanes
alone: each context is run once, by one process, nothing is sent, and the global batch does not depend on `world` (which
must divide `lanes`). A forward pass holds contexts of one lane only, so that even rounding is the same. The price: each
process tokenizes the whole text, of which it runs its share.

A lane that has fallen to half is filled up by forward passes and permuted as a whole; rows are drawn without
replacement. The state holds the rows that were not yet drawn, the contexts that wait, and where the text goes on;
permutations follow from the seed and a count, so no generator has a hidden state.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from einops import rearrange

from lm.anatomy import Site
from lm.errors import UserError
from lm.model import LanguageModel
from sae.activations.batch import (
    ActivationBatch,
    State,
    concatenate,
    pack_batch,
    parse_site,
    permutation,
    site_name,
    unpack_batch,
)
from sae.activations.contexts import Context
from sae.activations.harvesting import Harvester, HarvestSpec
from sae.activations.provenance import provenance, settings, settings_of_today
from sae.activations.sources import TextSource
from sae.activations.stream_state import require_same


@dataclass(frozen=True, kw_only=True)
class BufferSpec:
    """The shuffling buffer."""

    tokens: int = 262_144
    """Tokens it holds when full, over all processes, at each site."""
    lanes: int = 8
    """Parts it is divided into: a multiple of the number of processes, and a divisor of the batch."""
    device: str | None = None
    """Where it is kept; null: with the model."""

    def __post_init__(self) -> None:
        if self.lanes < 1 or self.tokens < self.lanes:
            raise UserError(
                f"a buffer of {self.tokens} tokens in {self.lanes} lanes cannot be: give both positive sizes"
            )


@dataclass
class _Lane:
    number: int
    rows: ActivationBatch | None = None
    drawn: int = 0
    fills: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    waiting: deque[Context] = field(default_factory=deque)
    dealt: int = 0  # contexts of the whole stream that were offered to this lane

    @property
    def left(self) -> int:
        return 0 if self.rows is None else len(self.rows) - self.drawn


class LiveActivations(Iterator[ActivationBatch]):
    """A stream (`ActivationStream`) of shuffled batches from a model and a text source; float32, on the buffer's device.

    Args:
        batch_tokens: tokens of the global batch.
        rank, world: this process among those that share the batch.
        tokens: how many tokens will be asked for in all. If the source ends before, that is a UserError; without it, the
            stream just stops.

    With `epochs` a number, the stream ends when a lane cannot fill its part of a batch: some rows of the last buffer are
    not served. Several processes would end at different batches, so they must read in rounds (`epochs: null`).
    """

    def __init__(
        self,
        model: LanguageModel,
        source: TextSource,
        sites: Sequence[Site],
        *,
        batch_tokens: int,
        harvest: HarvestSpec | None = None,
        buffer: BufferSpec | None = None,
        rank: int = 0,
        world: int = 1,
        tokens: int | None = None,
    ) -> None:
        self.spec, self.buffer = harvest or HarvestSpec(), buffer or BufferSpec()
        lanes = self.buffer.lanes
        if batch_tokens < 1 or batch_tokens % lanes:
            raise UserError(f"a batch of {batch_tokens} tokens is no multiple of the {lanes} lanes: change one of them")
        if not 0 <= rank < world or lanes % world:
            raise UserError(f"{lanes} lanes cannot be shared by {world} processes: set lanes to a multiple of {world}")
        if self.buffer.tokens < 2 * batch_tokens:
            raise UserError(
                f"a buffer of {self.buffer.tokens} tokens mixes no batches of {batch_tokens}: give twice the batch or more"
            )
        if world > 1 and self.spec.context.epochs is not None:
            raise UserError("several processes need text that does not end: set epochs: null, or make a cache")
        self.harvester = Harvester(model, source, sites, self.spec)
        self.sites, self.hidden, self.batch_tokens = self.harvester.sites, self.harvester.hidden, batch_tokens
        self.rank, self.world, self.batches = rank, world, 0
        self._asked = tokens
        self._device = torch.device(self.buffer.device) if self.buffer.device else model.device
        self._share = batch_tokens // lanes
        self._contexts = self.harvester.contexts()
        self._lanes = {number: _Lane(number) for number in range(rank, lanes, world)}

    def __next__(self) -> ActivationBatch:
        for lane in self._lanes.values():
            if lane.left < max(self._share, self._capacity // 2):
                self._fill(lane)
        if any(lane.left < self._share for lane in self._lanes.values()):
            self._ended()
        parts = []
        for lane in self._lanes.values():
            assert lane.rows is not None
            parts.append(lane.rows.select(slice(lane.drawn, lane.drawn + self._share)))
            lane.drawn += self._share
        self.batches += 1
        order = rearrange(torch.arange(self._share * len(parts)), "(lanes rows) -> (rows lanes)", lanes=len(parts))
        return concatenate(parts).select(order).to(dtype=torch.float32)

    @property
    def rounds(self) -> float:
        """How often the whole text was read so far, where that is known; else only the rounds that are over."""
        size = getattr(self.harvester.documents, "size", None)
        return self._contexts.epoch + (self._contexts.state["place"] / size if size else 0.0)

    @property
    def _capacity(self) -> int:
        return self.buffer.tokens // self.buffer.lanes

    def _ended(self) -> None:
        served = self.batches * self.batch_tokens
        if self._asked is not None and served < self._asked:
            raise UserError(
                f"{self.harvester.documents.name} holds only {served} tokens in whole batches of the {self._asked} asked "
                "for: set epochs: null to read it again and again, or ask for fewer"
            )
        raise StopIteration

    def _fill(self, lane: _Lane) -> None:
        """Fill a lane up to its capacity (or a little above: a forward pass is kept whole), and permute it."""
        kept = [] if lane.rows is None or not lane.left else [lane.rows.select(slice(lane.drawn, None))]
        have, gained, begun = lane.left, False, self._contexts.epoch
        while have < self._capacity:
            contexts = self._next_contexts(lane)
            if not contexts:
                break
            rows, counts = self.harvester.rows(contexts)
            lane.counts += counts
            if len(rows):
                kept.append(rows.to(device=self._device))
                have, gained = have + len(rows), True
            elif not gained and self._contexts.epoch > begun + self.buffer.lanes:
                raise UserError(f"the masks leave no token of {self.harvester.documents.name}: loosen them")
        if gained:
            joined = concatenate(kept)
            order = permutation(len(joined), "lane", self.spec.seed, lane.number, lane.fills)
            lane.rows, lane.drawn = joined.select(order), 0
        lane.fills += 1

    def _next_contexts(self, lane: _Lane) -> list[Context]:
        """The lane's next contexts, one forward pass of them; other lanes' are put aside on the way. Empty at the end."""
        while len(lane.waiting) < self.spec.forward_contexts:
            number = self._contexts.count
            context = next(self._contexts, None)
            if context is None:
                break
            owner = self._lanes.get(number % self.buffer.lanes)
            if owner is not None and number >= owner.dealt:
                owner.waiting.append(context)
        return [lane.waiting.popleft() for _ in range(min(len(lane.waiting), self.spec.forward_contexts))]

    @property
    def forward_seconds(self) -> float:
        """Time in the model so far."""
        return self.harvester.forward_seconds

    def facts(self) -> dict[str, Any]:
        """For metadata: the settings, the source, the outlier limits, and what was masked so far, by reason."""
        total: Counter[str] = Counter()
        for lane in self._lanes.values():
            total.update(lane.counts)
        return {
            **self._settings,
            **provenance(self.harvester),
            "epoch": self._contexts.epoch,
            "masked": dict(total),
        }

    @cached_property
    def _settings(self) -> dict[str, Any]:
        """What must be the same when a state is loaded."""
        return {
            **settings(self.harvester),
            "batch_tokens": self.batch_tokens,
            "buffer": {"tokens": self.buffer.tokens, "lanes": self.buffer.lanes},
        }

    def state_dict(self) -> State:
        """All that the rest of this process's batches follow from, its tensors on the CPU. `merge_states` joins those of
        all processes into one that any number of processes can load."""
        tensors, lanes = {}, {}
        for number, lane in self._lanes.items():
            lanes[str(number)] = {"fills": lane.fills, "dealt": self._contexts.count, "counts": dict(lane.counts)}
            if lane.rows is not None:
                rows = lane.rows.select(slice(lane.drawn, None)).to("cpu")
                tensors.update({name: value.clone() for name, value in pack_batch(rows, f"lane.{number}.").items()})
            for name, pieces in zip(Context._fields, zip(*lane.waiting, strict=True), strict=False):
                tensors[f"lane.{number}.waiting.{name}"] = torch.from_numpy(np.concatenate(pieces))
            lengths = [len(context.ids) for context in lane.waiting]
            tensors[f"lane.{number}.waiting.lengths"] = torch.tensor(lengths, dtype=torch.int64)
        limits = {site_name(site): limit for site, limit in self.harvester.limits.items()}
        facts = {"batches": self.batches, "contexts": self._contexts.state, "limits": limits, "lanes": lanes}
        return {"facts": {**facts, "settings": self._settings}, "tensors": tensors}

    def load_state_dict(self, state: State) -> None:
        """Go on from a state of this process, or from a merged one. UserError if it was made with other settings."""
        facts, tensors = state["facts"], state["tensors"]
        require_same(settings_of_today(facts.get("settings", {})), self._settings)
        if missing := [number for number in self._lanes if str(number) not in facts["lanes"]]:
            raise UserError(
                f"the state lacks lane {missing[0]}: join the states of all processes with merge_states first"
            )
        for number, lane in self._lanes.items():
            stored, prefix = facts["lanes"][str(number)], f"lane.{number}."
            lane.fills, lane.dealt, lane.drawn = int(stored["fills"]), int(stored["dealt"]), 0
            lane.counts = Counter(stored["counts"])
            there = f"{prefix}token_ids" in tensors
            lane.rows = unpack_batch(tensors, self.sites, prefix).to(self._device) if there else None
            lane.waiting = _waiting(tensors, f"{prefix}waiting.")
        self.harvester.limits = {parse_site(name): float(limit) for name, limit in facts["limits"].items()}
        self._contexts = self.harvester.contexts(facts["contexts"])
        self.batches = int(facts["batches"])


def _waiting(tensors: dict[str, Any], prefix: str) -> deque[Context]:
    lengths = tensors[f"{prefix}lengths"].tolist()
    if not lengths:
        return deque()
    parts = [torch.split(tensors[f"{prefix}{name}"], lengths) for name in Context._fields]
    return deque(Context(*(piece.numpy() for piece in pieces)) for pieces in zip(*parts, strict=True))
