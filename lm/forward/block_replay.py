"""Run the blocks of a model one at a time, each through its own forward, on tokens whose past is already known.

What a block is given besides the stream (rotary angles, masks, also of sliding windows, positions) is what the model
itself gives it: `calls` runs the model's forward with blocks that only note their arguments, and `logits` runs it with
blocks that hand the given stream to the final norm and the head. So no model's code is repeated here and every family of
`lm.anatomy` works. Not for models whose parameters are shards (FSDP2): their own hooks must see a whole forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache

from lm.anatomy import module_at
from lm.errors import UserError
from lm.forward.block_output import as_the_block_says
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
    by_row: frozenset[int | str] = frozenset()
    """The arguments that have as many entries as there are rows, or heads of all rows (ALiBi): places and keywords."""

    def run(self, hidden: Tensor, past: Past, rows: Tensor) -> Tensor:
        """The stream after the block, `(n, tokens, hidden)`, for the stream before it.

        Args:
            hidden: `(n, tokens, hidden)`, the tokens from the one on that `calls` began with.
            past: keys and values of the tokens before them.
            rows: `(n,)`, the row of `past` that belongs to each row of `hidden`.
        """
        replayed = _Replayed(past, rows)

        def swap(name: int | str, value: Any) -> Any:
            if value is self.cache:
                return replayed
            if name not in self.by_row:
                return value
            ones = [1] * (value.ndim - 1)
            return value.repeat(len(hidden), *ones) if len(value) > 1 else value.expand(len(hidden), *value.shape[1:])

        args = [swap(place, value) for place, value in enumerate(self.args)]
        output = self.block(hidden, *args, **{name: swap(name, value) for name, value in self.kwargs.items()})
        after: Tensor = output[0] if isinstance(output, tuple) else output
        return after

    @property
    def given(self) -> dict[int | str, Any]:
        """The arguments by place or keyword."""
        pairs: list[tuple[int | str, Any]] = [*enumerate(self.args), *self.kwargs.items()]
        return dict(pairs)


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
    if recurrent := model.anatomy.recurrent:
        raise UserError(
            f"layer {recurrent[0]} of {model.name} keeps one state in place of a key and a value for each token, so its blocks "
            "cannot be run from a token on: trace with engine: reference; depth of unlearning cannot be measured in it"
        )
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
    one, two = _noted(model, embeddings, past, 1), _noted(model, embeddings, past, 2)
    return [
        replace(call, by_row=frozenset(name for name, value in call.given.items() if _grows(value, other.given[name])))
        for call, other in zip(one, two, strict=True)
    ]


def _grows(one: Any, two: Any) -> bool:
    """Whether an argument has twice as many entries for two rows as for one."""
    return isinstance(one, Tensor) and one.ndim > 1 and len(two) == 2 * len(one)


def _noted(model: LanguageModel, embeddings: Tensor, past: Past, rows: int) -> list[Call]:
    """What each block is given in a pass of so many equal rows."""
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(zip(past.keys, past.values, strict=True)):
        if keys.shape[2]:
            cache.update(keys[:1].repeat(rows, 1, 1, 1), values[:1].repeat(rows, 1, 1, 1), layer)
    seen: list[Call] = []

    def note(
        layer: int, block: Callable[..., Any], hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        seen.append(Call(block=block, args=args, kwargs=kwargs, cache=cache))
        return hidden

    with _blocks_replaced(model, note):
        model.model(
            inputs_embeds=embeddings.repeat(rows, 1, 1), past_key_values=cache, use_cache=True, logits_to_keep=1
        )
    return seen


@contextmanager
def last_mlp_at_the_end(model: LanguageModel, keep: int) -> Iterator[None]:
    """While open, the last block's MLP works on the last `keep` tokens alone and says 0 for the others: for passes of which
    nothing else is read after that block. Hooks on the MLP that are added later see the whole."""
    anatomy = model.anatomy
    parts = anatomy.parts[-1]
    if len(parts.mlp) > 1 or parts.mlp_out.startswith(f"{parts.mlp[0]}."):
        yield  # its output is that of a layer (OPT), or a layer's inside (Bloom), which would see those tokens alone
        return
    mlp = module_at(model.model, f"{anatomy.block_path(anatomy.layers - 1)}.{parts.mlp[0]}")
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

    own = [block.__dict__.get("forward") for block in blocks]  # a wrapper such as accelerate's may have put one there
    real = [block.forward for block in blocks]

    def replacement(layer: int) -> Callable[..., Any]:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            stream = instead(layer, blocks[layer], hidden_states, args, kwargs)
            return as_the_block_says(blocks[layer], stream, (hidden_states, *args), kwargs, forward=real[layer])

        return forward

    try:
        for layer, block in enumerate(blocks):
            block.forward = replacement(layer)
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward
