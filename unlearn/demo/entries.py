"""What the demo compares: the models that are only loaded, and the unlearning runs that are made first."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from unlearn.demo.config import DemoConfig
from unlearn.objectives import Objective
from unlearn.report.records import Part
from unlearn.scope.scope import Scope


@dataclass(frozen=True)
class Entry:
    """One model of the comparison: a model to load as it is, or an unlearning run to make first."""

    key: str
    label: str
    note: str
    part: Part
    path: str | None = None
    scope: Scope | None = None
    objective: Objective | None = None


def entries(config: DemoConfig, plan: Path) -> list[Entry]:
    """The untouched model, the retain model, the method, and the controls."""
    file = str(plan)
    return [
        Entry(
            "base",
            "Before unlearning",
            "The model that memorized everything: the floor.",
            "reference",
            config.trace.model.path,
        ),
        Entry(
            "retain_only",
            "Retain model",
            "Trained without the forget rows: the honest ceiling.",
            "retain_model",
            config.retain_model,
        ),
        Entry("joint_planned", "Joint, planned layers", "The method.", "planned", None, Scope(plan=file), config.joint),
        Entry(
            "joint_random",
            "Joint, random layers",
            "Control: as many layers, drawn.",
            "control",
            None,
            Scope(plan=file, use="random"),
            config.joint,
        ),
        Entry(
            "joint_all",
            "Joint, all layers",
            "Control: every MLP.",
            "all_layers",
            None,
            Scope(plan=file, use="all"),
            config.joint,
        ),
        Entry(
            "gradient_difference",
            "Gradient difference",
            "Baseline: the same layers and steps, no cap, no adaptive weight.",
            "other",
            None,
            Scope(plan=file),
            config.difference,
        ),
    ]
