"""Attention seen from inside: the queries, keys and probabilities of every layer in a forward pass, to read or to replace.

They are seen through an attention function of our own, in the place that transformers has for it, so that no model's code is
repeated. What is done with them is in `tracing.localizers.query_key`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from lm.anatomy import module_at
from lm.errors import UserError
from lm.model import LanguageModel

Change = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(layer, query, key) -> the query and key that are used instead."""

_NAME = "palimpsest_watched"


@dataclass(frozen=True, kw_only=True)
class Attended:
    """What one attention layer did in a forward pass, after norms and rotary angles.

    Attributes:
        query: (rows, heads, tokens, size).
        key: (rows, key heads, tokens, size); several query heads may share one.
        probabilities: (rows, heads, tokens, tokens), in float32 (float64 stays).
        mask: (rows or 1, 1, tokens, tokens), added to the scores.
        scaling, softcap: of the scores; see `scores`.
    """

    query: Tensor
    key: Tensor
    probabilities: Tensor
    mask: Tensor | None
    scaling: float
    softcap: float | None

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        """(rows, heads, tokens, tokens), without the mask, in the type of the probabilities."""
        return _scores(query, key, self.scaling, self.softcap, self.probabilities.dtype)


class Watch:
    """What `watched` saw of the last forward pass: `watch[layer]`."""

    def __init__(self, layers: dict[int, int], change: Change | None) -> None:
        self._layers, self._change = layers, change
        self._seen: dict[int, Attended] = {}

    def __getitem__(self, layer: int) -> Attended:
        if layer not in self._seen:
            raise UserError(f"attention at layer {layer} was not reached: run the model inside the context first")
        return self._seen[layer]

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, how: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        layer = self._layers.get(id(module))
        if layer is None:
            raise UserError(f"{type(module).__name__} is no attention layer of this model: mend KNOWN in lm/anatomy.py")
        unknown = [name for name in ("s_aux", "position_bias") if how.get(name) is not None]
        if unknown or how.get("dropout"):
            raise UserError(
                f"{type(module).__name__} has {unknown[0] if unknown else 'dropout'} in its attention, which queries and keys "
                "are not attributed with: leave queries_and_keys out"
            )
        if mask is None and query.shape[2] > 1:
            raise UserError(f"{type(module).__name__} was given no mask: queries and keys cannot be attributed in it")
        if self._change is not None:
            query, key = self._change(layer, query, key)
        scaling = how.get("scaling")
        scaling = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        scores = _scores(query, key, scaling, how.get("softcap"), wide)
        probabilities = (scores if mask is None else scores + mask).softmax(-1)
        self._seen[layer] = Attended(
            query=query, key=key, probabilities=probabilities, mask=mask, scaling=scaling, softcap=how.get("softcap")
        )
        mixed = probabilities.to(value.dtype) @ _for_heads(value, query.shape[1])
        return rearrange(mixed, "rows heads tokens size -> rows tokens heads size").contiguous(), probabilities


_WATCH: ContextVar[Watch] = ContextVar("_WATCH")


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **how: Any
) -> tuple[Tensor, Tensor]:
    """The attention function that transformers calls while `watched` is open."""
    return _WATCH.get().attend(module, query, key, value, attention_mask, how)


@contextmanager
def watched(model: LanguageModel, change: Change | None = None) -> Iterator[Watch]:
    """While open, every attention layer computes its probabilities in full and they are kept, with the autograd graph.

    The same numbers as the model's own attention, to rounding. `change` replaces queries and keys before they are used. On
    leaving, also by an exception, the model's attention is what it was.

    Raises:
        UserError: a model whose attention cannot be replaced, or does more than softmax over masked, scaled, perhaps
            soft-capped scores (attention sinks, position biases), or that has layers without keys.
    """
    anatomy, config = model.anatomy, model.model.config
    if recurrent := anatomy.recurrent:
        raise UserError(
            f"layer {recurrent[0]} of {model.name} keeps one state in place of keys, so it has no attention to look into: leave "
            "queries_and_keys out"
        )
    layers = {
        id(module): layer
        for layer in range(anatomy.layers)
        for name in anatomy.parts[layer].attn
        for module in module_at(model.model, f"{anatomy.block_path(layer)}.{name}").modules()
    }
    before = config._attn_implementation
    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, eager_mask)
    watch = Watch(layers, change)
    token = _WATCH.set(watch)
    try:
        model.model.set_attn_implementation(_NAME)
        if config._attn_implementation != _NAME:
            raise UserError(f"the attention of {model.name} cannot be replaced: leave queries_and_keys out")
        yield watch
    finally:
        _WATCH.reset(token)
        model.model.set_attn_implementation(before)


def _scores(query: Tensor, key: Tensor, scaling: float, softcap: float | None, dtype: torch.dtype) -> Tensor:
    keys = rearrange(_for_heads(key, query.shape[1]), "rows heads tokens size -> rows heads size tokens")
    scores = (query @ keys * scaling).to(dtype)
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap


def _for_heads(shared: Tensor, heads: int) -> Tensor:
    """(rows, heads, tokens, size): keys or values, given to each of the query heads that share them."""
    group = heads // shared.shape[1]
    return repeat(shared, "rows shared tokens size -> rows (shared group) tokens size", group=group)
