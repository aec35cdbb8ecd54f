"""Parts of a model's forward pass, through its own code: only up to a block, only from a block on, or the head alone.

While a context is open some of the model's children are stand-ins; its parameters, hooks and wrappers (DDP, FSDP2,
autocast, gradient checkpointing) stay as they are, so what runs is what would have run. `forward_replaced` lets other
work run in place of the model's forward, where those wrappers have everything ready. Every family of `lm.anatomy` works,
since no model's code is repeated here. Unlike `lm.forward.block_replay` this keeps gradients, and needs no cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from lm.forward.block_output import as_the_block_says
from lm.model import LanguageModel


@contextmanager
def forward_replaced(model: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """While open, a call of the model, also through what wraps it, is a call of `forward` between the model's own hooks."""
    own = model.__dict__.get("forward")  # accelerate puts its autocast there
    model.forward = forward
    try:
        yield
    finally:
        del model.forward
        if own is not None:
            model.forward = own


def backbone(model: LanguageModel, **inputs: Any) -> BaseModelOutput:
    """What the model hands its head: `last_hidden_state` is `(rows, tokens, hidden)`, after the final norm."""
    found: BaseModelOutput = model.model.get_submodule(model.model.base_model_prefix)(**inputs, use_cache=False)
    return found


def head_logits(
    model: LanguageModel, found: BaseModelOutput, hidden: Tensor, weights: Mapping[str, Tensor] | None = None
) -> Tensor:
    """`(n, vocabulary)` logits of `(n, hidden)` states that `backbone` gave: head, bias, scaling and capping are the model's.

    The head's own hooks do not fire: under FSDP2 its weights must be there already, as they are inside a forward pass.

    Args:
        found: any output of `backbone`.
        weights: tensors to use in place of some of the head's own parameters, by their names in the head.
    """
    whole, head = model.model, model.model.get_submodule(model.anatomy.head)
    said = replace(found, last_hidden_state=hidden[None])
    with (
        _stand_in(whole, model.anatomy.names.body or whole.base_model_prefix, _Says(said)),
        _stand_in(whole, model.anatomy.head, _Bare(head, weights)),
    ):
        logits: Tensor = type(whole).forward(whole).logits
    return logits[0]


@contextmanager
def up_to(model: LanguageModel, layer: int) -> Iterator[None]:
    """While open, `backbone` runs no block after `layer`, and its `last_hidden_state` is the stream after that block."""
    anatomy = model.anatomy
    blocks = model.model.get_submodule(anatomy.blocks)
    assert isinstance(blocks, nn.ModuleList)
    with (
        _stand_in(model.model, anatomy.blocks, nn.ModuleList(list(blocks)[: layer + 1])),
        _stand_in(
            model.model, anatomy.norm, _NoNorm(model.model.get_submodule(anatomy.norm), anatomy.names.norm_first)
        ),
    ):
        yield


@contextmanager
def starting_with(model: LanguageModel, layer: int, stream: Tensor) -> Iterator[None]:
    """While open, no block before `layer` runs, and that block reads `stream`, `(rows, tokens, hidden)`."""
    blocks = model.model.get_submodule(model.anatomy.blocks)
    assert isinstance(blocks, nn.ModuleList)
    given = [_Given(stream, block) for block in list(blocks)[:layer]]
    with _stand_in(model.model, model.anatomy.blocks, nn.ModuleList([*given, *list(blocks)[layer:]])):
        yield


class _Says(nn.Module):
    """A backbone whose result is known."""

    def __init__(self, said: BaseModelOutput) -> None:
        super().__init__()
        self.said = said

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutput:
        return self.said


class _NoNorm(nn.Module):
    """The final norm left out; of one that is also applied to the embeddings, every second call is."""

    def __init__(self, norm: nn.Module, first: bool) -> None:
        super().__init__()
        self.compute, self.first, self.calls = norm.forward, first, 0

    def forward(self, hidden: Tensor) -> Tensor:
        self.calls += 1
        found: Tensor = self.compute(hidden) if self.first and self.calls % 2 else hidden
        return found


class _Given(nn.Module):
    """A block whose output is known."""

    def __init__(self, stream: Tensor, block: nn.Module) -> None:
        super().__init__()
        self.stream = stream
        self.own = (block,)  # in a tuple: the block does not become a child
        self.attention_type = getattr(block, "attention_type", None)  # older transformers choose a mask by it

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return as_the_block_says(self.own[0], self.stream, args, kwargs)


class _Bare(nn.Module):
    """A head without its hooks."""

    def __init__(self, head: nn.Module, weights: Mapping[str, Tensor] | None) -> None:
        super().__init__()
        self.compute = head.forward  # a bound method: the head does not become a child
        self.parameters_of_head, self.instead = head._parameters, dict(weights or {})

    def forward(self, hidden: Tensor) -> Tensor:
        own = {name: self.parameters_of_head[name] for name in self.instead}
        self.parameters_of_head.update(self.instead)  # type: ignore[arg-type]
        try:
            logits: Tensor = self.compute(hidden)
        finally:
            self.parameters_of_head.update(own)
        return logits


@contextmanager
def _stand_in(model: nn.Module, name: str, module: nn.Module) -> Iterator[None]:
    """While open, the child at a dotted name is `module`."""
    parent, _, child = name.rpartition(".")
    children = model.get_submodule(parent)._modules
    own = children[child]
    children[child] = module
    try:
        yield
    finally:
        children[child] = own
