"""One run of a search in a process of its own, on one device. One run at a time."""

from __future__ import annotations

from pathlib import Path

from unlearn.config import UnlearnConfig
from unlearn.evaluation.config import EvaluateConfig
from unlearn.evaluation.stage import run_evaluate
from unlearn.processes import Job, run_apart
from unlearn.stage import run_unlearn

LOG = "log.txt"


def unlearn_and_score(folder: Path, unlearning: UnlearnConfig | None, evaluation: EvaluateConfig) -> str | None:
    """Unlearn (if asked to) and score; None when that is done, or in a sentence why this run failed.

    What it prints goes to `log.txt` in its folder. Raises as `run_apart` does.
    """
    (failed,) = run_apart([Job(_run, (unlearning, evaluation), folder / LOG)])
    return failed


def _run(unlearning: UnlearnConfig | None, evaluation: EvaluateConfig) -> None:
    if unlearning is not None:
        run_unlearn(unlearning)
    run_evaluate(evaluation)
