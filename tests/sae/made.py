"""A stream of made-up activations: sparse sums of fixed directions, the same global batches for any number of processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lm import Site
from sae.activations import ActivationBatch

SITE = Site("resid", 0)
OTHER = Site("mlp", 1)


class Made:
    """An `ActivationStream`. `bad` is a batch that holds a NaN on this process, `length` how many batches there are."""

    def __init__(
        self,
        *,
        hidden: int = 8,
        batch: int = 22,
        rank: int = 0,
        world: int = 1,
        sites: Sequence[Site] = (SITE,),
        bad: int | None = None,
        length: int = 10**9,
        seed: int = 0,
    ) -> None:
        self.sites, self.hidden, self.batch_tokens = tuple(sites), hidden, batch
        self.rank, self.world, self.bad, self.length, self.seed = rank, world, bad, length, seed
        self.batches = 0
        self.directions = torch.randn(4 * hidden, hidden, generator=torch.Generator().manual_seed(seed))

    def __iter__(self) -> Made:
        return self

    def __next__(self) -> ActivationBatch:
        if self.batches >= self.length:
            raise StopIteration
        generator = torch.Generator().manual_seed(1000 * self.seed + self.batches)
        fires = torch.rand(self.batch_tokens, len(self.directions), generator=generator) < 0.1
        values = (fires * torch.rand(fires.shape, generator=generator)) @ self.directions
        values = (3.0 + 2.0 * values)[self.rank :: self.world]
        if self.bad == self.batches:
            values[0, 0] = torch.nan
        self.batches += 1
        numbers = torch.zeros(len(values), dtype=torch.int64)
        return ActivationBatch(
            {site: values * (place + 1) for place, site in enumerate(self.sites)}, numbers, numbers, numbers
        )

    def state_dict(self) -> dict[str, Any]:
        return {"facts": {"batches": self.batches, "settings": {"seed": self.seed}}, "tensors": {}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batches = state["facts"]["batches"]

    def facts(self) -> dict[str, Any]:
        return {"made": self.seed}
