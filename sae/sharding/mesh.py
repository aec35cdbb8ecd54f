"""A mesh of processes, data x features: who holds which rows and which features, and collectives that count themselves.

Process r of a mesh with S feature shards is data rank `r // S` and feature rank `r % S`, so that the processes which
exchange most are neighbors. Data rank d of D holds rows d, d + D, ... of the global batch; feature rank s holds a run
of features. An axis of size one communicates nothing. Nothing here knows of autoencoders.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor

from lm.errors import UserError

Axis = Literal["data", "features", "all"]


class Mesh:
    """The processes of one run. `counts` says how many collectives were run, by what they were for."""

    def __init__(self, *, features: int = 1) -> None:
        """Every process must call it at the same point. `features`: over how many processes features are dealt."""
        on = dist.is_available() and dist.is_initialized()
        world, rank = (dist.get_world_size(), dist.get_rank()) if on else (1, 0)
        if features < 1 or world % features:
            raise UserError(
                f"{features} feature shards over {world} processes cannot be: give a number that divides {world}"
            )
        self.sizes: dict[Axis, int] = {"data": world // features, "features": features, "all": world}
        self.places: dict[Axis, int] = {"data": rank // features, "features": rank % features, "all": rank}
        self.counts: Counter[str] = Counter()
        self._groups: dict[Axis, Any] = {"data": None, "features": None, "all": None}
        if 1 < features < world:
            for first in range(0, world, features):  # every process makes every group, in the same order
                group = dist.new_group(list(range(first, first + features)))
                if first == rank - rank % features:
                    self._groups["features"] = group
            for place in range(features):
                group = dist.new_group(list(range(place, world, features)))
                if place == rank % features:
                    self._groups["data"] = group

    @property
    def is_main(self) -> bool:
        """True on the one process that writes."""
        return self.places["all"] == 0

    @property
    def stream_rank(self) -> int:
        """Which rows of the global batch this process harvests: `stream_rank::world`, a part of its data rank's rows."""
        return self.places["features"] * self.sizes["data"] + self.places["data"]

    def rows(self, batch: int) -> int:
        """How many rows of a global batch this process's data rank holds."""
        return _dealt(batch, self.sizes["data"], self.places["data"])

    def global_rows(self, batch: int, device: torch.device | str = "cpu") -> Tensor:
        """(rows,) int64: the numbers, in the global batch, of the rows held here."""
        return torch.arange(self.places["data"], batch, self.sizes["data"], device=device)

    def bounds(self, features: int, place: int | None = None) -> tuple[int, int]:
        """The run of features that a feature rank holds (this process's, if none is named)."""
        shards, place = self.sizes["features"], self.places["features"] if place is None else place
        return place * features // shards, (place + 1) * features // shards

    def sum_(self, tensor: Tensor, axis: Axis, what: str) -> Tensor:
        """Sum over the axis, in place; returns the (contiguous) tensor. One collective."""
        if self.sizes[axis] > 1:
            self.counts[what] += 1
            dist.all_reduce(tensor, group=self._groups[axis])
        return tensor

    def gather(self, tensor: Tensor, axis: Axis, what: str) -> Tensor:
        """(processes of the axis, *shape): everybody's tensor, all of one shape, in the order of places. One collective."""
        if self.sizes[axis] == 1:
            return tensor.unsqueeze(0)
        self.counts[what] += 1
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.sizes[axis])]
        dist.all_gather(parts, tensor.contiguous(), group=self._groups[axis])
        return torch.stack(parts)

    def whole_features(self, shard: Tensor, features: int, what: str) -> Tensor:
        """(features, ...) from everybody's (own features, ...). One collective."""
        if self.sizes["features"] == 1:
            return shard
        spans = [self.bounds(features, place) for place in range(self.sizes["features"])]
        widest = max(end - start for start, end in spans)
        parts = self.gather(_padded(shard, widest), "features", what)
        return torch.cat([part[: end - start] for part, (start, end) in zip(parts, spans, strict=True)])

    def own_features(self, whole: Tensor) -> Tensor:
        """This process's run of a (features, ...) tensor; a view."""
        start, end = self.bounds(len(whole))
        return whole[start:end]

    def share_rows(self, rows: Tensor, batch: int) -> Tensor:
        """The rows of this data rank from the parts that its feature ranks harvested (`stream_rank::world`). One gather."""
        shards = self.sizes["features"]
        if shards == 1:
            return rows
        mine = self.rows(batch)
        parts = self.gather(_padded(rows, -(-mine // shards)), "features", "rows")
        return rearrange(parts, "shards rows hidden -> (rows shards) hidden")[:mine].contiguous()

    def whole_batch(self, rows: Tensor, batch: int) -> Tensor:
        """The global batch, in order, from what each process harvested. One gather."""
        world = self.sizes["all"]
        if world == 1:
            return rows
        parts = self.gather(_padded(rows, -(-batch // world)), "all", "sample")
        by_stream = torch.empty_like(parts)
        for rank, part in enumerate(parts):
            by_stream[rank % self.sizes["features"] * self.sizes["data"] + rank // self.sizes["features"]] = part
        return rearrange(by_stream, "world rows hidden -> (rows world) hidden")[:batch].contiguous()

    def problems(self, problem: str | None) -> list[str | None]:
        """Everybody's problem, in order. One collective."""
        problems: list[str | None] = [problem]
        if self.sizes["all"] > 1:
            self.counts["agree"] += 1
            problems = [None] * self.sizes["all"]
            dist.all_gather_object(problems, problem)
        return problems

    def agree(self, problem: str | None) -> None:
        """Raise the first process's problem on all of them, as UserError; return if there is none. One collective."""
        for sentence in self.problems(problem):
            if sentence is not None:
                raise UserError(sentence)


def sum_of_shards(tensor: Tensor, mesh: Mesh, what: str) -> Tensor:
    """The sum over feature shards of their parts; the gradient goes to every part as it is.

    What follows must be the same computation on every feature rank, as the loss of a reconstruction is.
    """
    return tensor if mesh.sizes["features"] == 1 else _Sum.apply(tensor, mesh, what)  # type: ignore[no-untyped-call]


def copy_to_shards(tensor: Tensor, mesh: Mesh, what: str) -> Tensor:
    """The tensor itself, used by each feature shard in its own way: the gradient is the sum over the shards."""
    return tensor if mesh.sizes["features"] == 1 else _Copy.apply(tensor, mesh, what)  # type: ignore[no-untyped-call]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, mesh: Mesh, what: str) -> Tensor:
        return mesh.sum_(tensor.contiguous().clone(), "features", what)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient, None, None


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, mesh: Mesh, what: str) -> Tensor:
        ctx.mesh, ctx.what = mesh, what
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.mesh.sum_(gradient.contiguous().clone(), "features", ctx.what), None, None


def _dealt(total: int, ways: int, place: int) -> int:
    return (total - place + ways - 1) // ways


def _padded(tensor: Tensor, length: int) -> Tensor:
    if len(tensor) == length:
        return tensor
    return torch.cat([tensor, tensor.new_zeros(length - len(tensor), *tensor.shape[1:])])
