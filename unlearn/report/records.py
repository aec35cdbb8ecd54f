"""What a report is made of: plain records that run folders, a benchmark or a notebook fill in.

Nothing is measured or drawn here.
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
from unlearn.evaluation.result import MEASURES

Part = Literal["reference", "retain_model", "planned", "control", "all_layers", "wiped", "other"]
"""A model's part in the comparison: the reference model (before unlearning), the retain model (it never saw the forget rows),
the method in the planned layers, the same method in as many other layers (a control) or in all of them, a method that wipes
weights first and heals them, any other model."""
ATTACK_MEASURES = ("relearned", "residue_nats")
"""What attacks come to, in one number each."""


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
        key: its name in files.
        label, note: its name for readers, and a few words about it.
        part: what it is in the comparison.
        terms: the twelve terms in the order of `unlearn.evaluation.lume.TERMS`.
        others: the values of further scores, by the names of `unlearn.evaluation.scores`.
        relearned: the largest gap to the retain model under attack, of what is said right (-1 to 1).
        residue_nats: how much likelier its forgotten answers are than never-seen ones after an attack, nats a token, less the
            retain model's own difference.
        seconds: wall-clock time of making and scoring it.
        layers: the trained layers; None if all weights were trained (or none: reference and retain model).
        log: its training metric lines, as in `metrics.jsonl`; empty for reference and retain model.
    """

    key: str
    label: str
    terms: tuple[float, ...]
    task_aggregate: float
    part: Part = "other"
    note: str = ""
    mia_auc: float = math.nan
    mia_score: float = math.nan
    utility: float = math.nan
    final: float = math.nan
    others: Mapping[str, float] = field(default_factory=dict)
    relearned: float = math.nan
    residue_nats: float = math.nan
    seconds: float = math.nan
    layers: tuple[int, ...] | None = None
    log: Sequence[Mapping[str, Any]] = ()

    def value(self, score: str) -> float:
        """The value of a score by its name; NaN if there is none."""
        if score in (*MEASURES, *ATTACK_MEASURES):
            return float(getattr(self, score))
        return self.others.get(score, math.nan)


@dataclass(frozen=True, kw_only=True)
class Retraced:
    """Facts traced before unlearning and again after it: which ones, in words, and what changed."""

    label: str
    found: Difference


@dataclass(frozen=True, kw_only=True)
class AttackTrial:
    """One attack on two models alike.

    Attributes:
        name: what the attacker had, and at which rate where several were tried.
        verdict: beside the retain model, in a few words (`unlearn.attacks.comparison.curves.Verdict`).
        sentence: the result in a sentence.
        levels: how far the attack went at each asking, 0 first.
        unlearned, retain_model: what each said right of the forgotten, from 0 to 1, at each level.
        low, high: the interval of the difference at each level; NaN where there is none.
    """

    name: str
    verdict: str
    sentence: str
    levels: tuple[float, ...]
    unlearned: tuple[float, ...]
    retain_model: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


Estimate = tuple[float, float, float]
"""A mean and the ends of its interval; NaN for what is not known."""


@dataclass(frozen=True, kw_only=True)
class Audited:
    """Three groups of people, asked before an attack and after it.

    Attributes:
        sentence: what was found.
        groups: the name of each, and how many people it has.
        unlearned, retain_model: measure -> for each group what the model has before and after; NaN without a model.
        residue: before and after, how much likelier forgotten answers are than never-seen ones, nats a token, less the retain
            model's own difference; None where that is not known.
    """

    sentence: str
    groups: tuple[tuple[str, int], ...]
    unlearned: Mapping[str, tuple[tuple[Estimate, Estimate], ...]]
    retain_model: Mapping[str, tuple[tuple[Estimate, Estimate], ...]]
    residue: tuple[Estimate, Estimate] | None = None


@dataclass(frozen=True, kw_only=True)
class Attacked:
    """What an attack brought back out of a model.

    Attributes:
        label: names the model.
        attack: names the attack.
        unit: what the levels count.
        trials: one for each way of attacking, all asked at the same levels.
        worst: the place of the trial and of its level with the largest gap to the retain model; None where none is known.
        worst_sentence: it in a sentence.
        audit: what the models make of people forgotten, retained and never seen, where the attack leaves most; None where nobody
            else was asked.
    """

    label: str
    attack: str
    unit: str
    trials: tuple[AttackTrial, ...]
    worst: tuple[int, int] | None = None
    worst_sentence: str = ""
    audit: Audited | None = None

    @property
    def gap(self) -> Estimate | None:
        """The largest gap to the retain model, with the ends of its interval."""
        if self.worst is None:
            return None
        place, level = self.worst
        trial = self.trials[place]
        return trial.unlearned[level] - trial.retain_model[level], trial.low[level], trial.high[level]


@dataclass(frozen=True, kw_only=True)
class Depth:
    """How deep unlearning went, by layer: nats a token lost with the stream of each model put into the original one."""

    label: str
    sentence: str
    unlearned: tuple[float, ...]
    retain_model: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything on the page.

    Attributes:
        title: a short name of the report.
        model_name: the model under study.
        question: what was asked, a sentence for readers.
        plan: which layers were chosen and why; None if none were.
        tables: kind (`resid`, `mlp`, `attn`) -> mean indirect effects.
        models: in the order to show; reference and retain model are set apart wherever they stand.
        answers: rows to show before and after.
        again: facts that were traced again after unlearning.
        attacks, depths: what attacks brought back, and how deep unlearning went.
        caveats: sentences on what the numbers do not show.
        commands: what to type to get these results again.
        facts: versions, date, seed, commit, data hashes, machine.
        left_out: run folders that were found and are not shown.
    """

    title: str
    model_name: str
    question: str
    models: tuple[ReportModel, ...]
    plan: LayerPlan | None = None
    tables: Mapping[str, EffectTable] = field(default_factory=dict)
    answers: tuple[Answer, ...] = ()
    again: tuple[Retraced, ...] = ()
    attacks: tuple[Attacked, ...] = ()
    depths: tuple[Depth, ...] = ()
    caveats: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.models:
            raise UserError("the report has no models: give at least one")
        keys = [model.key for model in self.models]
        for model in self.models:
            if keys.count(model.key) > 1:
                raise UserError(f"the report has {keys.count(model.key)} models named {model.key!r}: name each once")
            if len(model.terms) != len(TERMS):
                raise UserError(
                    f"the report's model {model.key!r} has {len(model.terms)} terms: give {len(TERMS)}, NaN for those "
                    "that do not apply"
                )
        for kind, table in self.tables.items():
            layers = table.mean.shape[1]
            if self.plan is not None and max(self.plan.layers) >= layers:
                raise UserError(
                    f"the plan names layer {max(self.plan.layers)} but the {kind} effects have layers 0 to "
                    f"{layers - 1}: give the plan and the effects of one model"
                )

    def only(self, *parts: Part) -> list[ReportModel]:
        """The models of these parts, in order."""
        return [model for model in self.models if model.part in parts]

    @property
    def methods(self) -> list[ReportModel]:
        """The unlearned models: all but the reference and the retain model."""
        return self.only("planned", "control", "all_layers", "wiped", "other")

    @property
    def model_layers(self) -> int | None:
        """How many layers the model has, if tracing says so."""
        for table in self.tables.values():
            return int(table.mean.shape[1])
        known = self.plan.provenance.get("model_layers") if self.plan is not None else None
        return int(known) if known is not None else None
