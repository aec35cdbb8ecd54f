"""Work in processes of its own: its peak memory is its own, and what ends it ends nothing else.

The processes are forked from a server that has imported the heavy libraries and nothing more (no device, no thread), so one
starts in a moment. What a job prints goes to its log. What the jobs are is for the search, the attacks and the demo to say.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from lm.errors import UserError, out_of_memory

HEAVY = ["torch", "transformers.modeling_utils", "accelerate", "peft", "scipy.stats", "jsonargparse", "optuna"]
HEAVY += ["matplotlib.backends.backend_agg"]
"""What the server imports: nothing of this project, since its path is not the script's."""

NOT_BEGUN = "not begun, since what it needs is not there"
"""Why a job failed that comes after one that did."""
_LEAVING = 60.0
"""Seconds that a process has to tidy up after its answer."""
_STOPPING = 3.0
"""Seconds that processes have to end when the work is given up."""


@dataclass(frozen=True)
class Job:
    """One call in a process of its own.

    Attributes:
        target: a function of a module; what it returns is dropped, so it leaves its results in files.
        arguments: of it, all that can be pickled.
        log: the file that gets what it prints, after what is there already.
        after: the places of the jobs, before it in the order, that must be done first.
    """

    target: Callable[..., object]
    arguments: tuple[Any, ...]
    log: Path
    after: tuple[int, ...] = ()


def run_apart(
    jobs: Sequence[Job],
    *,
    workers: int = 1,
    began: Callable[[int], object] | None = None,
    ended: Callable[[int, str | None], object] | None = None,
) -> list[str | None]:
    """Run jobs, so many at once, and begin them in order; for each None when it is done, or in a sentence why it failed.

    A job fails by what lies in its settings: a loss that is NaN, too little memory, a killed process. Those that come after it
    are not begun, the others go on. A job that must wait for another lets those behind it go first.

    Args:
        jobs: what is to be done.
        workers: how many processes there are at a time.
        began: called with the place of each job that begins.
        ended: called with the place of each job that has ended, as it ends, and with why if it failed.

    Raises:
        UserError: what would fail every other job as well: a full disk, say. No process is left running.
        RuntimeError: a defect; its traceback is in the log.
    """
    if any(other >= place for place, job in enumerate(jobs) for other in job.after):
        raise ValueError("a job comes after one that does not stand before it")
    outcomes: list[str | None] = [None] * len(jobs)
    waiting = list(range(len(jobs)))
    done: set[int] = set()
    running: dict[Connection, tuple[int, BaseProcess]] = {}

    def has_ended(place: int, failed: str | None) -> None:
        outcomes[place] = failed
        if failed is None:
            done.add(place)
        if ended is not None:
            ended(place, failed)

    try:
        while waiting or running:
            for place in list(waiting):
                if any(outcomes[each] is not None for each in jobs[place].after):
                    waiting.remove(place)
                    has_ended(place, NOT_BEGUN)
            can_begin = [place for place in waiting if done.issuperset(jobs[place].after)]
            for place in can_begin[: workers - len(running)]:
                waiting.remove(place)
                if began is not None:
                    began(place)
                answers, process = _begin(jobs[place])
                running[answers] = place, process
            for ready in wait(list(running)) if running else ():  # of nothing it would wait for ever
                assert isinstance(ready, Connection)
                place, child = running[ready]
                failed = _outcome(ready, child, jobs[place].log)
                _end(ready, child)
                del running[ready]
                has_ended(place, failed)
    finally:
        _stop([child for _, child in running.values()])
        for left, (_, child) in running.items():
            _end(left, child)
    return outcomes


def cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _begin(job: Job) -> tuple[Connection, BaseProcess]:
    """Its process, and where that says how it ended."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(HEAVY)
    job.log.parent.mkdir(parents=True, exist_ok=True)
    answers, teller = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(job.log, job.target, job.arguments, teller))
    process.start()
    teller.close()
    return answers, process


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


def _stop(processes: Sequence[BaseProcess]) -> None:
    """Ask processes to end, as Ctrl-C does, and give them a moment to tidy up."""
    until = time.monotonic() + _STOPPING
    for process in processes:
        if process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGINT)
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))


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
    except (MemoryError, RuntimeError) as error:
        said = out_of_memory(error)
        if said is None:
            raise
        print(f"error: {error}", file=sys.stderr)
        teller.send(("this", f"out of memory: {said}"))
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)


def _end_with_parent() -> None:
    """End this process when the one that drives is gone: nobody would wait for it, and its folder is needed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
