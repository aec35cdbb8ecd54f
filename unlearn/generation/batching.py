"""What every measurement of a model needs: evaluation mode for a while, batches of like length, a process's share.

The measurements themselves are in the modules beside this one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from lm.model import LanguageModel
from lm.shards import is_sharded

T = TypeVar("T")


@contextmanager
def evaluating(model: LanguageModel) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.model.modules()]
    model.model.train(False)
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def sorted_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in batches of like length, longest first (ties by index), so that an out-of-memory error comes at once.

    Every index occurs exactly once.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


@dataclass(frozen=True)
class Workers:
    """Which of how many processes this is, and how their results come together.

    Each takes every `count`-th item: none is taken twice and none left out. (The official script pads the shares to
    equal size by repeating rows, and then averages the repeated rows in.)
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"process {self.index} of {self.count} does not exist")

    @classmethod
    def current(cls) -> Workers:
        """The process group this process is in, or one process if there is none."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return cls()
        return cls(torch.distributed.get_rank(), torch.distributed.get_world_size())

    def with_index(self, index: int) -> Workers:
        """Another process of the same group."""
        return Workers(index, self.count)

    def share(self, items: int) -> range:
        """The indices this process works on, out of `range(items)`."""
        return range(self.index, items, self.count)

    def gather(self, mine: list[T]) -> list[T]:
        """All items in order, on every process, from this process's results for its share."""
        if self.count == 1:
            return mine
        everyone: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(everyone, mine)
        return merge(everyone)


ONE_PROCESS = Workers()


def unless_sharded(workers: Workers, model: LanguageModel) -> Workers:
    """These workers; but with sharded parameters each works on everything, because every forward needs them all."""
    return ONE_PROCESS if is_sharded(model.model) else workers


def merge(shares: Sequence[Sequence[T]]) -> list[T]:
    """The items in their first order again, from the processes' results in process order."""
    total = sum(len(each) for each in shares)
    merged: list[Any] = [None] * total
    for index, each in enumerate(shares):
        for place, value in zip(Workers(index, len(shares)).share(total), each, strict=True):
            merged[place] = value
    return merged
