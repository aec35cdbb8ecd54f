"""From hidden states to a few numbers a token: the head, and whatever reads logits, on a few tokens at a time.

The logits of a batch never exist together. Where the head is frozen each chunk's slopes in its hidden states are kept in
place of its logits, which costs what one pass costs; where it learns too, a chunk is computed again in the backward pass,
unless it is the only one: the backward pass begins with it, and would hold it then anyway.
What is measured is given as a function; models and losses are elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Measure = Callable[[Tensor, slice], tuple[Tensor, ...]]
"""(n, hidden) states, and which tokens they are, to float32 numbers, each (n,) and separate for each token."""

_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 25}
"""Logits at a time: 16 MiB of float32 on a CPU, and enough rows to keep a GPU busy."""
_LEARNING_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 25}
"""The same where the head learns: each chunk adds to a gradient as large as the head, and several are computed twice."""


def chunk_tokens(vocabulary: int, device: torch.device, *, head_learns: bool) -> int:
    """How many tokens' logits are computed at once."""
    elements = _LEARNING_ELEMENTS if head_learns else _ELEMENTS
    return max(elements.get(device.type, elements["cuda"]) // vocabulary, 1)


def in_chunks(measure: Measure, hidden: Tensor, *, size: int, head_learns: bool) -> tuple[Tensor, ...]:
    """`measure` of `(n, hidden)` states, `size` tokens at a time; each result is `(n,)`, with a graph where gradients are on.

    Args:
        head_learns: `measure` also depends on weights that require gradients.
    """
    spans = [slice(first, first + size) for first in range(0, len(hidden), size)]
    learns = torch.is_grad_enabled()
    if learns and hidden.requires_grad and not head_learns:
        values: tuple[Tensor, ...] = _KeptSlopes.apply(hidden, measure, spans)  # type: ignore[no-untyped-call]
        return values
    if learns and head_learns and len(spans) > 1:
        parts = [
            checkpoint(measure, hidden[span], span, use_reentrant=False, preserve_rng_state=False) for span in spans
        ]
    else:
        parts = [measure(hidden[span], span) for span in spans]
    return tuple(torch.cat(values) for values in zip(*parts, strict=True))


class _KeptSlopes(torch.autograd.Function):
    """Forward: values, chunk by chunk, and each one's slope in its own token's state. Backward: slopes times what came."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, measure: Measure, spans: list[slice]) -> tuple[Tensor, ...]:
        parts: list[tuple[Tensor, ...]] = []
        slopes: list[list[Tensor]] = []
        for span in spans:
            with torch.enable_grad():
                state = hidden[span].detach().requires_grad_()
                values = measure(state, span)
            parts.append(tuple(value.detach() for value in values))
            slopes.append([_slope(value, state, last=value is values[-1]) for value in values])
            del values
        ctx.save_for_backward(*(torch.cat(each) for each in zip(*slopes, strict=True)))
        ctx.set_materialize_grads(False)
        return tuple(torch.cat(each) for each in zip(*parts, strict=True))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None, None]:
        total: Tensor | None = None
        for gradient, slope in zip(gradients, ctx.saved_tensors, strict=True):
            if gradient is not None:
                share = (gradient[:, None] * slope).to(slope.dtype)
                total = share if total is None else total + share
        return total, None, None


def _slope(value: Tensor, state: Tensor, *, last: bool) -> Tensor:
    """(n, hidden) d value / d state; zero for a number that does not depend on the state."""
    if not value.requires_grad:
        return torch.zeros_like(state)
    return torch.autograd.grad(value, state, torch.ones_like(value), retain_graph=not last)[0]
