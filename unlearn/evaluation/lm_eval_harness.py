"""lm-eval on a model that is already loaded: any of its tasks, and a task of its kind for questions in a local file.

lm-eval does the scoring; here is only the way in and out of it, without the hub where the task needs none. Imported
when it is used, because lm-eval is slow to import and not everywhere installed.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from lm.data.rows import Question
from lm.errors import UserError, did_you_mean, one_line
from lm.model import LanguageModel
from lm.run_folder import write_atomic
from unlearn.evaluation.questions import SENTENCE_PROMPT
from unlearn.generation.batching import evaluating

BUILTIN_TASK = "builtin_utility"


def run_lm_eval(
    model: LanguageModel,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    task_dir: Path | None = None,
    batch_size: int = 16,
) -> dict[str, dict[str, float]]:
    """lm-eval's own numbers for this model object, task (or group) by task, metric by metric.

    Args:
        tasks: names of lm-eval tasks or groups, such as `mmlu`; most download their data from the hub.
        limit: only the first so many documents of each task.
        task_dir: a folder with further task files, such as `write_task` makes. If every task is there, lm-eval's own
            are not searched, which saves seconds.
        batch_size: sequences a forward pass.

    Returns:
        `{task: {"acc": ..., "acc_stderr": ...}}`.

    Raises:
        UserError: lm-eval is not installed, a task is unknown, or its data cannot be had.
    """
    with _importing():
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    local = {path.stem for path in task_dir.glob("*.yaml")} if task_dir is not None else set()
    with evaluating(model), _own_generators(), _quiet("lm_eval", "lm-eval", "datasets"):
        manager = _manager(tasks, task_dir, defaults=not local.issuperset(tasks))
        with _having_data(tasks):
            results = simple_evaluate(
                model=HFLM(pretrained=model.model, tokenizer=model.tokenizer, batch_size=batch_size),
                tasks=list(tasks),
                limit=limit,
                task_manager=manager,
                bootstrap_iters=0,
                log_samples=False,
            )
    return {task: _metrics(values) for task, values in {**results["results"], **(results.get("groups") or {})}.items()}


def check_tasks(tasks: Sequence[str]) -> None:
    """Refuse lm-eval tasks that are unknown or whose data cannot be had, before a model is asked anything (it fetches them)."""
    with _importing():
        from lm_eval.tasks import get_task_dict
    with _own_generators(), _quiet("lm_eval", "lm-eval", "datasets"):
        manager = _manager(tasks, None, defaults=True)
        with _having_data(tasks):
            get_task_dict(list(tasks), manager)


def _manager(tasks: Sequence[str], task_dir: Path | None, *, defaults: bool) -> Any:
    """lm-eval's task manager, once it is clear that it knows the tasks."""
    with _importing():
        from lm_eval.tasks import TaskManager
    manager = TaskManager(include_path=None if task_dir is None else str(task_dir), include_defaults=defaults)
    for name in tasks:
        if name not in manager.all_tasks:
            hint = did_you_mean(name, manager.all_tasks)
            raise UserError(f'lm-eval has no task "{name}"{hint}: `lm_eval ls tasks` lists them')
    return manager


@contextmanager
def _importing() -> Iterator[None]:
    try:
        yield
    except ImportError as problem:
        missing = (problem.name or "").partition(".")[0] == "lm_eval"
        state = "is not installed" if missing else f"cannot be imported ({problem})"
        raise UserError(f"lm-eval {state}: pip install 'palimpsest-unlearning[eval]'") from None


@contextmanager
def _having_data(tasks: Sequence[str]) -> Iterator[None]:
    try:
        yield
    except (ConnectionError, FileNotFoundError) as problem:
        raise UserError(
            f"the data of {', '.join(tasks)} cannot be had ({one_line(problem)}): go online, or use a file"
        ) from None


def write_task(folder: Path, questions: Sequence[Question], name: str = BUILTIN_TASK) -> Path:
    """A lm-eval task for these questions: `<name>.yaml` and `<name>.jsonl` in `folder`, which is returned.

    The wording and the choice by summed log-probability are those of `utility.multiple_choice` in sentence style.
    """
    rows = [{"question": each.question, "choices": list(each.choices), "answer": each.answer} for each in questions]
    data = folder.resolve() / f"{name}.jsonl"
    write_atomic(data, "".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder.resolve() / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": SENTENCE_PROMPT.replace("{question}", "{{question}}"),
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": " ",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
    write_atomic(folder / f"{name}.yaml", yaml.safe_dump(task, sort_keys=False))
    return folder


def _metrics(values: Mapping[str, Any]) -> dict[str, float]:
    """lm-eval's `acc,none` as `acc`, and only what is a number."""
    kept = {key.removesuffix(",none"): value for key, value in values.items() if key != "sample_len"}
    return {key: float(value) for key, value in kept.items() if isinstance(value, int | float)}


@contextmanager
def _own_generators() -> Iterator[None]:
    """lm-eval seeds Python's, NumPy's and torch's global generators; put the caller's states back afterwards."""
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002 - it is the global one that is at stake
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Let these libraries log errors only, for a while."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
