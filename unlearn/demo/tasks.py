"""Pieces of the demo's work that depend on each other in part: in this process one after the other, or in several at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lm.errors import UserError
from unlearn.processes import NOT_BEGUN, Job, run_apart

LOG = "log.txt"


@dataclass(frozen=True)
class Task:
    """A piece of work that leaves its results in files.

    Attributes:
        key, label: its name for other tasks, and for readers.
        folder: where its log lies.
        work: a function of a module; what it returns is dropped.
        arguments: of it, all that can be pickled.
        after: the keys of the tasks, before it in the order, whose results it reads.
    """

    key: str
    label: str
    folder: Path
    work: Callable[..., object]
    arguments: tuple[Any, ...] = ()
    after: tuple[str, ...] = ()


def run_tasks(tasks: Sequence[Task], *, workers: int, ended: Callable[[], object]) -> None:
    """Do all of it, the same on any number of workers.

    With one worker in this process, as it is. With more each task has a process of its own, and one thread there; what it prints
    goes to `log.txt` in its folder, and a line here says when it begins and when it ends.

    Args:
        tasks: in the order in which they begin.
        workers: how many at once.
        ended: called after each.

    Raises:
        UserError: what the user can mend, in a task; with more workers those that do not need it are done first.
        RuntimeError: a defect; its traceback is in the log.
    """
    if workers == 1:
        for task in tasks:
            print(f"== {task.label}", flush=True)
            task.work(*task.arguments)
            ended()
        return
    places = {task.key: place for place, task in enumerate(tasks)}
    jobs = [
        Job(_on_one_thread, (task.work, task.arguments), task.folder / LOG, tuple(places[key] for key in task.after))
        for task in tasks
    ]
    begun: dict[int, float] = {}

    def began(place: int) -> None:
        begun[place] = time.monotonic()
        print(f"== {tasks[place].label}: begins ({jobs[place].log})", flush=True)

    def has_ended(place: int, failed: str | None) -> None:
        seconds = "" if place not in begun else f" after {time.monotonic() - begun[place]:.0f} s"
        how = "done" if failed is None else failed if failed == NOT_BEGUN else "failed"
        print(f"== {tasks[place].label}: {how}{seconds}", flush=True)
        ended()

    outcomes = run_apart(jobs, workers=workers, began=began, ended=has_ended)
    failed = [(task, why) for task, why in zip(tasks, outcomes, strict=True) if why not in (None, NOT_BEGUN)]
    if failed:
        task, why = failed[0]
        more = f" ({len(failed) - 1} more failed: the logs say why)" if len(failed) > 1 else ""
        raise UserError(f"{task.label}: {why}{more}; what is done is kept: mend that and run the same again")


def _on_one_thread(work: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    """Of the new process."""
    torch.set_num_threads(1)
    work(*arguments)
    print(f"took {time.process_time():.1f} s of the processor")
