"""One run of a search in a process of its own: its peak memory is its own, and what ends it ends nothing else.

The processes are forked from a server that has imported the heavy libraries and nothing more (no device, no thread), so
one starts in a moment. What a run prints goes to `log.txt` in its folder. One run at a time.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch

from lm.errors import UserError
from unlearn.config import UnlearnConfig
from unlearn.evaluation.config import EvaluateConfig
from unlearn.evaluation.stage import run_evaluate
from unlearn.stage import run_unlearn

LOG = "log.txt"
HEAVY = ["torch", "transformers.modeling_utils", "accelerate", "peft", "scipy.stats", "jsonargparse", "optuna"]
HEAVY += ["matplotlib.backends.backend_agg"]
"""What the server imports: nothing of this project, since its path is not the script's."""

_LEAVING = 60.0
"""Seconds that a process has to tidy up after its answer."""


def run_apart(folder: Path, unlearning: UnlearnConfig | None, evaluation: EvaluateConfig) -> str | None:
    """Unlearn (if asked to) and score; None when that is done, or in a sentence why this run failed.

    A run fails by what lies in its settings: a loss that is NaN, too little memory, a killed process.

    Raises:
        UserError: what would fail every other run as well: a full disk, say.
        RuntimeError: a defect; its traceback is in the log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(HEAVY)
    answers, teller = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(folder / LOG, unlearning, evaluation, teller))
    process.start()
    teller.close()
    try:
        with contextlib.suppress(EOFError):  # it ended without a word
            failed, said = answers.recv()
            process.join(_LEAVING)
            if failed == "everything":
                raise UserError(said)
            return said if failed else None
        process.join()
    finally:
        process.kill()
        process.join()
        answers.close()
    if process.exitcode is not None and process.exitcode < 0:
        name = signal.Signals(-process.exitcode).name
        return f"its process was ended by {name}" + (", maybe for want of memory" if name == "SIGKILL" else "")
    raise RuntimeError(
        f"the run in {folder} broke off (status {process.exitcode}); the end of {folder / LOG} says where"
    )


def _run(log: Path, unlearning: UnlearnConfig | None, evaluation: EvaluateConfig, teller: Connection) -> None:
    """Of the new process. Sends ("", "") when done, ("this", why) or ("everything", why)."""
    with open(log, "ab") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        if unlearning is not None:
            run_unlearn(unlearning)
        run_evaluate(evaluation)
        teller.send(("", ""))
    except UserError as error:  # one that stands for a system's error would meet the next run too
        print(f"error: {error}", file=sys.stderr)
        teller.send(("everything" if error.__cause__ is not None else "this", str(error)))
    except torch.OutOfMemoryError as error:
        print(f"error: {error}", file=sys.stderr)
        teller.send(("this", f"out of memory: {str(error).splitlines()[0]}"))


def _end_with_parent() -> None:
    """End this process when the one that drives the search is gone: nobody would wait for it, and its folder is needed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
