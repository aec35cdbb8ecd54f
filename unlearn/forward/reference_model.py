"""The original model's outputs without a second model: what training changed is taken back for a moment.

Only what may change is kept twice (for six MLPs of a 1B model a quarter of the weights); with adapters nothing is, since
the model without them is the original one. Both work on whole and on sharded parameters alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lm.shards import is_sharded, reshard


class Reference(Protocol):
    """A way back to the original model."""

    head_weights: dict[str, Tensor]
    """The head's own original parameters, where they may change; known after a `restored` pass that called `keep_head`."""

    @property
    def kept(self) -> list[Tensor]:
        """What is held in memory for it."""

    def restored(self) -> AbstractContextManager[None]:
        """Inside the block, and without gradients, a whole forward pass is the original model's."""

    def at_head(self) -> AbstractContextManager[None]:
        """Inside the block the head, given `head_weights`, is the original one; a graph of the model as it is may be open."""

    def keep_head(self, head: nn.Module) -> None:
        """Called within a restored pass, where the head's weights are whole: copy those that may change."""


def reference(model: nn.Module) -> Reference:
    """The way back to what `model` is now, whose trainable parameters are about to change."""
    adapters = [module for module in model.modules() if isinstance(module, LoraLayer)]
    return WithoutAdapters(adapters) if adapters else Original(model)


def untrained(model: nn.Module) -> AbstractContextManager[None]:
    """Inside the block, a model that was not trained yet is exactly the one that was loaded: adapters may round."""
    adapters = [module for module in model.modules() if isinstance(module, LoraLayer)]
    return WithoutAdapters(adapters).restored() if adapters else nullcontext()


class Original:
    """The first values of the trainable parameters of `model` (this process's shards of them)."""

    def __init__(self, model: nn.Module) -> None:
        self.head_weights: dict[str, Tensor] = {}
        self._model = model
        reshard(model)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._others = [_local(p).detach().clone() for p in self._parameters]

    @property
    def kept(self) -> list[Tensor]:
        """The values that are not in the model now."""
        return [*self._others, *self.head_weights.values()]

    @contextmanager
    def restored(self) -> Iterator[None]:
        """The first values are exchanged with those of now, and back."""
        with torch.no_grad():
            self._exchange()
            try:
                yield
            finally:
                self._exchange()

    def at_head(self) -> AbstractContextManager[None]:
        """`head_weights` say all."""
        return nullcontext()

    def keep_head(self, head: nn.Module) -> None:
        """The head's trainable parameters; of shards, which are whole only for the moment, copies."""
        own = ((name, value.detach()) for name, value in head.named_parameters(recurse=False) if value.requires_grad)
        sharded = is_sharded(self._model)
        self.head_weights = {name: value.clone() if sharded else value for name, value in own}

    def _exchange(self) -> None:
        """Parameters and `_others` change places: whole ones without a copy, so that a graph keeps what it holds."""
        for place, parameter in enumerate(self._parameters):
            other = self._others[place]
            if isinstance(parameter, DTensor):
                now = _local(parameter).clone()
                _local(parameter).copy_(other)
                other.copy_(now)
            else:
                self._others[place], parameter.data = parameter.data, other
        reshard(self._model)  # a shard that stayed gathered after a forward would hide the new values


class WithoutAdapters:
    """The adapters, and nothing beside them, may change."""

    def __init__(self, adapters: Sequence[LoraLayer]) -> None:
        self.head_weights: dict[str, Tensor] = {}
        self._adapters = adapters

    @property
    def kept(self) -> list[Tensor]:
        """Nothing."""
        return []

    @contextmanager
    def restored(self) -> Iterator[None]:
        """The adapters are switched off. (peft's own switch would also change which parameters require gradients.)"""
        with torch.no_grad():
            for adapter in self._adapters:
                adapter._disable_adapters = True
            try:
                yield
            finally:
                for adapter in self._adapters:
                    adapter._disable_adapters = False

    def at_head(self) -> AbstractContextManager[None]:
        """No weight changes, so this may be done at any time."""
        return self.restored()

    def keep_head(self, head: nn.Module) -> None:
        """Nothing to copy."""


def _local(parameter: Tensor) -> Tensor:
    data = parameter.detach()
    return data.to_local() if isinstance(data, DTensor) else data
