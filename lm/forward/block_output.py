"""What a block's output is made of: the stream after it, in some families (GPT-J, Bloom, Falcon) inside a tuple."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lm.shards import is_sharded

_TUPLES: dict[type[nn.Module], bool] = {}
"""Class of a block -> whether its output is a tuple, of those that were asked."""


def as_the_block_says(
    block: nn.Module,
    stream: Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    forward: Callable[..., Any] | None = None,
) -> Any:
    """`stream` in the form in which a block gives its output, for what stands in for the block.

    The first block of its class is run once, without gradients and dropout, on the arguments: nothing else tells the form.

    Args:
        forward: what runs the block, where its own forward was replaced.
    """
    if type(block) not in _TUPLES:
        training = {module: module.training for module in block.modules()}
        block.eval()
        try:
            with torch.no_grad():
                run = forward or (
                    block if is_sharded(block) else block.forward
                )  # shards are gathered by the block's hooks
                _TUPLES[type(block)] = isinstance(run(*args, **kwargs), tuple)
        finally:
            for module, flag in training.items():
                module.training = flag
    return (stream, None) if _TUPLES[type(block)] else stream
