"""What must survive an interruption: trainable weights, optimizer moments, and a few numbers. Safetensors and JSON only.

Each process writes the rows that it holds, under the parameters' names, and reads those that it needs: no process ever has
what is sharded whole, and a run goes on with any number of processes, sharded or not. They must see the same disk. Names
and atomicity of folders belong to `lm.run_folder`.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lm.devices import together
from lm.errors import UserError
from lm.run_folder import RunFolder, damage, writable, write_json
from lm.shards import first_row, is_sharded, local_part, reshard

WEIGHTS = "weights"
MOMENTS = "optimizer"
_MOMENTS_BEFORE = "optimiser"
"""What files of moments were called; they are still read."""
FACTS = "state.json"


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter, for those that may change."""
    reshard(model)
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save(
    acc: Accelerator,
    run: RunFolder,
    name: str,
    model: nn.Module,
    optimizer: Optimizer | None,
    facts: dict[str, Any],
) -> None:
    """Write one state as the folder `name` of a run: all of it or nothing. Every process must call it.

    Raises:
        UserError: on every process, if one cannot write, or if they do not write to the same disk.
    """
    parts = acc.num_processes if is_sharded(model) else 1
    with ExitStack() as stack:
        folder = run.temporary(name)
        with together(acc):
            if run.main:
                stack.enter_context(run.writing(name))
        with together(acc):
            if acc.process_index < parts:
                _write(folder, _held(model, optimizer, main=run.main), acc.process_index, parts)
        with together(acc):
            if run.main:
                there = len(list(folder.glob(f"{WEIGHTS}-*.safetensors")))
                if there != parts:
                    raise UserError(
                        f"{parts} processes wrote to {run.path} and {there} files are there: put the run folder (out) on a "
                        "disk that all machines share"
                    )
                write_json(folder / FACTS, facts)
                stack.close()


def read_facts(folder: Path) -> dict[str, Any]:
    """The numbers of a state."""
    facts: dict[str, Any] = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    return facts


def flaw(folder: Path, *, moments: bool = True) -> str | None:
    """Why a state cannot be restored, in a few words; None if it can, as far as its own files tell."""
    problem = damage(folder)
    if problem is not None:
        return problem
    if not isinstance(facts := read_facts(folder) if (folder / FACTS).is_file() else None, dict) or "step" not in facts:
        return f"{FACTS} is missing, or says no step"
    for kinds in ((WEIGHTS,), (MOMENTS, _MOMENTS_BEFORE))[: 1 + moments]:
        parts = [path for kind in kinds for path in folder.glob(f"{kind}-*-of-*.safetensors")]
        whole = int(parts[0].stem.rpartition("-of-")[2]) if parts else 1
        if len(parts) != whole:
            return f"{len(parts)} of {whole} files of its {kinds[0]} are there"
    return None


def newest(acc: Accelerator, run: RunFolder) -> Path | None:
    """The newest state of a run that is whole, the same on every process; None if it has none. Every process must call it.

    Raises:
        UserError: all are damaged.
    """
    found = None
    with together(acc):
        if run.main:
            found = run.newest_checkpoint(flaw)
    (name,) = broadcast_object_list([None if found is None else found.name])
    return None if name is None else run.path / "checkpoints" / name


def restore_best(acc: Accelerator, folder: Path, model: nn.Module) -> None:
    """Set the weights that were kept as the best, on every process, in place. Raises UserError if they are damaged."""
    with together(acc):
        if acc.is_main_process and (problem := flaw(folder, moments=False)) is not None:
            raise UserError(f"{folder} is damaged ({problem}): restore it, or train again in another folder")
    restore(folder, model, None)


def restore(folder: Path, model: nn.Module, optimizer: Optimizer | None) -> None:
    """Set weights (and moments) from a folder, on every process, in place.

    Raises:
        UserError: the state belongs to another scope, or a part of it is missing.
    """
    parameters = trainable(model)
    weights = _Saved(folder, WEIGHTS)
    if weights.names != set(parameters):
        other = sorted(weights.names ^ set(parameters))[0]
        raise UserError(f"the checkpoint {folder} was made for another scope ({other} differs): use the same scope")
    for name, parameter in parameters.items():
        weights.read_into(name, parameter)
    if optimizer is None:
        return
    moments = _Saved(folder, MOMENTS)
    if not moments.names:
        moments = _Saved(folder, _MOMENTS_BEFORE)
    for key in moments.names:
        kind, name = key.split("::", 1)
        value = moments.like(key, parameters[name])
        moments.read_into(key, value)
        optimizer.state[parameters[name]][kind] = value


def _held(model: nn.Module, optimizer: Optimizer | None, *, main: bool) -> dict[str, dict[str, Tensor]]:
    """What this process writes: its rows of what is sharded, and, on the main process, all of what is not."""
    parameters = trainable(model)
    tensors_by_kind: dict[str, dict[str, Tensor]] = {WEIGHTS: dict(parameters)}
    if optimizer is not None:
        tensors_by_kind[MOMENTS] = {
            f"{kind}::{name}": value
            for name, parameter in parameters.items()
            for kind, value in sorted(optimizer.state.get(parameter, {}).items())
        }
    return {
        kind: {
            name: local_part(tensor).detach().to("cpu").contiguous()
            for name, tensor in tensors.items()
            if main or isinstance(tensor, DTensor)
        }
        for kind, tensors in tensors_by_kind.items()
    }


def _write(folder: Path, held: dict[str, dict[str, Tensor]], part: int, parts: int) -> None:
    with writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for kind, tensors in held.items():
            save_file(tensors, folder / f"{kind}-{part:05d}-of-{parts:05d}.safetensors")


class _Saved:
    """The tensors of one kind in a state, however many processes wrote them; rows are read when they are asked for."""

    def __init__(self, folder: Path, kind: str) -> None:
        self._folder, self._files = folder, dict[str, list[Any]]()
        for path in sorted(folder.glob(f"{kind}-*.safetensors")):
            file: Any = safe_open(path, framework="pt")
            for name in file.keys():  # noqa: SIM118 (a file, not a dict)
                self._files.setdefault(name, []).append(file)
        self.names = set(self._files)

    def like(self, name: str, parameter: Tensor) -> Tensor:
        """Room for a moment of `parameter`: sharded as it is, or a single number on its device, where a fused AdamW needs it."""
        if not self._files[name][0].get_slice(name).get_shape():
            return torch.empty((), device=parameter.device)
        return torch.empty_like(parameter, requires_grad=False)

    @torch.no_grad()
    def read_into(self, name: str, target: Tensor) -> None:
        """Set the rows of `target` that this process holds."""
        local, files = local_part(target), self._files[name]
        if local.ndim == 0:
            local.copy_(files[0].get_tensor(name))
            return
        first, begins = first_row(target), 0
        for file in files:
            part = file.get_slice(name)
            ends = begins + part.get_shape()[0]
            low, high = max(first, begins), min(first + len(local), ends)
            if low < high:
                local[low - first : high - first].copy_(part[low - begins : high - begins])
            begins = ends
        if begins != len(target):
            raise UserError(
                f"the checkpoint {self._folder} holds {begins} of {len(target)} rows of {name}: a file of it is missing; restore "
                "it, or delete the folder to go on from an earlier one"
            )
