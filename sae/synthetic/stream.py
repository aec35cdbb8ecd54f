"""A synthetic world as a source that a config names, and its stream of global batches.

A batch depends on its number alone, so the batches are the same for any number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lm.anatomy import Site
from lm.errors import UserError
from sae.activations.batch import ActivationBatch, ActivationStream, State, generator, parse_site
from sae.activations.sources import MadeActivations
from sae.activations.stream_state import require_same
from sae.sparse_code import SparseCode
from sae.synthetic.world import World, truth_of


@dataclass(frozen=True, kw_only=True)
class Synthetic(MadeActivations, World):
    """Activations `x = bias + sum_i a_i d_i + noise` of known unit directions d_i; endless."""

    draw: int = 0
    """Of the tokens drawn in it: another one for held-out tokens."""
    site: str = "resid.0"
    """What the activations are said to be of."""

    def stream(
        self,
        sites: Sequence[Site],
        *,
        batch_tokens: int,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
    ) -> ActivationStream:
        return SyntheticActivations(self, sites, batch_tokens=batch_tokens, rank=rank, world=world, device=device)


class SyntheticActivations(Iterator[ActivationBatch]):
    """A stream (`ActivationStream`) of synthetic activations; endless, float32.

    Batch number n is drawn from the seeds and n, so the state is one number. Every process draws what fires in the whole
    batch and makes activations of its own rows `rank::world` only.
    """

    def __init__(
        self,
        spec: Synthetic,
        sites: Sequence[Site] = (),
        *,
        batch_tokens: int,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        self.spec, self.truth = spec, truth_of(spec)
        own = parse_site(spec.site)
        if other := [site for site in sites if site != own]:
            raise UserError(
                f"this synthetic source is said to be of {own}, not of {other[0]}: set its site to that one"
            )
        if batch_tokens < 1 or not 0 <= rank < world:
            raise UserError(f"batches of {batch_tokens} tokens for process {rank} of {world} cannot be: check them")
        self.sites: tuple[Site, ...] = (own,)
        self.hidden, self.batch_tokens = spec.hidden, batch_tokens
        self.rank, self.world, self.batches = rank, world, 0
        self._device = device

    def __next__(self) -> ActivationBatch:
        return self.with_truth()[0]

    def with_truth(self) -> tuple[ActivationBatch, SparseCode]:
        """The next batch, and what truly fires in this process's rows of it (on the CPU)."""
        code = self.truth.codes(self.batch_tokens, self.spec.draw, self.batches, self.batch_tokens)
        if self.world > 1:
            code = _rows(code, self.rank, self.world)
        values = self.truth.activations(code)
        if self.spec.noise:
            draw = generator("synthetic", "noise", self.spec.seed, self.spec.draw, self.batches, self.batch_tokens)
            noise = torch.randn(self.batch_tokens, self.hidden, generator=draw)
            values = values + self.spec.noise * noise[self.rank :: self.world]
        self.batches += 1
        unknown = torch.full((len(values),), -1, dtype=torch.int64)
        batch = ActivationBatch({self.sites[0]: values}, unknown, unknown, unknown)
        return batch.to(self._device), code

    def facts(self) -> dict[str, Any]:
        """The source as it was asked for, and how much of it was drawn."""
        return {**self.spec.described(), "hidden": self.hidden, "tokens_drawn": self.batches * self.batch_tokens}

    def _settings(self) -> dict[str, Any]:
        return {"source": asdict(self.spec), "batch_tokens": self.batch_tokens}

    def state_dict(self) -> State:
        """How many batches were served: the same for every process, whatever their number."""
        return {"facts": {"batches": self.batches, "settings": self._settings()}, "tensors": {}}

    def load_state_dict(self, state: State) -> None:
        """Go on from there. UserError for a state of another source or batch."""
        require_same(state["facts"].get("settings", {}), self._settings())
        self.batches = int(state["facts"]["batches"])


def _rows(code: SparseCode, rank: int, world: int) -> SparseCode:
    """The tokens `rank::world` of a code, numbered anew."""
    tokens = code.token_ids()
    mine: Tensor = tokens % world == rank
    shape = (len(range(rank, code.tokens, world)), code.features)
    return SparseCode.from_matches(tokens[mine] // world, code.indices[mine], code.values[mine], shape=shape)
