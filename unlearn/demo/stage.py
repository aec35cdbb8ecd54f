"""The main job on the built-in model, as `palimpsest demo` runs it: trace, choose layers, unlearn, score, report.

The joint method on the planned layers stands beside its controls (random layers, all layers, gradient difference), the
untouched model and the retain model. Every stage is the public one, from files to files; this only strings them
together, so a stage that is finished is not run again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lm.anatomy import Kind
from lm.config import dump_yaml
from lm.errors import UserError
from lm.model import ModelSpec
from lm.run_folder import write_atomic, write_json
from tracing.plan.layer_plan import LayerPlan
from tracing.stages.retrace.config import RetraceConfig
from tracing.stages.retrace.stage import run_retrace
from tracing.stages.trace.stage import run_trace
from unlearn.config import UnlearnConfig
from unlearn.demo.collect import demo_report
from unlearn.demo.config import DemoConfig
from unlearn.demo.entries import Entry, entries
from unlearn.evaluation.config import EvaluateConfig
from unlearn.evaluation.stage import run_evaluate
from unlearn.report import write_report
from unlearn.stage import run_unlearn


def run_demo(config: DemoConfig) -> Path:
    """Run every stage that is not finished; returns the report's path. `results.json` lies beside it."""
    out = Path(config.out)
    write_atomic(out / "demo.yaml", dump_yaml(config))
    started = time.monotonic()
    plan = find_layers(config, out / "trace")
    models: dict[str, dict[str, Any]] = {}
    for entry in entries(config, out / "trace" / "plan.json"):
        print(f"== {entry.label}", flush=True)
        models[entry.key] = score_entry(config, entry, out)
        write_json(out / "results.json", {"models": models, "layers": list(plan.layers), "verdict": plan.verdict})
    trace_again(config, plan, out)
    print(f"all stages took {time.monotonic() - started:.0f} s")
    print(table(models))
    write_report(out / "report.html", demo_report(out, entries(config, out / "trace" / "plan.json")))
    return out / "report.html"


def describe(config: DemoConfig, result: Path) -> str:
    """What a finished demo says.

    Raises:
        UserError: results.json lacks a model or a number, or there is no page.
    """
    check_results(result.parent)
    return f"wrote {result} and {result.parent / 'results.json'}"


def table(models: Mapping[str, Mapping[str, Any]]) -> str:
    """The results as a few lines of text."""
    lines = [f"{'model':<22}{'aggregate':>10}{'MIA AUC':>9}{'MIA':>7}{'utility':>9}{'final':>8}{'seconds':>9}"]
    for key, m in models.items():
        lines.append(
            f"{key:<22}{m['task_aggregate']:>10.3f}{m['mia_auc']:>9.3f}{m['mia_score']:>7.3f}"
            f"{m['utility']:>9.3f}{m['final']:>8.3f}{m['seconds']:>9.1f}"
        )
    return "\n".join(lines)


def find_layers(config: DemoConfig, folder: Path) -> LayerPlan:
    """The plan, traced into `folder`; facts that are there already (of the same model and settings) are read back."""
    print("== Where is it stored?", flush=True)
    trace_config = replace(config.trace, out=str(folder), resume=folder.exists())
    result = run_trace(trace_config)
    print(result.plan.verdict)
    return result.plan


def trace_again(config: DemoConfig, plan: LayerPlan, out: Path) -> None:
    """Trace the same facts in the model that the method left, what the plan trains only."""
    print("== What is left where it was stored?", flush=True)
    kinds: tuple[Kind, ...] = (
        ("resid",) if "all" in plan.modules else tuple(kind for kind in config.trace.kinds if kind in plan.modules)
    )
    run = out / "retrace"
    retraced = run_retrace(
        RetraceConfig(
            model=ModelSpec(path=str(out / "joint_planned" / "model"), device=config.trace.model.device),
            before=str(out / "trace"),
            kinds=kinds,
            confidence=config.trace.plan.confidence,
            out=str(run),
            resume=run.exists(),
        )
    )
    for kind in kinds:
        print(retraced.sentence(kind))


def score_entry(config: DemoConfig, entry: Entry, out: Path) -> dict[str, Any]:
    """Unlearn if the entry asks for it, and score: one model's record in results.json. Finished stages are read back."""
    seconds = 0.0
    path = entry.path
    if path is None:
        assert entry.scope is not None
        assert entry.objective is not None
        run = out / entry.key
        unlearning = UnlearnConfig(
            model=config.trace.model,
            prompt=config.trace.prompt,
            scope=entry.scope,
            objective=entry.objective,
            trainer=config.trainer,
            out=str(run),
        )
        path = str(run_unlearn(replace(unlearning, resume=run.exists())))
        seconds = float(json.loads((run / "manifest.json").read_text())["train_seconds"])
    scores = out / "scores" / entry.key
    evaluation = EvaluateConfig(
        model=config.trace.model if entry.key == "base" else ModelSpec(path=path, device=config.trace.model.device),
        batch_size=config.batch_size,
        out=str(scores),
    )
    record = run_evaluate(replace(evaluation, resume=scores.exists())).to_json()
    measured = record["seconds"]
    assert isinstance(measured, float)
    return {**record, "seconds": round(seconds + measured, 3)}


def check_results(folder: Path) -> None:
    """Refuse a results.json that lacks a model or a number. What the numbers must be is the tests' business."""
    models = json.loads((folder / "results.json").read_text())["models"]
    wanted = ["base", "retain_only", "joint_planned", "joint_random", "joint_all", "gradient_difference"]
    numbers = ["task_aggregate", "mia_auc", "mia_score", "utility", "final", "seconds"]
    for key in wanted:
        if (
            key not in models
            or len(models[key].get("terms", [])) != 12
            or any(models[key].get(n) is None for n in numbers)
        ):
            raise UserError(
                f"{folder}/results.json: {key} is missing or incomplete, so run the demo again in a new folder"
            )
    if not (folder / "report.html").is_file():
        raise UserError(f"{folder} has no report.html: run the demo again")
