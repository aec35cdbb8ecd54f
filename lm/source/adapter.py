"""A PEFT adapter merged into the weights of a model, so that the result says what the two said together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from lm.errors import UserError, one_line
from lm.hub import BROKEN

_PROBE = 8
"""Tokens on which the merged model is held against the two parts."""


def merge_adapter(model: PreTrainedModel, name: str, folder: Path) -> PreTrainedModel:
    """Merge the adapter of a folder into the weights.

    Where the model ties its embedding to its head and the adapter changes one of them, the other stays as it was and they
    are tied no longer, which is how an adapter computes before it is merged.

    Raises UserError, calling the adapter `name`, for one whose tensors do not match the model one for one, or that cannot be
    merged into weights without changing what the model says.
    """
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise UserError(f"the adapter {name} has no adapter_model.safetensors: save it again as safetensors")
    try:
        with safe_open(weights, framework="pt") as file:
            stored = set(file.keys())
        wrapped = PeftModel.from_pretrained(model, str(folder), is_trainable=False)
        odd = sorted(stored ^ set(get_peft_model_state_dict(wrapped)))
        rows = len(_ends(model)[0].weight)
        apart = _say(wrapped.train(False), rows)
        _untie(model)
        merged = wrapped.merge_and_unload()
    except BROKEN as error:
        raise UserError(f"the adapter {name} cannot be merged into this model: {one_line(error)}") from error
    if odd:
        raise UserError(f"the adapter {name} does not fit this model, {odd[0]} first: use the base it was made for")
    assert isinstance(merged, PreTrainedModel)
    embedding, head = _ends(merged)
    if embedding.weight is not head.weight:
        for config in (merged.config, merged.config.get_text_config()):
            config.tie_word_embeddings = False
    _require_same(name, apart, _say(merged, rows), merged.dtype)
    return merged


def _ends(model: PreTrainedModel) -> tuple[Any, Any]:
    """The embedding and the head, with what an adapter put round them."""
    return model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[no-untyped-call]


def _untie(model: PreTrainedModel) -> None:
    """Give embedding and head a weight each, if they share one and there is an adapter on either."""
    ends = _ends(model)
    embedding, head = (end.get_base_layer() if hasattr(end, "get_base_layer") else end for end in ends)
    if (embedding, head) != ends and embedding.weight is head.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)


@torch.no_grad()
def _say(model: nn.Module, rows: int) -> Tensor:
    """(tokens, vocabulary) float32 logits of a few tokens."""
    ids = torch.randint(rows, (1, _PROBE), generator=torch.Generator().manual_seed(0))
    logits: Tensor = model(input_ids=ids).logits
    return logits[0].float()


def _require_same(name: str, apart: Tensor, merged: Tensor, dtype: torch.dtype) -> None:
    """Up to rounding: a thousandth of the logits' size in float32, a tenth in lower precision, where weights are rounded."""
    off = float((merged - apart).norm() / apart.norm())
    if not off <= (1e-3 if dtype == torch.float32 else 0.1):
        raise UserError(
            f"the adapter {name} says something else when it is merged (logits are off by {off:.1%} of their size): merge it "
            "where it was made, save the whole model, and give that as path"
        )
