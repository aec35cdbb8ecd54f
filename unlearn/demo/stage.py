"""The main job on the built-in model, as `palimpsest demo` runs it: trace, choose layers, unlearn, score, attack, report.

The joint method on the planned layers stands beside its controls (random layers, all layers, gradient difference), the
method that wipes and heals, the untouched model and the retain model. Every stage is the public one, from files to files; this
only strings them together, so a stage that is finished is not run again.
"""

from __future__ import annotations

import time
from pathlib import Path

from lm.config import dump_yaml
from lm.devices import accelerator, is_main
from lm.errors import UserError
from lm.run_folder import hold, stage, write_atomic
from unlearn.demo.collect import demo_report
from unlearn.demo.config import DemoConfig
from unlearn.demo.entries import Entry, entries
from unlearn.demo.results import check_results, table, write_results
from unlearn.demo.steps import attack_config, find_layers, retrace, run_attack_on, run_entry
from unlearn.demo.tasks import Task, run_tasks
from unlearn.processes import cores
from unlearn.report import write_report


@stage
def run_demo(config: DemoConfig) -> Path:
    """Run every stage that is not finished; returns the report's path. `results.json` lies beside it.

    Raises:
        UserError: whatever the user can mend; what is finished is kept.
    """
    out = Path(config.out)
    compared = _entries(config)
    tasks = _tasks(config, compared, out)  # refused before anything runs
    if is_main():
        hold(out)
    write_atomic(out / "demo.yaml", dump_yaml(config))
    started = time.monotonic()
    run_tasks(tasks, workers=_workers(config, len(tasks)), ended=lambda: write_results(compared, out))
    print(f"all stages took {time.monotonic() - started:.0f} s")
    print(table(write_results(compared, out)))
    write_report(out / "report.html", demo_report(out, compared, attacked=config.attack is not None))
    return out / "report.html"


def describe(config: DemoConfig, result: Path) -> str:
    """What a finished demo says.

    Raises:
        UserError: results.json lacks a model or a number, or there is no page.
    """
    check_results(result.parent, _entries(config), attacked=config.attack is not None)
    return f"wrote {result} and {result.parent / 'results.json'}"


def _entries(config: DemoConfig) -> list[Entry]:
    return entries(config, Path(config.out) / "trace" / "plan.json")


def _workers(config: DemoConfig, tasks: int) -> int:
    """How many tasks run at once."""
    acc = accelerator(cpu=config.trace.model.device == "cpu")
    if acc.num_processes > 1 and config.workers not in (None, 1):
        raise UserError(
            f"workers is {config.workers}, and the demo was launched on {acc.num_processes} processes: leave workers out, or use "
            "python, not accelerate launch"
        )
    if config.workers is not None:
        return config.workers
    return 1 if acc.num_processes > 1 or acc.device.type != "cpu" else min(cores(), tasks)


def _tasks(config: DemoConfig, compared: list[Entry], out: Path) -> list[Task]:
    """What is to be done, what others wait for or takes longest first; each after those whose results it reads."""
    by_key = {entry.key: entry for entry in compared}
    retain_scores = out / "scores" / "retain_only"

    def task_of(entry: Entry) -> Task:
        folder = out / entry.key if entry.unlearning is not None else out / "scores" / entry.key
        if entry.key == "retain_only":
            return Task(entry.key, entry.label, folder, run_entry, (config, entry, out))
        after = ("trace", "retain_only") if entry.planned else ("retain_only",)
        return Task(entry.key, entry.label, folder, run_entry, (config, entry, out, retain_scores), after)

    attacked = [entry for entry in compared if entry.attacked]
    first = [by_key["retain_only"], *sorted(attacked, key=lambda entry: entry.planned)]
    tasks = [Task("trace", "Where is it stored?", out / "trace", find_layers, (config, out / "trace"))]
    tasks += map(task_of, first)
    settings = attack_config(config)
    answers: Path | None = None
    for entry in attacked if settings is not None else ():
        folder, label = out / "attacks" / entry.key, f"Does it come back? {entry.label}"
        after = (entry.key,) if answers is None else (entry.key, f"attack {answers.name}")
        tasks.append(
            Task(f"attack {entry.key}", label, folder, run_attack_on, (settings, config, entry, out, answers), after)
        )
        answers = answers or folder  # of the retain model, for those that follow
    tasks += [task_of(entry) for entry in compared if entry not in first]
    again = (config, by_key["joint_planned"], out)
    label = "What is left where it was stored?"
    return [*tasks, Task("retrace", label, out / "retrace", retrace, again, ("joint_planned",))]
