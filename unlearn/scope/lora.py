"""Low-rank adapters inside a scope: injected in place, trained instead of the weights, merged when saved.

The model keeps its class and its parts' names stay those of the anatomy; a saved checkpoint is a plain one.
"""

from __future__ import annotations

import importlib.util

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lm.anatomy import Anatomy
from lm.errors import UserError
from unlearn.scope.scope import Lora, ResolvedScope

_ADAPTER = "unlearn"


def require(lora: Lora, *, sharded: bool) -> None:
    """Refuse, before anything loads, what is not installed or cannot run."""
    if lora.quantize and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("scope.lora.quantize needs bitsandbytes: pip install bitsandbytes, or set it to false")
    if lora.quantize and sharded:
        raise UserError("scope.lora.quantize holds whole 4-bit weights on every process: launch with DDP, not FSDP")


def quantize(model: nn.Module, anatomy: Anatomy, device: torch.device) -> None:
    """Replace every linear layer of the blocks by one with 4-bit weights (NF4) on `device`; embedding and head stay dense.

    Raises:
        UserError: a model whose blocks have no such layers (GPT-2); on a CPU, layers of a width that bitsandbytes gets wrong.
    """
    from bitsandbytes.nn import Linear4bit, Params4bit

    named = [(name, module) for name, module in model.named_modules() if name.startswith(f"{anatomy.blocks}.")]
    linear = [(name, module) for name, module in named if isinstance(module, nn.Linear)]
    if not linear:
        raise UserError(
            f"the blocks of {anatomy.architecture} have no plain linear layers: set scope.lora.quantize to false"
        )
    for name, module in linear:
        inside, out, bias = module.in_features, module.out_features, module.bias
        if device.type == "cpu" and inside % 64:  # 0.50.2: up to a third off, where a block of scales crosses rows
            raise UserError(
                f"{name} reads {inside} numbers, no multiple of 64, which bitsandbytes gets wrong on a CPU: train on a GPU, or "
                "set scope.lora.quantize to false"
            )
        small = Linear4bit(inside, out, bias=bias is not None, compute_dtype=module.weight.dtype, quant_type="nf4")
        small.support_avx512bf16_for_cpu = False  # else it turns itself into a coarser form for inference amid training
        small.weight = Params4bit(module.weight.detach(), requires_grad=False, quant_type="nf4")
        if bias is not None:
            small.bias = bias
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, small.to(device))  # moving it is what quantizes
    model.is_loaded_in_4bit = True  # type: ignore[assignment]  # what peft looks for


def inject(model: nn.Module, anatomy: Anatomy, scope: ResolvedScope, lora: Lora, *, seed: int) -> list[str]:
    """Put an adapter on every linear layer inside the scope; returns the names of the adapter's parameters.

    The first factor is drawn with `seed`, the second is 0: nothing changes until a step is taken. In a `model` scope the
    embedding, and a head that is tied to it, stay as they are.

    Raises:
        UserError: no linear layer in the scope, or a block with weights that are none (a mixture's stacked experts).
    """
    targets = _targets(model, anatomy, scope)
    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=targets,
        lora_dropout=0.0,
        bias="none",
        use_dora=lora.use_dora,
        fan_in_fan_out=isinstance(model.get_submodule(targets[0]), Conv1D),  # a family has one kind or the other
    )
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


def _targets(model: nn.Module, anatomy: Anatomy, scope: ResolvedScope) -> list[str]:
    """The names of the linear layers to adapt."""
    embedding = model.get_submodule(anatomy.embedding).weight
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and scope.contains(anatomy, f"{name}.weight")
        and module.weight is not embedding
    ]
    inside = [f"{anatomy.block_path(layer)}." for layer in scope.layers]
    left_out = [
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1
        and scope.contains(anatomy, name)
        and name.rpartition(".")[0] not in targets
        and any(name.startswith(prefix) for prefix in inside)
    ]
    if left_out:
        raise UserError(
            f"LoRA adapts linear layers, and {left_out[0]} in the scope is none (stacked experts, for instance): "
            "set scope.modules to attn, or scope.lora to null"
        )
    if not targets:
        raise UserError(
            f"there is no linear layer in layers {scope.layers}, modules {scope.modules}: LoRA has nothing to adapt; "
            "widen the scope, or set scope.lora to null"
        )
    return targets


def adapted(model: nn.Module) -> bool:
    """Whether there are adapters in it."""
    return any(isinstance(module, LoraLayer) for module in model.modules())


def remove(model: nn.Module) -> None:
    """Take every adapter out, with what it learned: the plain layers stand in their places again."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())


def merged_name(name: str) -> str | None:
    """The plain name of a parameter of an adapted model; None for the adapter's own parameters."""
    return None if ".lora_" in name else name.replace(".base_layer.", ".")


def merge(model: nn.Module, weights: dict[str, Tensor], *, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Add each adapter's update, `alpha / rank * B @ A`, to its plain weight in `weights` (whole CPU tensors), in float32.

    With DoRA each output's row is then scaled to the length that was learned. The result is rounded once, to `dtype` or else to
    the weight's own type.
    """
    merged = {plain: tensor for name, tensor in weights.items() if (plain := merged_name(name)) is not None}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and _ADAPTER in module.scaling:
            low = weights[f"{name}.lora_A.{_ADAPTER}.weight"].float()
            high = weights[f"{name}.lora_B.{_ADAPTER}.weight"].float()
            other_way_round = isinstance(module.get_base_layer(), Conv1D)  # (in, out)
            base = merged[f"{name}.weight"]
            whole = (base.T if other_way_round else base).float() + module.scaling[_ADAPTER] * (high @ low)
            length = weights.get(f"{name}.lora_magnitude_vector.{_ADAPTER}.weight")
            if length is not None:
                whole = whole * (length.float() / whole.norm(dim=1))[:, None]
            merged[f"{name}.weight"] = (whole.T if other_way_round else whole).to(dtype or base.dtype).contiguous()
    return merged
