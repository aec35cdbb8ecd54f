"""What must survive an interruption: trainable weights, optimiser moments, and a few numbers. Safetensors and JSON only.

Tensors are stored whole under their parameter names, so a checkpoint does not depend on the number of processes or on
sharding. Names and atomicity of folders belong to `lm.run`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from lm.devices import gather, scatter_into
from lm.errors import UserError
from lm.run import write_json

WEIGHTS = "weights.safetensors"
MOMENTS = "optimiser.safetensors"
FACTS = "state.json"


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter, for those that may change."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def collect(
    model: nn.Module, optimiser: Optimizer | None, *, main: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Whole copies, on the main process's CPU, of weights and moments. Every process must call it."""
    weights: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    for name, parameter in trainable(model).items():
        _keep(weights, name, parameter, main)
        if optimiser is not None:
            for key, value in sorted(optimiser.state.get(parameter, {}).items()):
                _keep(moments, f"{key}::{name}", value, main)
    return weights, moments


def write(folder: Path, weights: dict[str, Tensor], moments: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write one state into an existing (temporary) folder; main process only."""
    save_file(weights, folder / WEIGHTS)
    if moments:
        save_file(moments, folder / MOMENTS)
    write_json(folder / FACTS, facts)


def read_facts(folder: Path) -> dict[str, Any]:
    """The numbers of a state."""
    facts: dict[str, Any] = json.loads((folder / FACTS).read_text())
    return facts


def restore(folder: Path, model: nn.Module, optimiser: Optimizer | None) -> None:
    """Set weights (and moments) from a folder, on every process, in place.

    Raises:
        UserError: the state belongs to another scope.
    """
    parameters = trainable(model)
    with safe_open(folder / WEIGHTS, framework="pt") as weights:
        if set(weights.keys()) != set(parameters):
            other = sorted(set(weights.keys()) ^ set(parameters))[0]
            raise UserError(f"the checkpoint {folder} was made for another scope ({other} differs): use the same scope")
        for name, parameter in parameters.items():
            scatter_into(parameter, weights.get_tensor(name))
    if optimiser is None or not (folder / MOMENTS).exists():
        return
    with safe_open(folder / MOMENTS, framework="pt") as moments:
        for key in moments.keys():  # noqa: SIM118 (a file handle, not a dict)
            kind, name = key.split("::", 1)
            whole = moments.get_tensor(key)
            if whole.ndim == 0:
                optimiser.state[parameters[name]][kind] = whole
            else:
                target = torch.empty_like(parameters[name])
                scatter_into(target, whole)
                optimiser.state[parameters[name]][kind] = target.detach()


def _keep(into: dict[str, Tensor], name: str, tensor: Tensor, main: bool) -> None:
    whole = gather(tensor)
    if main:
        into[name] = whole.contiguous()
