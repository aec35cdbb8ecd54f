"""Where the work runs: one process, several CPU processes (gloo), or GPUs; whole copies (DDP) or shards (FSDP2).

`accelerate launch --config_file configs/accelerate/<name>.yaml script.py …` decides; `accelerator()` reads that
decision from the environment. This module holds the two things accelerate does not do by itself (FSDP2 over CPU
processes, and a plain sum over processes); it knows nothing of what is trained.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    ProjectConfiguration,
    gather_object,
)
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import MixedPrecisionPolicy

from lm.errors import UserError
from lm.loading import load
from lm.model import LanguageModel, ModelSpec
from lm.shards import is_sharded
from lm.signals import end_with_launcher

T = TypeVar("T")
MixedPrecision = Literal["no", "bf16", "fp16"]


def accelerator(
    *,
    mixed_precision: MixedPrecision = "no",
    cpu: bool = False,
    trackers: tuple[str, ...] = (),
    folder: Path | None = None,
) -> Accelerator:
    """The `Accelerator` for this process, as the launch configuration says.

    Args:
        mixed_precision: autocast type; parameters keep their own (master weights).
        cpu: stay on the CPU although a GPU is there.
        trackers: `tensorboard`, `wandb`, …, beside the run's own metric log.
        folder: where trackers write.

    Raises:
        UserError: fp16 without a GPU (there is no loss scaling on the CPU), an unknown tracker, or a launch that asks for what
            is not done here.
    """
    end_with_launcher()
    _refuse_launch(mixed_precision)
    cpu = cpu or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true") or not torch.cuda.is_available()
    if mixed_precision == "fp16" and cpu:
        raise UserError("fp16 autocast needs a GPU: on a CPU choose bf16, or none")
    plugin = None
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true"):
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,  # whether to reshard after the forward is the launch file's word
            auto_wrap_policy="transformer_based_wrap",  # block by block, as the model's class names them
            state_dict_type="FULL_STATE_DICT",
            mixed_precision_policy=_policy(mixed_precision),
        )
        if cpu:  # accelerate turns FSDP on for GPU process groups only; this is the group it would have found
            PartialState(cpu=True)
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    AcceleratorState._reset_state()  # a notebook may run one precision after another; the process group stays
    try:
        acc = Accelerator(
            mixed_precision=mixed_precision,
            cpu=cpu,
            fsdp_plugin=plugin,
            log_with=list(trackers) or None,
            project_config=ProjectConfiguration(project_dir=str(folder) if folder else None),
        )
    except ValueError as error:
        raise UserError(f"cannot set up the devices: {error}") from error
    for name in trackers:  # accelerate leaves out what is not installed, and says nothing
        if name not in [str(getattr(kind, "value", kind)) for kind in acc.log_with]:
            raise UserError(f"the tracker {name!r} is not installed: pip install {name}, or leave it out of trackers")
    return acc


_NOT_HERE = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor, context or pipeline parallelism",
}


def _refuse_launch(mixed_precision: MixedPrecision) -> None:
    """Refuse what accelerate would take from the environment, although no step here is made for it.

    Raises:
        UserError: it would change gradients in silence, or fail in the midst of training.
    """
    told = os.environ.get
    remedy = "launch with a file of configs/accelerate (palimpsest configs lists them)"
    for variable, name in _NOT_HERE.items():
        if told(variable, "").lower() in ("1", "true"):
            raise UserError(f"the launch asks for {name} ({variable}), which does not run here: {remedy}")
    if (backend := told("ACCELERATE_DYNAMO_BACKEND", "no")).lower() not in ("no", ""):
        raise UserError(
            f"the launch asks for torch.compile (dynamo_backend {backend}), which is not used here: {remedy}"
        )
    if (steps := told("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")) not in ("1", ""):
        raise UserError(
            f"the launch asks for gradient_accumulation_steps {steps}, by which accelerate would divide each gradient: leave it "
            "out, a batch is always whole and trainer.micro_batch says how much of it is computed at once"
        )
    if (launched := told("ACCELERATE_MIXED_PRECISION", "no")).lower() not in ("no", "", mixed_precision) and is_main():
        print(
            f"warning: the launch's mixed_precision {launched} is not heeded, the command computes in its own "
            f"({mixed_precision}): set it there, as trainer.autocast or model.dtype",
            file=sys.stderr,
        )


def load_here(acc: Accelerator, spec: ModelSpec) -> LanguageModel:
    """The model of a config, where this process works.

    With several processes each has its own device: a name in the config would put all of them on one.
    """
    here = str(acc.device)
    return load(spec, device=here if acc.num_processes > 1 else spec.device or here)


def _policy(precision: MixedPrecision) -> MixedPrecisionPolicy | None:
    """Shards are computed with in low precision, and summed in float32; what a model returns keeps its type."""
    if precision == "no":
        return None
    low = torch.bfloat16 if precision == "bf16" else torch.float16
    return MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32)


def is_main() -> bool:
    """True on the one process that prints and writes (as the launcher numbered them)."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def together(acc: Accelerator) -> Iterator[None]:
    """What the main process does alone, the others waiting, or each does by itself; the first `UserError` is raised on all."""
    mine: UserError | None = None
    try:
        yield
    except UserError as error:
        mine = error
    for problem in gather_object([None if mine is None else str(mine)]):
        if problem is not None:  # one's own keeps its cause: whether it was the system's error is asked elsewhere
            raise mine if mine is not None and str(mine) == problem else UserError(problem)


def sum_over_processes(values: Tensor) -> Tensor:
    """The elementwise sum of `values` over all processes, in float64, the same on each."""
    total = values.detach().to(torch.float64)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(total)
    return total


@contextmanager
def without_gradient_sync(acc: Accelerator, model: nn.Module, *, skip: bool) -> Iterator[None]:
    """Leave gradients unsynchronized for this micro-batch (DDP). Shards are always reduced: their gradient lives there."""
    if skip and not is_sharded(model):
        with acc.no_sync(model):
            yield
    else:
        yield


def reporting(main: Callable[[T], None]) -> Callable[[T], None]:
    """`main`; under a launcher, which ends every process when one fails, what it raised first is the launcher's last word."""
    return record(main) if "TORCHELASTIC_ERROR_FILE" in os.environ else main


def leave_process_group(timeout: float = 60.0) -> None:
    """Close the process group once every process is past its last collective; without one, do nothing.

    A process that closes its connections while another still waits in a barrier would make that one fail, so they meet
    in the launcher's store, which is not one of them. After an error nobody waits and nothing is closed, which could wait for
    work that the others never began: the process ends, and the launcher ends the others.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()) or sys.exc_info()[0] is not None:
        return
    store = torch.distributed.distributed_c10d._get_default_store()
    arrived = store.add("palimpsest/leaving", 1)
    deadline = time.monotonic() + timeout
    while arrived < torch.distributed.get_world_size() and time.monotonic() < deadline:
        time.sleep(0.02)
        arrived = store.add("palimpsest/leaving", 0)
    torch.distributed.destroy_process_group()


def launch_facts(acc: Accelerator) -> dict[str, Any]:
    """What the manifest records about the devices."""
    return {
        "processes": acc.num_processes,
        "device": str(acc.device),
        "distributed": str(acc.distributed_type).removeprefix("DistributedType."),
        "threads": torch.get_num_threads(),
    }
