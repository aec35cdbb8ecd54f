"""Low-rank adapters inside a scope: injected in place, trained instead of the weights, merged when saved.

The model keeps its class and its parts' names stay those of the anatomy; a saved checkpoint is a plain one.
"""

from __future__ import annotations

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lm.anatomy import Anatomy
from lm.errors import UserError
from unlearn.scope import Lora, ResolvedScope

_ADAPTER = "unlearn"


def inject(model: nn.Module, anatomy: Anatomy, scope: ResolvedScope, lora: Lora, *, seed: int) -> list[str]:
    """Put an adapter on every linear layer inside the scope; returns the names of the adapter's parameters.

    The first factor is drawn with `seed`, the second is 0: nothing changes until a step is taken.
    """
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and scope.contains(anatomy, f"{name}.weight")
    ]
    if not targets:
        raise UserError(
            f"there is no linear layer in layers {scope.layers}, modules {scope.modules}: LoRA has nothing to adapt"
        )
    settings = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, lora_dropout=0.0, bias="none")
    inject_adapter_in_model(settings, model, adapter_name=_ADAPTER)
    generator = torch.Generator().manual_seed(seed)
    names = []
    for name, parameter in model.named_parameters():
        inside = ".lora_" in name
        parameter.requires_grad_(inside)
        if inside:
            names.append(name)
            if ".lora_A." in name:
                with torch.no_grad():
                    bound = parameter.shape[1] ** -0.5
                    parameter.copy_((torch.rand(parameter.shape, generator=generator) * 2 - 1) * bound)
    return names


def merged_name(name: str) -> str | None:
    """The plain name of a parameter of an adapted model; None for the adapter's own parameters."""
    return None if ".lora_" in name else name.replace(".base_layer.", ".")


def merge(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add each adapter's update, `alpha / rank * B @ A` in float32, to its plain weight in `weights` (whole CPU tensors)."""
    merged = {plain: tensor for name, tensor in weights.items() if (plain := merged_name(name)) is not None}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and _ADAPTER in module.scaling:
            low = weights[f"{name}.lora_A.{_ADAPTER}.weight"].float()
            high = weights[f"{name}.lora_B.{_ADAPTER}.weight"].float()
            base = merged[f"{name}.weight"]
            merged[f"{name}.weight"] = (base.float() + module.scaling[_ADAPTER] * (high @ low)).to(base.dtype)
    return merged
