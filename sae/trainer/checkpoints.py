"""Checkpoints of a run: whole or not at all, written by all processes together, read by any number of them.

The main process writes the autoencoders, each process the state of its part of the stream. Between the stages all say
what went wrong for them, so that a full disk of one ends all with one sentence and leaves no half of a checkpoint. The run
folder must be one that all processes see.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from lm.errors import UserError
from lm.run_folder import RunFolder, damage, writable, write_json
from sae.activations import ActivationStream, merge_states, read_state, save_state
from sae.sharding import Mesh
from sae.trainer import training_state
from sae.trainer.training_sae import TrainingSae

FACTS = "state.json"
KEPT = 2


def save(
    run: RunFolder, mesh: Mesh, members: Sequence[TrainingSae], stream: ActivationStream, *, step: int, seconds: float
) -> None:
    """Write `checkpoints/step-*` and drop all but the newest. Every process must call it; raises UserError on all."""
    collected = [training_state.collect(member) for member in members]
    names = [member.name for member in members]
    facts = {
        "step": step,
        "seconds": seconds,
        "members": {name: numbers for name, (_, numbers) in zip(names, collected, strict=True)},
    }
    final = run.path / run.checkpoint_name(step)
    folder = final.with_name(f".{final.name}.tmp")
    writing: AbstractContextManager[Path] = run.writing(run.checkpoint_name(step))

    def main_files() -> None:
        writing.__enter__()
        for name, (tensors, _) in zip(names, collected, strict=True):
            training_state.write(folder, name, tensors)
        write_json(folder / FACTS, facts)

    problem = _problem(main_files) if mesh.is_main else None
    if (first := _first(mesh.problems(problem))) is None:
        part = folder / f"stream-{mesh.places['all']:04d}.safetensors"
        first = _first(mesh.problems(_problem(lambda: _stream(part, stream))))
    last = None
    if mesh.is_main:
        error = UserError(first) if first is not None else None
        last = _problem(lambda: writing.__exit__(None if error is None else UserError, error, None))
        if first is None and last is None:
            run.prune_checkpoints(KEPT)
    mesh.agree(first or last)


def load_newest(
    run: RunFolder, mesh: Mesh, members: Sequence[TrainingSae], stream: ActivationStream
) -> dict[str, Any] | None:
    """Set members and stream from the newest checkpoint and return its facts; None if there is none."""
    found: list[Path | None] = []
    problem = _problem(lambda: found.append(run.newest_checkpoint(_flaw))) if mesh.is_main else None
    mesh.agree(problem)
    (name, *_) = mesh.problems(found[0].name if found and found[0] is not None else None)  # the main process's word
    if name is None:
        return None
    folder = run.path / "checkpoints" / name
    facts: dict[str, Any] = {}

    def read() -> None:
        facts.update(_facts(folder))
        for member in members:
            if member.name not in facts["members"]:
                raise UserError(f"{folder} holds no {member.name}: give the same autoencoders, or another folder")
            training_state.restore(folder, member, facts["members"][member.name])
        states = [read_state(file) for file in sorted(folder.glob("stream-*"))]
        stream.load_state_dict(states[0] if len(states) == 1 else merge_states(states))

    mesh.agree(_problem(read))
    for member in members:
        refresh_totals(member)
    return facts


def seconds_so_far(run: RunFolder) -> float:
    """Seconds of training up to the newest checkpoint; 0 without one."""
    saved = run.checkpoints()
    return float(_facts(saved[-1][1])["seconds"]) if saved else 0.0


def _stream(path: Path, stream: ActivationStream) -> None:
    with writable(path):
        save_state(path, stream.state_dict())


def _flaw(folder: Path) -> str | None:
    """Why nothing can go on from a checkpoint, in a few words; None if it can, as far as its files tell."""
    if not (folder / FACTS).is_file():
        return f"{FACTS} is missing"
    return damage(folder)


def _facts(folder: Path) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = json.loads((folder / FACTS).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{folder / FACTS} cannot be read ({error}): delete that checkpoint") from None
    return facts


def _problem(do: Callable[[], Any]) -> str | None:
    """What the user can mend, if doing it fails so."""
    try:
        do()
    except UserError as error:
        return str(error)
    return None


def _first(problems: Sequence[str | None]) -> str | None:
    return next((problem for problem in problems if problem is not None), None)


def refresh_totals(member: TrainingSae) -> None:
    """How many features are idle and dead over all shards. One collective."""
    idle, _ = member.idle()
    dead = member.firings.dead(window=member.recipe.auxiliary.window)
    totals = torch.stack([idle.sum(), dead.sum()])
    member.idle_total, member.dead_total = member.mesh.sum_(totals, "features", "totals").tolist()
