"""Run the blocks of a model one at a time, each through its own forward, on tokens whose past is already known.

What a block is given besides the stream (rotary angles, masks, also of sliding windows, positions) is what the model
itself gives it: `calls` runs the model's forward with blocks that only note their arguments, and `logits` runs it with
blocks that hand the given stream to the final norm and the head. So no model's code is repeated here and every family of
`lm.anatomy` works. Not for models whose parameters are shards (FSDP2): their own hooks must see a whole forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache

from lm.anatomy import module_at
from lm.errors import UserError
from lm.model import LanguageModel
from lm.shards import is_sharded


@dataclass(frozen=True, kw_only=True)
class Past:
    """Keys and values of every layer, each `(rows, heads, tokens, size)`, as attention was given them."""

    keys: Sequence[Tensor]
    values: Sequence[Tensor]

    @classmethod
    def of(cls, cache: DynamicCache) -> Past:
        """What a forward pass with `past_key_values=cache` left there."""
        layers: list[Any] = list(cache.layers)
        return cls(keys=[layer.keys for layer in layers], values=[layer.values for layer in layers])

    def of_rows(self, rows: slice) -> Past:
        """Some of the rows, without a copy."""
        return Past(keys=[each[rows] for each in self.keys], values=[each[rows] for each in self.values])

    def cut(self, tokens: int) -> Past:
        """The first `tokens` tokens, without a copy."""
        return Past(
            keys=[each[:, :, :tokens] for each in self.keys], values=[each[:, :, :tokens] for each in self.values]
        )


@dataclass(frozen=True, kw_only=True)
class Call:
    """What the model gives one block besides the stream; `run` gives it again with another stream and another past."""

    block: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    cache: DynamicCache

    def run(self, hidden: Tensor, past: Past, rows: Tensor) -> Tensor:
        """The stream after the block, `(n, tokens, hidden)`, for the stream before it.

        Args:
            hidden: `(n, tokens, hidden)`, the tokens from the one on that `calls` began with.
            past: keys and values of the tokens before them.
            rows: `(n,)`, the row of `past` that belongs to each row of `hidden`.
        """
        replayed = _Replayed(past, rows)

        def swap(value: Any) -> Any:
            return replayed if value is self.cache else value

        output = self.block(hidden, *map(swap, self.args), **{name: swap(value) for name, value in self.kwargs.items()})
        after: Tensor = output[0] if isinstance(output, tuple) else output
        return after


class _Replayed(DynamicCache):
    """A cache whose past is fixed: what attention adds to it is joined to that and not kept."""

    def __init__(self, past: Past, rows: Tensor) -> None:
        super().__init__()
        self._past, self._rows = past, rows

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = self._past.keys[layer_idx], self._past.values[layer_idx]
        if keys.shape[2] == 0:
            return key_states, value_states
        rows = self._rows.to(keys.device)
        return torch.cat([keys[rows], key_states], dim=2), torch.cat([values[rows], value_states], dim=2)


@torch.no_grad()
def trunk(model: LanguageModel, embeddings: Tensor, keep: int) -> tuple[Tensor, Past]:
    """One ordinary forward pass of embedded tokens `(rows, tokens, hidden)`: the logits at the last `keep` positions, and
    every layer's keys and values."""
    if is_sharded(model.model):
        raise UserError("the model's parameters are shards, so its blocks cannot be run alone: load it whole")
    cache = DynamicCache()
    found = model.model(inputs_embeds=embeddings, past_key_values=cache, use_cache=True, logits_to_keep=keep).logits
    if len(cache.layers) != model.anatomy.layers:
        raise UserError(
            f"{model.name} keeps keys and values for {len(cache.layers)} of {model.anatomy.layers} layers: "
            "its blocks cannot be run alone, use the reference engine"
        )
    return found[:, -keep:], Past.of(cache)


@torch.no_grad()
def calls(model: LanguageModel, embeddings: Tensor, past: Past) -> list[Call]:
    """What each block is given for `(1, tokens, hidden)` embedded tokens that follow the tokens of `past`.

    Of `past` only shapes and types matter. The values that the tokens have do not, so one list serves all prompts of a shape.
    """
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(zip(past.keys, past.values, strict=True)):
        if keys.shape[2]:
            cache.update(keys[:1], values[:1], layer)
    seen: list[Call] = []

    def note(
        layer: int, block: Callable[..., Any], hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        seen.append(Call(block=block, args=args, kwargs=kwargs, cache=cache))
        return hidden

    with _blocks_replaced(model, note):
        model.model(inputs_embeds=embeddings, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return seen


@contextmanager
def last_mlp_at_the_end(model: LanguageModel, keep: int) -> Iterator[None]:
    """While open, the last block's MLP works on the last `keep` tokens alone and says 0 for the others: for passes of which
    nothing else is read after that block. Hooks on the MLP that are added later see the whole."""
    anatomy = model.anatomy
    mlp = module_at(model.model, f"{anatomy.block_path(anatomy.layers - 1)}.{anatomy.names.mlp}")
    left = 0

    def cut(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        nonlocal left
        hidden = args[0] if args else kwargs["hidden_states"]
        left = max(hidden.shape[1] - keep, 0)
        end = hidden[:, left:].contiguous()  # some modules view their input
        return ((end, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": end})

    def fill(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        found, *others = output if isinstance(output, tuple) else (output,)
        whole = functional.pad(found, (0, 0, left, 0))
        return (whole, *others) if isinstance(output, tuple) else whole

    hooks = mlp.register_forward_pre_hook(cut, with_kwargs=True), mlp.register_forward_hook(fill)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def logits(model: LanguageModel, stream: Tensor) -> Tensor:
    """`(rows, tokens, vocabulary)` for the stream after the last block, `(rows, tokens, hidden)`."""

    def hand_over(
        layer: int, block: Callable[..., Any], hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        return stream

    with _blocks_replaced(model, hand_over):
        found: Tensor = model.model(inputs_embeds=stream, use_cache=False).logits
    return found


@contextmanager
def _blocks_replaced(model: LanguageModel, instead: Callable[..., Tensor]) -> Iterator[None]:
    """While open, a call of block `l` is a call of `instead(l, block, hidden, other arguments, other keywords)`."""
    blocks = [module_at(model.model, model.anatomy.block_path(layer)) for layer in range(model.anatomy.layers)]

    def replacement(layer: int) -> Callable[..., Tensor]:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return instead(layer, blocks[layer], hidden_states, args, kwargs)

        return forward

    own = [block.__dict__.get("forward") for block in blocks]  # a wrapper such as accelerate's may have put one there
    try:
        for layer, block in enumerate(blocks):
            block.forward = replacement(layer)
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward
