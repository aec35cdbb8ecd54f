"""Work in processes of its own: its peak memory is its own, and what ends it ends nothing else.

The processes are forked from a server that has imported the heavy libraries and nothing more (no device, no thread), so one
starts in a moment. What a job prints goes to its log. What the jobs are is for the search and the attacks to say.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from lm.errors import UserError

HEAVY = ["torch", "transformers.modeling_utils", "accelerate", "peft", "scipy.stats", "jsonargparse", "optuna"]
HEAVY += ["matplotlib.backends.backend_agg"]
"""What the server imports: nothing of this project, since its path is not the script's."""

_LEAVING = 60.0
"""Seconds that a process has to tidy up after its answer."""


@dataclass(frozen=True)
class Job:
    """One call in a process of its own.

    Attributes:
        target: a function of a module; what it returns is dropped, so it leaves its results in files.
        arguments: of it, all that can be pickled.
        log: the file that gets what it prints, after what is there already.
    """

    target: Callable[..., object]
    arguments: tuple[Any, ...]
    log: Path


def run_apart(
    jobs: Sequence[Job], *, workers: int = 1, ended: Callable[[int], object] | None = None
) -> list[str | None]:
    """Run jobs, so many at once, and begin them in order; for each None when it is done, or in a sentence why it failed.

    A job fails by what lies in its settings: a loss that is NaN, too little memory, a killed process. The others go on.

    Args:
        jobs: what is to be done.
        workers: how many processes there are at a time.
        ended: called with the place of each job that has ended, as it ends.

    Raises:
        UserError: what would fail every other job as well: a full disk, say. No process is left running.
        RuntimeError: a defect; its traceback is in the log.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(HEAVY)
    outcomes: list[str | None] = [None] * len(jobs)
    waiting = list(enumerate(jobs))
    running: dict[Connection, tuple[int, BaseProcess]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                place, job = waiting.pop(0)
                job.log.parent.mkdir(parents=True, exist_ok=True)
                answers, teller = context.Pipe(duplex=False)
                process = context.Process(target=_run, args=(job.log, job.target, job.arguments, teller))
                process.start()
                teller.close()
                running[answers] = place, process
            for ready in wait(list(running)):
                assert isinstance(ready, Connection)
                place, child = running[ready]
                outcomes[place] = _outcome(ready, child, jobs[place].log)
                _end(ready, child)
                del running[ready]
                if ended is not None:
                    ended(place)
    finally:
        for left, (_, child) in running.items():
            _end(left, child)
    return outcomes


def _outcome(answers: Connection, process: BaseProcess, log: Path) -> str | None:
    with contextlib.suppress(EOFError):  # it ended without a word
        failed, said = answers.recv()
        process.join(_LEAVING)
        if failed == "everything":
            raise UserError(said)
        return str(said) if failed else None
    process.join()
    if process.exitcode is not None and process.exitcode < 0:
        name = signal.Signals(-process.exitcode).name
        return f"its process was ended by {name}" + (", maybe for want of memory" if name == "SIGKILL" else "")
    raise RuntimeError(f"the process of {log} broke off (status {process.exitcode}); the end of that file says where")


def _end(answers: Connection, process: BaseProcess) -> None:
    process.kill()
    process.join()
    answers.close()


def _run(log: Path, target: Callable[..., object], arguments: tuple[Any, ...], teller: Connection) -> None:
    """Of the new process. Sends ("", "") when done, ("this", why) or ("everything", why)."""
    with open(log, "ab") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        target(*arguments)
        teller.send(("", ""))
    except UserError as error:  # one that stands for a system's error would meet the next job too
        print(f"error: {error}", file=sys.stderr)
        teller.send(("everything" if error.__cause__ is not None else "this", str(error)))
    except torch.OutOfMemoryError as error:
        print(f"error: {error}", file=sys.stderr)
        teller.send(("this", f"out of memory: {str(error).splitlines()[0]}"))


def _end_with_parent() -> None:
    """End this process when the one that drives is gone: nobody would wait for it, and its folder is needed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
