"""Activations as they are handed over: some tokens, their values at one or several sites, and where each token came from.

Nothing here runs a model or reads a file. Inside the package the same record also carries values in the model's own
type; what a stream yields is float32.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast, get_args, runtime_checkable

import torch
from torch import Tensor

from lm.anatomy import Kind, Site
from lm.errors import UserError

State = dict[str, Any]
"""`{"facts": plain data that JSON holds, "tensors": {name: tensor}}`: what `state_dict` returns."""


@dataclass(frozen=True, eq=False)
class ActivationBatch:
    """Some tokens. `batch[site]` is `(tokens, hidden)`; the three others are `(tokens,)` int64."""

    by_site: Mapping[Site, Tensor]
    token_ids: Tensor
    """-1 where the files that were read do not say."""
    documents: Tensor
    """Which record of the source a token belongs to, counted from 0 in the source's own order; -1: not known."""
    positions: Tensor
    """The token's place among its document's tokens, from 0; -1 for a BOS that was put before a context, or not known."""

    def __getitem__(self, site: Site) -> Tensor:
        if site not in self.by_site:
            raise UserError(f"{site} is not among these activations: take one of {', '.join(map(str, self.by_site))}")
        return self.by_site[site]

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(self.by_site)

    @property
    def values(self) -> Tensor:
        """The values `(tokens, hidden)`, where there is one site."""
        if len(self.by_site) != 1:
            raise UserError(f"these activations hold {len(self.by_site)} sites: say which, as batch[site]")
        return next(iter(self.by_site.values()))

    def select(self, rows: Tensor | slice) -> ActivationBatch:
        """The tokens at `rows`, in that order."""
        values = {
            site: value[rows if isinstance(rows, slice) else rows.to(value.device)]
            for site, value in self.by_site.items()
        }
        rows = rows if isinstance(rows, slice) else rows.to(self.token_ids.device)
        return ActivationBatch(values, self.token_ids[rows], self.documents[rows], self.positions[rows])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> ActivationBatch:
        """On another device; `dtype` changes the values only."""
        values = {site: value.to(device=device, dtype=dtype) for site, value in self.by_site.items()}
        others = [item.to(device=device) for item in (self.token_ids, self.documents, self.positions)]
        return ActivationBatch(values, *others)


@runtime_checkable
class ActivationStream(Protocol):
    """What a trainer reads: batches of one size, and a state from which the rest of them follows exactly.

    The *global* batch has `batch_tokens` tokens and is the same for any number of processes; process `rank` of `world`
    is given its rows `rank::world`.
    """

    sites: tuple[Site, ...]
    hidden: int
    batch_tokens: int

    def __iter__(self) -> Iterator[ActivationBatch]: ...
    def __next__(self) -> ActivationBatch: ...
    def state_dict(self) -> State: ...
    def load_state_dict(self, state: State) -> None: ...
    def facts(self) -> dict[str, Any]: ...


def concatenate(parts: Sequence[ActivationBatch]) -> ActivationBatch:
    """One after the other; all of the same sites."""
    if len(parts) == 1:
        return parts[0]
    return ActivationBatch(
        {site: torch.cat([part[site] for part in parts]) for site in parts[0].sites},
        torch.cat([part.token_ids for part in parts]),
        torch.cat([part.documents for part in parts]),
        torch.cat([part.positions for part in parts]),
    )


def pack_batch(batch: ActivationBatch, prefix: str = "") -> dict[str, Tensor]:
    """Named tensors, as safetensors files and states hold them: `<kind>.<layer>` a site, and the three integer ones."""
    named = {f"{prefix}{site_name(site)}": value for site, value in batch.by_site.items()}
    others = {"token_ids": batch.token_ids, "documents": batch.documents, "positions": batch.positions}
    return {**named, **{f"{prefix}{name}": value for name, value in others.items()}}


def unpack_batch(tensors: Mapping[str, Tensor], sites: Sequence[Site], prefix: str = "") -> ActivationBatch:
    """The batch that `pack_batch` named."""
    return ActivationBatch(
        {site: tensors[f"{prefix}{site_name(site)}"] for site in sites},
        *(tensors[f"{prefix}{name}"] for name in ("token_ids", "documents", "positions")),
    )


def site_name(site: Site) -> str:
    """`resid.3`, as file keys and configs spell it; the embedding is `resid.-1`."""
    return f"{site.kind}.{site.layer}"


def parse_site(name: str) -> Site:
    """The site that `site_name` (or a config) spelled."""
    kind, _, layer = name.partition(".")
    if kind not in get_args(Kind) or not layer.removeprefix("-").isdecimal():
        raise UserError(f"the site {name!r} is not one: write resid.3, mlp.3 or attn.3 (resid.-1 is the embedding)")
    return Site(cast(Kind, kind), int(layer))


def require_different(sites: Sequence[Site]) -> None:
    """Raise UserError for a site that is named twice."""
    if twice := [site for site in sites if sites.count(site) > 1]:
        raise UserError(f"sites has {site_name(twice[0])} {sites.count(twice[0])} times: name each site once")


def generator(*parts: int | str) -> torch.Generator:
    """A generator for one purpose: the same parts, the same numbers, whatever was drawn elsewhere."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def permutation(size: int, *parts: int | str) -> Tensor:
    """`(size,)` int64: a random order, by `generator(*parts)`."""
    return torch.randperm(size, generator=generator(*parts))
