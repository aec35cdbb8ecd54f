"""Which rows each step trains on: a pure function of the seed and the step, the same for any number of processes.

"Batch" means the global batch. `step(i)` needs no history, so a resumed run asks for step i and gets what an unbroken
one got; process r of n takes every n-th row of it. Turning rows into tensors is here too; models are not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Protocol, TypeVar

import numpy as np

from lm.errors import UserError

T = TypeVar("T")
Pairing = Literal["paired", "mixed_shuffle", "sequential", "streams"]


@dataclass(frozen=True)
class StepRows:
    """The rows of one global batch in sampling order: (is it a forget row, index among the rows of its side)."""

    order: tuple[tuple[bool, int], ...]

    @property
    def forget(self) -> tuple[int, ...]:
        """Indices of the forget rows; may be empty when batches are mixed."""
        return tuple(index for is_forget, index in self.order if is_forget)

    @property
    def retain(self) -> tuple[int, ...]:
        """Indices of the retain rows; may be empty when batches are mixed."""
        return tuple(index for is_forget, index in self.order if not is_forget)


class Batches(Protocol):
    """An order of global batches."""

    def total(self, epochs: int) -> int:
        """Optimizer steps in so many epochs."""

    def epoch(self, step: int) -> int:
        """The epoch, from 0, that `step`, from 0, belongs to."""

    def step(self, step: int) -> StepRows:
        """The rows of `step`, from 0."""


@dataclass(frozen=True, kw_only=True)
class PairedBatches:
    """A deterministic order of global batches.

    `paired`: every step has `batch // 2` forget and as many retain rows, each side reshuffled whenever it is used up
    (an epoch is one pass over the larger side). `mixed_shuffle`: one shuffled list of both, as the authors' sampler
    gives (an epoch is one pass over all rows; a batch may lack a side). With `retain == 0` only forget rows are drawn.
    """

    forget: int
    retain: int
    batch: int
    pairing: Literal["paired", "mixed_shuffle"] = "paired"
    seed: int = 0

    def __post_init__(self) -> None:
        refuse_nothing(self.forget)
        if self.pairing == "paired" and self.retain and self.batch % 2:
            raise UserError(
                f"batch is {self.batch}: a paired batch has as many forget as retain rows; give an even number"
            )
        if self.batch < (2 if self.pairing == "paired" and self.retain else 1):
            raise UserError(f"batch is {self.batch}: a paired batch needs at least one forget and one retain row")

    @property
    def per_side(self) -> int:
        """Rows of each side in a paired step."""
        return self.batch // 2 if self.retain else self.batch

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch."""
        if self.pairing == "mixed_shuffle":
            return -(-(self.forget + self.retain) // self.batch)
        return -(-max(self.forget, self.retain) // self.per_side)

    def total(self, epochs: int) -> int:
        """Optimizer steps in so many epochs."""
        return epochs * self.steps_per_epoch

    def epoch(self, step: int) -> int:
        """The epoch, from 0, that `step`, from 0, belongs to."""
        return step // self.steps_per_epoch

    def step(self, step: int) -> StepRows:
        """The rows of `step`, from 0."""
        if self.pairing == "mixed_shuffle":
            epoch, place = divmod(step, self.steps_per_epoch)
            order = permutation(self.seed, 2, epoch, self.forget + self.retain)
            chosen = order[place * self.batch : (place + 1) * self.batch]
            return StepRows(tuple((True, i) if i < self.forget else (False, i - self.forget) for i in chosen))
        forget = [(True, index) for index in self._draw(0, self.forget, step)]
        retain = [(False, index) for index in self._draw(1, self.retain, step)] if self.retain else []
        alternating = [row for pair in zip(forget, retain, strict=True) for row in pair] if retain else forget
        return StepRows(tuple(alternating))

    def _draw(self, side: int, size: int, step: int) -> tuple[int, ...]:
        first = step * self.per_side
        return tuple(
            permutation(self.seed, side, place // size, size)[place % size]
            for place in range(first, first + self.per_side)
        )


@dataclass(frozen=True, kw_only=True)
class SequentialBatches:
    """The forget rows in chunks, one chunk after the other, each for several epochs; the retain rows go round and round.

    Every forget row is followed by its own `retain_per_forget` retain rows, the next ones of a list that begins anew when it
    is used up; they are the same in each epoch. Both sides are shuffled once. Source: AILS-NTUA (arXiv 2503.02443), the first
    place of SemEval-2025 Task 4, with its numbers as defaults. As there the list of retain rows goes on from chunk to chunk.
    Badge: **variant**: optimizer and schedule go on too, where the authors' code begins anew with each chunk; and a step holds
    whole groups, where a step of theirs is one row.
    """

    forget: int
    retain: int
    batch: int
    chunk: int = 32
    retain_per_forget: int = 7
    epochs: int = 7
    seed: int = 0

    def __post_init__(self) -> None:
        refuse_nothing(self.forget)
        if self.batch % self.group:
            raise UserError(
                f"batch is {self.batch}: a sequential batch has {self.retain_per_forget} retain rows for each forget row; give a "
                f"multiple of {self.group}"
            )

    @property
    def group(self) -> int:
        """A forget row with what follows it."""
        return 1 + self.retain_per_forget if self.retain else 1

    def total(self, epochs: int) -> int:
        """Optimizer steps until every chunk had its epochs."""
        assert epochs == self.epochs
        return sum(self.epochs * self._steps(chunk) for chunk in range(self._chunks))

    def epoch(self, step: int) -> int:
        """The epoch, from 0, counted through all chunks."""
        return self._place(step)[0]

    def step(self, step: int) -> StepRows:
        """The rows of `step`, from 0; after the last chunk comes the first again."""
        epoch, place = self._place(step)
        first = epoch // self.epochs % self._chunks * self.chunk
        last = min(first + self.chunk, self.forget)
        first += place * (self.batch // self.group)
        forget, retain = (permutation(self.seed, side, 0, size) for side, size in ((0, self.forget), (1, self.retain)))
        order: list[tuple[bool, int]] = []
        for number in range(first, min(first + self.batch // self.group, last)):
            order.append((True, forget[number]))
            following = range(number * (self.group - 1), (number + 1) * (self.group - 1))
            order += [(False, retain[one % self.retain]) for one in following]
        return StepRows(tuple(order))

    @property
    def _chunks(self) -> int:
        return -(-self.forget // self.chunk)

    def _steps(self, chunk: int) -> int:
        """Steps of one epoch of a chunk."""
        return -(-min(self.chunk, self.forget - chunk * self.chunk) * self.group // self.batch)

    def _place(self, step: int) -> tuple[int, int]:
        """The epoch through all chunks, and the step within it."""
        rounds, step = divmod(step, self.total(self.epochs))
        for chunk in range(self._chunks):
            steps = self._steps(chunk)
            if step < self.epochs * steps:
                epoch, place = divmod(step, steps)
                return (rounds * self._chunks + chunk) * self.epochs + epoch, place
            step -= self.epochs * steps
        raise AssertionError("a step lies in some chunk")


def refuse_nothing(forget: int) -> None:
    """Raise UserError if there are no forget rows."""
    if forget < 1:
        raise UserError("there are no forget rows: nothing to unlearn; give at least one")


@lru_cache(maxsize=64)
def permutation(seed: int, side: int, epoch: int, size: int) -> tuple[int, ...]:
    """An order of so many rows, another for each seed, side and epoch."""
    return tuple(np.random.default_rng((seed, side, epoch)).permutation(size).tolist())


MICRO_BATCH_COST = 128
"""What one more micro-batch costs beside its tokens, in tokens: reading the weights, and casting them under autocast. Measured
on a 135M model on a CPU (0.6 s beside 4.5 ms a token); it decides where micro-batches are cut, not what they add up to."""


def micro_batches(
    rows: Sequence[T],
    size: int,
    process: int,
    processes: int,
    length: Callable[[T], int] | None = None,
    tokens: int | None = None,
) -> list[list[T]]:
    """This process's part of a global batch, cut in micro-batches of at most `size` rows.

    Every process gets the same *number* of micro-batches (the last ones may be empty), at least one: collective
    operations then meet. The rows of all processes together are exactly `rows`, none repeated.

    Args:
        length: tokens of a row. With it rows of like length come together, and a cut is made wherever it saves more padding
            than a micro-batch costs. Without it the order stays, and no more are cut than `size` asks for.
        tokens: of a micro-batch at most, padding included; a longer row goes alone. Needs `length`.
    """
    ordered = list(rows) if length is None else sorted(rows, key=length)
    shares = [ordered[index::processes] for index in range(processes)]
    cuts = [_cuts([0 if length is None else length(row) for row in share], size, tokens) for share in shares]
    most = max(1, *map(len, cuts))
    mine = [shares[process][first:last] for first, last in cuts[process]]
    return mine + [[] for _ in range(most - len(mine))]


def _cuts(lengths: Sequence[int], size: int, tokens: int | None) -> list[tuple[int, int]]:
    """Where to cut rows of rising length so that padded tokens and micro-batches cost least together: first and last + 1 of
    each piece. Of equally good ways the one with the largest first pieces."""
    cost, last = [0] * (len(lengths) + 1), [0] * len(lengths)
    for first in reversed(range(len(lengths))):
        ends = list(range(min(first + size, len(lengths)), first, -1))
        if tokens is not None:
            ends = [end for end in ends if end == first + 1 or lengths[end - 1] * (end - first) <= tokens]
        costs = [MICRO_BATCH_COST + lengths[end - 1] * (end - first) + cost[end] for end in ends]
        cost[first] = min(costs)
        last[first] = ends[costs.index(cost[first])]
    pieces: list[tuple[int, int]] = []
    first = 0
    while first < len(lengths):
        pieces.append((first, last[first]))
        first = last[first]
    return pieces


def dealt(rows: Sequence[T], size: int, process: int, processes: int) -> list[Sequence[T]]:
    """This process's micro-batches, which are the same ones for any number of processes: whole ones of `size` consecutive
    rows are dealt out. Every process gets as many, at least one; the last may be empty."""
    whole = [rows[first : first + size] for first in range(0, len(rows), size)]
    return [share[0] if share else rows[:0] for share in micro_batches(whole, 1, process, processes)]
