"""The demo as data: how layers are found, how every run trains, what is compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from lm.errors import UserError
from lm.row_files import is_builtin
from tracing.stages.trace.config import TraceConfig
from unlearn.objectives import GradientDifference, Joint
from unlearn.training.config import TrainerConfig

HELP = """The main job on the built-in model: trace, choose layers, unlearn, score, attack, report.

palimpsest demo --config demo --out runs/demo
palimpsest demo --config demo --out runs/demo --workers 1 --attack null --wipe_heal null
"""


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The main job on the built-in model."""

    old_keys: ClassVar[Mapping[str, str]] = {"twin": "retain_model"}
    old_values: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "retain_model": {"builtin:retain_only": "builtin:retain_model"}
    }

    trace: TraceConfig = field(default_factory=TraceConfig)
    """How the layers are found (`out` and `resume` are the demo's)."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """How every unlearning run trains: equal steps, batches and rates for the method and its controls."""
    joint: Joint = field(default_factory=Joint)
    """The joint objective."""
    retain_model: str = "builtin:retain_model"
    """The model that never saw the forget rows; `trace.model` names the one that did."""
    difference: GradientDifference = field(default_factory=GradientDifference)
    """The gradient-difference baseline, in the planned layers: what differs from the method is the objective alone."""
    wipe_heal: str | None = "configs/unlearn/wipe_heal.yaml"
    """An unlearning config that is run beside the joint method: wipe, heal, look unseen. Its model, rows, prompt and folder are
    the demo's, and so is the plan where it names one. Null leaves it out."""
    attack: str | None = "configs/attack/quick.yaml"
    """An attack config: what is tried on the joint method in the planned layers and on `wipe_heal`. Its models, prompt, folder
    and workers are the demo's, and so are its forget and retain rows. Null: nothing is attacked."""
    workers: int | None = None
    """How many of the models are made, scored and attacked at once, each in a process of its own on one thread, with its log in
    its folder. 1: one after the other, in this process. Null: on a CPU as many as there are cores that it may use, on a GPU or
    under accelerate launch on several processes 1. The numbers are the same."""
    batch_size: int = 64
    """Prompts generated at once when scoring."""
    out: str = "runs/demo"
    """The folder for results.json, report.html and the stages' run folders."""

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise UserError(f"workers is {self.workers}: give at least 1, or null for as many as there are cores")
        sources = self.trace.facts.sources
        of_own = {
            "trace.model.path": (self.trace.model.path,),
            "trace.facts.sources": (sources,) if isinstance(sources, str) else sources,
            "retain_model": (self.retain_model,),
        }
        for name, values in of_own.items():
            if others := [value for value in values if not is_builtin(value)]:
                raise UserError(
                    f"{name} is {others[0]}, and the demo unlearns and scores the built-in rows in the built-in model: for a "
                    "model or facts of your own use palimpsest trace, unlearn, evaluate, attack and report"
                )
        if type(self.difference) is not GradientDifference:
            raise UserError(
                f"difference is {type(self.difference).__name__}, and its row is called gradient difference: set its "
                "fields only, or compare other objectives with palimpsest unlearn"
            )
