"""The stages in the order of the work, as data: what each is called, where it stands, which configs are shipped for it.

Every stage has a room with a `config.py` (one dataclass, and `HELP`, what its `--help` says first) and a `stage.py` (the
function from config to result, and `describe`, what is printed at the end). To add a stage: a room and a line here. Nothing is
imported before a stage is chosen.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of the command. What it imports, it imports when asked."""

    name: str
    """What the command calls it."""
    line: str
    """What it does, in a line."""
    room: str
    """The package with its `config` and `stage`."""
    config: str
    """The name of its config class, in `<room>.config`."""
    function: str
    """The name of the function that runs it, in `<room>.stage`."""
    folder: str
    """The folder of its shipped configs in `configs/`; "" is `configs/` itself."""
    default: str | None = None
    """The shipped config that is taken when none is named; None takes the defaults of the config class."""
    operands: str | None = None
    """The field, a list, that takes words without a setting's name before them."""

    def config_class(self) -> type[Any]:
        """Its config class."""
        config: type[Any] = _named(f"{self.room}.config", self.config)
        return config

    def help(self) -> str:
        """What its `--help` says first."""
        return str(_named(f"{self.room}.config", "HELP"))

    def run(self) -> Callable[[Any], Any]:
        """The function from config to result."""
        function: Callable[[Any], Any] = _named(f"{self.room}.stage", self.function)
        return function

    def describe(self) -> Callable[[Any, Any], str]:
        """The function from config and result to what is printed at the end."""
        function: Callable[[Any, Any], str] = _named(f"{self.room}.stage", "describe")
        return function


def _named(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


STAGES: tuple[Stage, ...] = (
    Stage(
        name="demo",
        line="the main job on the built-in model: trace, choose layers, unlearn, score, trace again, attack, report",
        room="unlearn.demo",
        config="DemoConfig",
        function="run_demo",
        folder="",
        default="demo",
    ),
    Stage(
        name="trace",
        line="where is it stored? trace facts through a model and choose the layers to train",
        room="tracing.stages.trace",
        config="TraceConfig",
        function="run_trace",
        folder="trace",
    ),
    Stage(
        name="localize",
        line="the same question put to several localizers, which are compared",
        room="tracing.stages.localize",
        config="LocalizeConfig",
        function="run_localize",
        folder="localize",
    ),
    Stage(
        name="alternates",
        line="other answers to the forget rows, for the objectives that teach one instead",
        room="unlearn.alternates",
        config="AlternatesConfig",
        function="run_alternates",
        folder="alternates",
    ),
    Stage(
        name="unlearn",
        line="take it out: train the chosen layers until the forget rows are gone and the retain rows stay",
        room="unlearn",
        config="UnlearnConfig",
        function="run_unlearn",
        folder="unlearn",
    ),
    Stage(
        name="merge",
        line="unlearn by arithmetic on weights, or join several unlearned checkpoints",
        room="unlearn.merging",
        config="MergeConfig",
        function="run_merge",
        folder="merge",
    ),
    Stage(
        name="evaluate",
        line="prove it: what a model still says about the forget and retain rows, scored",
        room="unlearn.evaluation",
        config="EvaluateConfig",
        function="run_evaluate",
        folder="evaluate",
    ),
    Stage(
        name="attack",
        line="does it come back? relearn or press the model, beside one that never saw the forget rows",
        room="unlearn.attacks",
        config="AttackConfig",
        function="run_attack",
        folder="attack",
    ),
    Stage(
        name="retrace",
        line="what is left where it was stored? trace the same facts again after unlearning",
        room="tracing.stages.retrace",
        config="RetraceConfig",
        function="run_retrace",
        folder="retrace",
    ),
    Stage(
        name="depth",
        line="how deep did unlearning go? put the unlearned streams into the original, layer by layer",
        room="tracing.stages.depth",
        config="DepthConfig",
        function="run_depth",
        folder="depth",
    ),
    Stage(
        name="report",
        line="one page from any run folders: palimpsest report RUN…",
        room="unlearn.report",
        config="ReportConfig",
        function="run_report",
        folder="report",
        operands="runs",
    ),
    Stage(
        name="compare",
        line="one table from any run folders, a row a method: palimpsest compare RUN…",
        room="unlearn.comparison",
        config="CompareConfig",
        function="run_compare",
        folder="compare",
        operands="runs",
    ),
    Stage(
        name="search",
        line="which method is better at the same effort? equal trials, a budget of utility, seeds",
        room="unlearn.search",
        config="SearchConfig",
        function="run_search",
        folder="search",
    ),
    Stage(
        name="semeval",
        line="the contract of SemEval-2025 Task 4: a model and two data folders in, a checkpoint out",
        room="unlearn.semeval",
        config="SemevalConfig",
        function="run_semeval",
        folder="semeval",
    ),
    Stage(
        name="harvest",
        line="activations of a model into a cache on disk, for many autoencoders",
        room="sae.activations",
        config="HarvestConfig",
        function="run_harvest",
        folder="harvest",
    ),
    Stage(
        name="train-sae",
        line="look inside: train sparse autoencoders on the activations of a model",
        room="sae.trainer",
        config="TrainSaeConfig",
        function="run_train_sae",
        folder="sae",
    ),
)
