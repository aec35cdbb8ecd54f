"""Run a model only as far as the deepest site that is asked for.

A hook after those of `lm.capture` looks whether every site has been reached, and if so ends the forward pass by an
exception that never leaves this module. So no block list is changed, no model code is repeated, the order in which an
architecture calls its modules does not matter, and what was captured is what the whole forward pass would have given.
Not for models whose parameters are shards (FSDP2) or offloaded: their own hooks must see the end of a forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lm.anatomy import EMBEDDING, Site, module_at
from lm.errors import UserError
from lm.forward.hooks import Captured, capture
from lm.model import LanguageModel
from lm.shards import is_sharded


class _Reached(Exception):
    """Every site has its values."""


@torch.no_grad()
def forward(
    model: LanguageModel, ids: Tensor, attention_mask: Tensor, sites: Sequence[Site], *, cut: bool = True
) -> dict[Site, Tensor]:
    """Site -> `(batch, tokens, hidden)` in the model's type, for token ids `(batch, tokens)` and their padding mask.

    In eval mode and without gradients. `cut=False` runs the whole model.
    """
    if cut and is_sharded(model.model):
        raise UserError("the model's parameters are shards, so its forward pass cannot be cut short: set cut: false")
    training = model.model.training
    model.model.train(False)
    try:
        with capture(model, sites) as seen, _stop(model, seen, enabled=cut):
            model.model(input_ids=ids, attention_mask=attention_mask, use_cache=False)
    finally:
        model.model.train(training)
    return {site: seen[site] for site in seen.sites}


@contextmanager
def _stop(model: LanguageModel, seen: Captured, *, enabled: bool) -> Iterator[None]:
    def look(*_: Any) -> None:
        if all(site in seen for site in seen.sites):
            raise _Reached

    handles = []
    try:
        for site in seen.sites if enabled else ():
            if site == EMBEDDING:
                handles.append(module_at(model.model, model.anatomy.block_path(0)).register_forward_pre_hook(look))
            else:
                handles.append(module_at(model.model, model.anatomy.module_path(site)).register_forward_hook(look))
        yield
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
