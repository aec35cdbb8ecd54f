"""The original model's outputs without a second model: the trainable weights' first values, put back for a moment.

Only what may change is kept twice (for six MLPs of a 1B model a quarter of the weights). It works on whole and on
sharded parameters alike, because it never leaves this process's part.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


class Original:
    """The first values of the trainable parameters of `model` (this process's shards of them)."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._first = [_local(p).detach().clone() for p in self._parameters]

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Inside the block, and without gradients, the model is the original one."""
        with torch.no_grad():
            now = [_local(p).detach().clone() for p in self._parameters]
            self._set(self._first)
            try:
                yield
            finally:
                self._set(now)

    def _set(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self._parameters, values, strict=True):
            _local(parameter).copy_(value)
        for module in self._model.modules():  # a shard that stayed gathered after a forward would hide the new values
            if isinstance(module, FSDPModule):
                module.reshard()


def _local(parameter: Tensor) -> Tensor:
    data = parameter.detach()
    return data.to_local() if isinstance(data, DTensor) else data
