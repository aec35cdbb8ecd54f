"""Activations that the backward pass computes again, for memory; without dropout, so that both times are alike."""

from __future__ import annotations

from torch import nn

from lm.errors import UserError


def recompute_activations(model: nn.Module) -> None:
    """Switch it on, in place, and every dropout off. Raises UserError for a model that cannot do it."""
    enable = getattr(model, "gradient_checkpointing_enable", None)
    if enable is None:
        raise UserError("this model has no gradient checkpointing: set trainer.gradient_checkpointing: false")
    enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()  # transformers recomputes in training mode only, so dropout is switched off by its rates
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for rate in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, rate, None), float):
                setattr(module, rate, 0.0)
