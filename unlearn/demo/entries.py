"""What the demo compares: the models that are only loaded, and the unlearning runs that are made first."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from lm.config import find_config, parse_config
from unlearn.config import UnlearnConfig
from unlearn.demo.config import DemoConfig
from unlearn.objectives import Objective
from unlearn.report.records import Part
from unlearn.scope.scope import Scope, Use


@dataclass(frozen=True)
class Entry:
    """One model of the comparison: a model to load as it is, or an unlearning run to make first.

    Attributes:
        path: the model to load.
        unlearning: the run; its folder is for the stage to say.
        planned: whether it can only begin when there is a plan.
        attacked: whether the result is attacked.
    """

    key: str
    label: str
    note: str
    part: Part
    path: str | None = None
    unlearning: UnlearnConfig | None = None
    planned: bool = False
    attacked: bool = False

    def with_seed(self, seed: int) -> Entry:
        """The same with another order of the batches."""
        if self.unlearning is None:
            return self
        trainer = replace(self.unlearning.trainer, seed=seed)
        return replace(self, unlearning=replace(self.unlearning, trainer=trainer))


def entries(config: DemoConfig, plan: Path) -> list[Entry]:
    """The untouched model, the retain model, the method, the controls, and the method that wipes and heals.

    Raises:
        UserError: `config.wipe_heal` is no unlearning config.
    """

    def run(key: str, label: str, note: str, part: Part, objective: Objective, use: Use = "chosen") -> Entry:
        made = UnlearnConfig(
            model=config.trace.model,
            prompt=config.trace.prompt,
            scope=Scope(plan=str(plan), use=use),
            objective=objective,
            trainer=config.trainer,
        )
        return Entry(key, label, note, part, unlearning=made, planned=True, attacked=part == "planned")

    joint, difference = config.joint, config.difference
    note = "Baseline: the same layers and steps, no cap, no adaptive weight."
    floor, ceiling = (
        "The model that memorized everything: the floor.",
        "Trained without the forget rows: the honest ceiling.",
    )
    return [
        Entry("base", "Before unlearning", floor, "reference", config.trace.model.path),
        Entry("retain_only", "Retain model", ceiling, "retain_model", config.retain_model),
        run("joint_planned", "Joint, planned layers", "The method.", "planned", joint),
        run("joint_random", "Joint, random layers", "Control: as many layers, drawn.", "control", joint, "random"),
        run("joint_all", "Joint, all layers", "Control: every MLP.", "all_layers", joint, "all"),
        run("gradient_difference", "Gradient difference", note, "other", difference),
        *_wipe_heal(config, plan),
    ]


def _wipe_heal(config: DemoConfig, plan: Path) -> list[Entry]:
    if config.wipe_heal is None:
        return []
    own = parse_config(UnlearnConfig, ["--config", find_config(config.wipe_heal)])
    scope = own.scope if own.scope.plan is None else replace(own.scope, plan=str(plan))
    parts = tuple(part if part.plan is None else replace(part, plan=str(plan)) for part in own.perturbation.parts)
    run = replace(
        own,
        model=config.trace.model,
        forget="builtin:forget",
        retain="builtin:retain",
        columns=None,
        prompt=config.trace.prompt,
        scope=scope,
        perturbation=replace(own.perturbation, parts=parts),
        resume=False,
    )
    planned = scope.plan is not None or any(part.plan is not None for part in parts)
    note = "Weights perturbed, healed on what is kept, and late made to look unseen to what is forgotten."
    return [
        Entry("wipe_heal", "Wipe, heal, look unseen", note, "wiped", unlearning=run, planned=planned, attacked=True)
    ]
