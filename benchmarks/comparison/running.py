"""Runs the stages of every method, several at once, each in a process of its own; what is finished is not run again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.comparison.methods import Configs, Made
from lm.config import as_dict, as_of_today
from lm.errors import UserError
from lm.run_folder import RunFolder
from tracing.stages.trace.stage import run_trace
from unlearn.attacks.stage import run_attack
from unlearn.comparison.failures import FAILED, write_failure
from unlearn.evaluation.stage import run_evaluate
from unlearn.export import MODEL
from unlearn.processes import Job, run_apart
from unlearn.report.runs.stages import RESULTS
from unlearn.stage import run_unlearn

LOG = "log.txt"
_FREE = ("resume", "workers")
"""Settings from which no number follows."""
_STAGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "TraceConfig": (run_trace, RESULTS["trace"]),
    "UnlearnConfig": (run_unlearn, RESULTS["unlearn"]),
    "EvaluateConfig": (run_evaluate, RESULTS["evaluate"]),
    "AttackConfig": (run_attack, RESULTS["attack"]),
}


def run_references(configs: Configs, workers: int) -> None:
    """The plan, the scores of the retain model and of the base, and the attack on the base, with the retain model's answers.

    Raises:
        UserError: one of them failed: nothing could be compared with it.
    """
    out = configs.out
    first = [
        _config_job(
            [configs.evaluation(configs.roles["retain_model"], out / "retain_model" / "scores")],
            out / "retain_model",
            workers,
        )
    ]
    if configs.needs_plan:
        first.append(_config_job([configs.trace()], out / "trace", workers))
    _all_done(first, workers)
    base = configs.roles["memorized"]
    attack = configs.attacking(base, out / "base" / "attack")
    then = [configs.evaluation(base, out / "base" / "scores"), *([replace(attack, workers=workers)] if attack else [])]
    _all_done([_config_job(then, out / "base", 1)], 1)


def run_methods(
    made: Sequence[Made], workers: int, *, keep_models: bool, retry: bool, say: Callable[[str], None]
) -> None:
    """Every method with every seed. One that fails leaves word in its folder, and the others go on.

    Args:
        made: what is to be run, in this order.
        workers: how many at once; they share the threads of this process.
        keep_models: keep the weights after the last stage.
        retry: try those again that failed before.
        say: told of each that has ended.

    Raises:
        UserError: a folder of a run with other settings, before the first; what would fail every other run as well.
    """
    todo = [each for each in made if not _all_finished(each)]
    left = [each for each in todo if (each.folder / FAILED).exists() and not retry]
    todo = [each for each in todo if each not in left]
    for each in left:
        say(f"{each.name} failed before and is left so (--retry true tries again)")
    jobs = [Job(_run, (_stages(each), each.folder, _threads(workers), keep_models), each.folder / LOG) for each in todo]
    for each in todo:
        (each.folder / FAILED).unlink(missing_ok=True)
    failed = run_apart(jobs, workers=workers, ended=lambda place, _: say(f"{todo[place].name} has ended"))
    for each, why in zip(todo, failed, strict=True):
        if why is not None:
            write_failure(each.folder, why, each.unlearning)
            say(f"{each.name} failed: {why}")


def finished(config: Any) -> bool:
    """Whether the stage of a config has ended in its folder. Raises UserError if it ended there with other settings."""
    folder = Path(config.out)
    _, result = _STAGES[type(config).__name__]
    if not (folder / result).exists():
        return False
    saved = as_of_today(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")), type(config))
    wanted = as_dict(config)
    for name in wanted:
        if name not in _FREE and saved.get(name) != wanted[name]:
            raise UserError(
                f"{folder} was made with other settings ({name} was {saved.get(name)} and is now {wanted[name]}): delete it, or "
                "give another out"
            )
    return True


def _all_finished(made: Made) -> bool:
    done = [finished(config) for config in _stages(made)]  # the settings of every stage are compared
    return all(done)


def _stages(made: Made) -> list[Any]:
    return [made.unlearning, made.evaluation, *([made.attack] if made.attack is not None else [])]


def _threads(workers: int) -> int:
    return max(1, torch.get_num_threads() // workers)


def _config_job(stages: Sequence[Any], folder: Path, workers: int) -> Job:
    return Job(_run, (list(stages), folder, _threads(workers), True), folder / LOG)


def _all_done(jobs: Sequence[Job], workers: int) -> None:
    todo = [job for job in jobs if not all(finished(config) for config in job.arguments[0])]
    for job, why in zip(todo, run_apart(todo, workers=workers), strict=True):
        if why is not None:
            raise UserError(f"{job.log.parent} failed, and nothing can be compared without it: {why}")


def _run(stages: Sequence[Any], folder: Path, threads: int, keep_models: bool) -> None:
    """Of the new process."""
    torch.set_num_threads(threads)
    for config in stages:
        if not finished(config):
            run, _ = _STAGES[type(config).__name__]
            run(replace(config, resume=(Path(config.out) / "config.yaml").exists()))
    if not keep_models:
        for weights in RunFolder(folder).path.glob(f"{MODEL}/*.safetensors"):
            weights.unlink()
