"""The stages that the demo strings together, each the public one with the demo's settings, from files to files.

What is finished is not run again: a stage goes on with what is in its folder, and refuses settings that have changed.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lm.anatomy import Kind
from lm.config import find_config, parse_config
from lm.model import ModelSpec
from tracing.plan.layer_plan import LayerPlan
from tracing.stages.retrace.config import RetraceConfig
from tracing.stages.retrace.stage import run_retrace
from tracing.stages.trace.stage import run_trace
from unlearn.attacks.config import AttackConfig
from unlearn.attacks.stage import run_attack
from unlearn.demo.config import DemoConfig
from unlearn.demo.entries import Entry
from unlearn.evaluation.config import EvaluateConfig
from unlearn.evaluation.stage import run_evaluate
from unlearn.stage import run_unlearn


def find_layers(config: DemoConfig, folder: Path) -> LayerPlan:
    """The plan, traced into `folder`; facts that are there already (of the same model and settings) are read back."""
    result = run_trace(replace(config.trace, out=str(folder), resume=_begun(folder)))
    print(result.plan.verdict)
    return result.plan


def run_entry(config: DemoConfig, entry: Entry, out: Path, retain_scores: Path | None = None) -> None:
    """Unlearn if the entry asks for it, and score, into `out / KEY` and `out / scores / KEY`.

    Args:
        retain_scores: the folder of the retain model's evaluation, beside which membership is judged.
    """
    model = config.trace.model
    if entry.unlearning is not None:
        run = out / entry.key
        path = run_unlearn(replace(entry.unlearning, out=str(run), resume=_begun(run)))
        model = ModelSpec(path=str(path), device=model.device)
    elif entry.part != "reference":
        model = ModelSpec(path=str(entry.path), device=model.device)
    scores = out / "scores" / entry.key
    evaluation = EvaluateConfig(
        model=model,
        batch_size=config.batch_size,
        retain_scores=None if retain_scores is None else str(retain_scores),
        out=str(scores),
        resume=_begun(scores),
    )
    print(run_evaluate(evaluation))


def retrace(config: DemoConfig, entry: Entry, out: Path) -> None:
    """Trace the same facts in the model that a method left, what the plan trains only."""
    plan = LayerPlan.load(out / "trace" / "plan.json")
    kinds: tuple[Kind, ...] = (
        ("resid",) if "all" in plan.modules else tuple(kind for kind in config.trace.kinds if kind in plan.modules)
    )
    run = out / "retrace"
    retraced = run_retrace(
        RetraceConfig(
            model=ModelSpec(path=str(out / entry.key / "model"), device=config.trace.model.device),
            before=str(out / "trace"),
            kinds=kinds,
            confidence=config.trace.plan.confidence,
            out=str(run),
            resume=_begun(run),
        )
    )
    for kind in kinds:
        print(retraced.sentence(kind))


def attack_config(config: DemoConfig) -> AttackConfig | None:
    """What is tried on a model, with the demo's settings; the model and the folder are still to be set.

    Raises:
        UserError: `config.attack` is no attack config.
    """
    if config.attack is None:
        return None
    own = parse_config(AttackConfig, ["--config", find_config(config.attack)])
    return replace(
        own,
        retain_model=ModelSpec(path=config.retain_model, device=config.trace.model.device),
        forget="builtin:forget",
        retain="builtin:retain",
        columns=None,
        prompt=config.trace.prompt,
    )


def run_attack_on(
    settings: AttackConfig, config: DemoConfig, entry: Entry, out: Path, retain_answers: Path | None
) -> None:
    """Attack the model of an entry, into `out / attacks / KEY`.

    Args:
        settings: what `attack_config` gave.
        retain_answers: the folder of an attack on another entry, whose answers of the retain model are read.
    """
    model = ModelSpec(path=str(out / entry.key / "model"), device=config.trace.model.device)
    run = out / "attacks" / entry.key
    answers = settings.retain_answers if retain_answers is None else str(retain_answers)
    result = run_attack(
        replace(settings, model=model, retain_answers=answers, workers=1, out=str(run), resume=_begun(run))
    )
    print(result)


def _begun(folder: Path) -> bool:
    """Whether there is a run; a folder may hold a log alone."""
    return (folder / "config.yaml").exists()
