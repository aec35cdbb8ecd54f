"""What must survive an interruption, apart from the stream: one safetensors file an autoencoder, and a few numbers in JSON.

Tensors are stored whole, so that a checkpoint does not depend on how many processes wrote it or read it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lm.errors import UserError
from lm.run_folder import write_atomic
from sae.dead_features import Firings
from sae.moving_average import MovingAverage
from sae.thresholds import RunningThreshold
from sae.trainer.training_sae import WEIGHTS, TrainingSae

_WHOLE = ("b_dec",)


def collect(member: TrainingSae) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Whole tensors on the CPU, and plain numbers. Every process must call it; the tensors are for the main one."""
    mine: dict[str, Tensor] = {}
    for name, parameter in zip(WEIGHTS, member.parameters(), strict=True):
        mine[name] = parameter.data
        for key, value in sorted(member.adam.state.get(parameter, {}).items()):
            mine[f"{key}::{name}"] = value
        if member.average is not None:
            mine[f"average::{name}"] = member.average.total[name]
    law = member.law
    mine |= {"silent": member.firings.silent, "rate": member.firings.rate, "threshold": member.threshold.value}
    mine |= {"demand_silent": law.demand.silent, "demand_rate": law.demand.rate}
    if law.expected is not None:
        mine["expected"] = law.expected
    if law.budgets is not None:
        mine["budgets"] = law.budgets.T
    whole = {}
    for name, value in mine.items():
        sharded = value.ndim > 0 and name.rsplit("::", 1)[-1] not in _WHOLE
        full = member.mesh.whole_features(value.contiguous(), member.spec.features, "checkpoint") if sharded else value
        if member.mesh.is_main:
            whole[name] = full.detach().to("cpu", copy=True).contiguous()
    facts = {
        "scale": member.scale,
        "variance": member.variance,
        "backend": member.backend,
        "firings": [member.firings.tokens, member.firings.weight],
        "demand": [law.demand.tokens, law.demand.weight],
        "fitted": law.fitted,
        "average": None if member.average is None else member.average.steps,
    }
    return whole, facts


def write(folder: Path, name: str, tensors: dict[str, Tensor]) -> None:
    """One autoencoder's tensors; main process only."""
    write_atomic(folder / f"{name}.safetensors", save(tensors))


def restore(folder: Path, member: TrainingSae, facts: dict[str, Any]) -> None:
    """Set everything from a checkpoint, in place, on every process (each takes its shard). Then `refresh_totals`."""
    path = folder / f"{member.name}.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} cannot be read ({error}): delete that checkpoint to go on from an earlier one"
        ) from None
    device = member.weights["b_dec"].device

    def own(name: str) -> Tensor:
        value = stored[name]
        sharded = value.ndim > 0 and name.rsplit("::", 1)[-1] not in _WHOLE
        return (member.mesh.own_features(value) if sharded else value).to(device, copy=True).contiguous()

    try:
        for name, parameter in zip(WEIGHTS, member.parameters(), strict=True):
            parameter.data.copy_(own(name))
            keys = [key for key in stored if key.endswith(f"::{name}") and not key.startswith("average::")]
            member.adam.state[parameter] = {key.split("::")[0]: own(key) for key in keys}
        if member.average is not None:
            total = {name: own(f"average::{name}") for name in WEIGHTS}
            member.average = MovingAverage(total, facts["average"], member.average.decay)
        member.firings = Firings(own("silent"), own("rate"), *facts["firings"])
        member.threshold = RunningThreshold(own("threshold"))
        law = member.law
        law.demand = Firings(own("demand_silent"), own("demand_rate"), *facts["demand"])
        law.fitted = facts["fitted"]
        law.expected = own("expected") if "expected" in stored else None
        law.budgets = own("budgets").T.contiguous() if "budgets" in stored else None
        member.scale, member.variance, member.backend = facts["scale"], facts["variance"], facts["backend"]
        if member.backend == "cpu" and device.type != "cpu":
            member.backend = "torch"
    except (KeyError, RuntimeError) as error:
        raise UserError(f"{path} is of another autoencoder ({error}): give another folder") from None
