"""Trials in several processes at once: each leaves its answers in its folder, where the attack then reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from lm.errors import UserError
from lm.model import ModelSpec
from lm.run_folder import RunFolder, progress
from unlearn.attacks.base import Attack, Attacked, AttackSettings, Trial
from unlearn.processes import Job, run_apart

LOG = "log.txt"


def run_trials(
    specs: Mapping[str, ModelSpec],
    trials: Sequence[Trial],
    attack: Attack,
    settings: AttackSettings,
    run: RunFolder,
    *,
    workers: int,
) -> None:
    """Do every trial on every model that is not done yet, `workers` at a time, each in a process of its own.

    The processes share the threads of this one, so on the CPU two of them on two cores take half the time of one on one; on a
    GPU they share its memory. What a trial prints goes to `log.txt` in its folder.

    Args:
        specs: the models by name.
        trials, attack, settings: as for `attack_all`.
        run: where the answers are kept.
        workers: how many processes.

    Raises:
        UserError: trials that failed, with the reason; the others are kept.
    """
    threads = max(1, torch.get_num_threads() // workers)
    jobs, names = [], []
    for trial in trials:
        for name, spec in specs.items():
            folder = run.path / trial.folder / name
            if not attack.finished(folder):
                jobs.append(Job(_run, (attack, trial, spec, settings, folder, threads), folder / LOG))
                names.append(f"{trial.folder}/{name}")
    if not jobs:
        return
    with progress(len(jobs), label="attack", unit="trials") as advance:
        failed = run_apart(jobs, workers=workers, ended=lambda _, __: advance(1))
    said = [f"{name}: {why}" for name, why in zip(names, failed, strict=True) if why is not None]
    if said:
        raise UserError(
            f"{len(said)} of {len(jobs)} trials failed, the first {said[0]}; mend that and run again with --resume true: the "
            "others are kept"
        )


def _run(attack: Attack, trial: Trial, spec: ModelSpec, settings: AttackSettings, folder: Path, threads: int) -> None:
    """Of the new process."""
    torch.set_num_threads(threads)
    attack.run(trial, Attacked.from_spec(spec), settings, folder)
