"""What a report is made of: plain records that a run, a benchmark or a notebook fills in.

A model's part in the comparison follows from its key: `base` (before unlearning), `retain_only` (the twin that never
saw the forget rows), `*_planned` (trained in the planned layers), `*_random`, `*_inverse`, `*_all` (controls: the same
method in other layers), anything else (another method). Nothing is measured or drawn here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lm.errors import UserError
from tracing.effects.before_after import Difference
from tracing.effects.table import EffectTable
from tracing.plan.layer_plan import LayerPlan
from unlearn.evaluation.lume import TERMS

Part = Literal["base", "twin", "planned", "control", "other"]
_CONTROLS = ("random", "inverse", "all")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One prompt and what the models said.

    Attributes:
        prompt, truth: the question or beginning, and what the data holds.
        task: `Task1`, `Task2`, `Task3`, or any other name.
        side: whether it was to be forgotten or kept.
        said: model key -> the whole generation; empty if it said nothing, absent if it was not asked.
    """

    prompt: str
    truth: str
    task: str
    side: Literal["forget", "retain"]
    said: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ReportModel:
    """One model of the comparison. Any number may be NaN where it does not apply or was not measured.

    Attributes:
        key: its name in files; see the module's first paragraph for what it implies.
        label, note: its name for readers, and a few words about it.
        terms: the twelve terms in the order of `unlearn.evaluation.lume.TERMS`.
        seconds: wall-clock time of making and scoring it.
        layers: the trained layers; None if all weights were trained (or none: base and twin).
        log: its training metric lines, as in `metrics.jsonl`; empty for base and twin.
    """

    key: str
    label: str
    terms: tuple[float, ...]
    task_aggregate: float
    note: str = ""
    mia_auc: float = math.nan
    mia_score: float = math.nan
    utility: float = math.nan
    final: float = math.nan
    seconds: float = math.nan
    layers: tuple[int, ...] | None = None
    log: Sequence[Mapping[str, Any]] = ()

    @property
    def part(self) -> Part:
        """Its part in the comparison, from the key."""
        if self.key == "base":
            return "base"
        if self.key == "retain_only":
            return "twin"
        ending = self.key.rsplit("_", 1)[-1]
        if ending == "planned":
            return "planned"
        return "control" if ending in _CONTROLS else "other"


@dataclass(frozen=True, kw_only=True)
class Retraced:
    """Facts traced before unlearning and again after it: which ones, in words, and what changed."""

    label: str
    found: Difference


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything on the page.

    Attributes:
        title: a short name of the report.
        model_name: the model under study.
        question: what was asked, a sentence for readers.
        plan: which layers were chosen and why; None if none were.
        tables: kind (`resid`, `mlp`, `attn`) -> mean indirect effects.
        models: in the order to show; base and twin are set apart wherever they stand.
        answers: rows to show before and after.
        again: facts that were traced again after unlearning, in the planned model.
        caveats: sentences on what the numbers do not show.
        commands: what to type to get these results again.
        facts: versions, date, seed, commit, data hashes, machine.
    """

    title: str
    model_name: str
    question: str
    models: tuple[ReportModel, ...]
    plan: LayerPlan | None = None
    tables: Mapping[str, EffectTable] = field(default_factory=dict)
    answers: tuple[Answer, ...] = ()
    again: tuple[Retraced, ...] = ()
    caveats: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()
    facts: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.models:
            raise UserError("the report has no models; give at least one.")
        keys = [model.key for model in self.models]
        for model in self.models:
            if keys.count(model.key) > 1:
                raise UserError(f"the report has {keys.count(model.key)} models named {model.key!r}; name each once.")
            if len(model.terms) != len(TERMS):
                raise UserError(
                    f"the report's model {model.key!r} has {len(model.terms)} terms; give {len(TERMS)}, NaN for those "
                    "that do not apply."
                )
        for kind, table in self.tables.items():
            layers = table.mean.shape[1]
            if self.plan is not None and max(self.plan.layers) >= layers:
                raise UserError(
                    f"the plan names layer {max(self.plan.layers)} but the {kind} effects have layers 0 to "
                    f"{layers - 1}; give the plan and the effects of one model."
                )

    def only(self, *parts: Part) -> list[ReportModel]:
        """The models of these parts, in order."""
        return [model for model in self.models if model.part in parts]

    @property
    def methods(self) -> list[ReportModel]:
        """The unlearned models: all but base and twin."""
        return self.only("planned", "control", "other")

    @property
    def model_layers(self) -> int | None:
        """How many layers the model has, if tracing says so."""
        for table in self.tables.values():
            return int(table.mean.shape[1])
        known = self.plan.provenance.get("model_layers") if self.plan is not None else None
        return int(known) if known is not None else None
