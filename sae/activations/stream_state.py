"""States of streams: joined over processes, compared with the settings at hand, and kept in a file without pickle."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save

from lm.errors import UserError, one_line
from lm.run_folder import write_atomic
from sae.activations.batch import State


def save_state(path: Path | str, state: State) -> None:
    """Write a state as one safetensors file, its plain data in the header; atomically."""
    tensors = {name: value.contiguous() for name, value in state["tensors"].items()}
    write_atomic(Path(path), save(tensors, {"facts": json.dumps(state["facts"])}))


def read_state(path: Path | str) -> State:
    """The state that `save_state` wrote. Raises UserError for another or a damaged file."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return {"facts": json.loads(file.metadata()["facts"]), "tensors": tensors}
    except Exception as error:  # whatever safetensors and json raise for a file that is none
        raise UserError(f"{path} holds no state of a stream: {one_line(error)}; begin anew without it") from error


def merge_states(states: Sequence[State]) -> State:
    """The states of all processes, taken after the same batch, as one that `load_state_dict` takes in any of them."""
    first = min(states, key=lambda state: int(state["facts"].get("contexts", {}).get("count", 0)))["facts"]
    if len({state["facts"]["batches"] for state in states}) != 1:
        raise UserError("these states were taken after different batches: take them at the same step")
    for state in states:
        require_same(state["facts"]["settings"], first["settings"], "one of the states")
    lanes = {number: lane for state in states for number, lane in state["facts"].get("lanes", {}).items()}
    tensors = {name: value for state in states for name, value in state["tensors"].items()}
    return {"facts": {**first, **({"lanes": lanes} if lanes else {})}, "tensors": tensors}


def require_same(stored: dict[str, Any], now: dict[str, Any], what: str = "the state", prefix: str = "") -> None:
    """UserError naming the first setting that differs."""
    for key in sorted({*stored, *now}):
        old, new = stored.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            require_same(old, new, what, f"{prefix}{key}.")
        elif old != new:
            raise UserError(
                f"{what} was made with {prefix}{key} {old!r:.200} and now it is {new!r:.200}: give the same settings, or "
                "begin anew"
            )
