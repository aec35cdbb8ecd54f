"""One comparison of localizers as data: model x facts x facts that must stay x localizers, and the plan to draw from them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from lm.anatomy import Kind
from lm.errors import UserError
from lm.model import ModelSpec
from lm.prompts import PromptSpec
from tracing.bootstrap import check_confidence
from tracing.localizers.attribution_patching import AttributionPatching
from tracing.localizers.base import CausalTracing, Localizer
from tracing.localizers.fact_lookup import FactLookup
from tracing.localizers.gradient_overlap import GradientOverlap
from tracing.localizers.weight_attribution import WeightAttribution
from tracing.plan.choose import PlanKind
from tracing.stages.trace.config import usual_size

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")


def _usual() -> dict[str, Localizer]:
    """One of each way."""
    return {
        "tracing": CausalTracing(),
        "attribution": AttributionPatching(),
        "gradient_overlap": GradientOverlap(),
        "weights": WeightAttribution(),
        "lookup": FactLookup(),
    }


@dataclass(frozen=True, kw_only=True)
class CombinedPlanConfig:
    """How layers are chosen from several localizers: see `tracing.combined_plan`."""

    size: int | None = None
    """How many layers; null takes three eighths of them, as the authors of the joint method do (6 of 16)."""
    kind: PlanKind = "mlp"
    """Which scores count, and with it what is trained: mlp, attn, both, or resid (whole blocks)."""
    confidence: float = 0.95
    """Of the bootstrap intervals."""
    stability: float = 0.9
    """In how many resamples a like band must win."""

    def __post_init__(self) -> None:
        check_confidence(self.confidence)
        if self.size is not None and self.size < 1:
            raise UserError(f"plan.size is {self.size}; give at least 1, or null")
        if not 0 < self.stability <= 1:
            raise UserError(f"plan.stability is {self.stability}; give a share above 0 and up to 1 (0.9 is usual)")

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of score that the plan looks at."""
        return ("mlp", "attn") if self.kind == "both" else (self.kind,)

    def layers(self, model_layers: int) -> int:
        """How many layers to choose of a model that has `model_layers`."""
        return usual_size(model_layers) if self.size is None else self.size


@dataclass(frozen=True, kw_only=True)
class LocalizeConfig:
    """Which model is asked what, in which ways, and which layers come of it."""

    model: ModelSpec = field(default_factory=ModelSpec)
    """The model that has memorized the facts."""
    facts: tuple[str, ...] | str = ("builtin:forget",)
    """What to locate, one source or several: a JSONL or Parquet file of rows, a folder, a part of the built-in world, or a JSON
    or JSONL file of facts (objects with prompt, subject, and answer or attribute)."""
    retain: tuple[str, ...] | str = ("builtin:retain",)
    """What must stay, for the localizers that compare with it; sources as for facts, or none: []."""
    columns: dict[str, str] | None = None
    """For row files with other column names: our field -> their column, e.g. {"input": "question", "output": "answer"}."""
    tasks: tuple[str, ...] = ("Task2",)
    """Only rows of these tasks; Task2 asks about people by name. Empty: all."""
    subject: str | None = None
    """A regular expression whose group `subject` (else first group, else whole match) is the subject of a question; null
    finds the person's name by comparing rows."""
    leave_out_unnamed: bool = False
    """Leave out questions whose subject is not found instead of refusing the file."""
    max_facts: int | None = None
    """So many known facts on either side, drawn at random with `seed`; null takes all. A corruption is that of all facts."""
    localizers: dict[str, Localizer] = field(default_factory=_usual)
    """A name -> a localizer, at least two; each writes its scores as NAME.npz."""
    prompt: PromptSpec = field(default_factory=PromptSpec)
    """How questions are rendered: as they are trained."""
    plan: CombinedPlanConfig = field(default_factory=CombinedPlanConfig)
    """How layers are chosen."""
    seed: int = 0
    """Of the drawn facts, the resampling and the random control (localizers have their own)."""
    out: str = "runs/localize"
    """The run folder; the plan is its plan.json."""
    resume: bool = False
    """Go on with the run in `out`: finished localizers are not run again."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise UserError("facts is empty; name at least one source, such as builtin:forget")
        if self.max_facts is not None and self.max_facts < 2:
            raise UserError(f"max_facts is {self.max_facts}; give at least 2, or null")
        if self.seed < 0:
            raise UserError(f"seed is {self.seed}; give 0 or more")
        if len(self.localizers) < 2:
            raise UserError(
                f"localizers names {len(self.localizers)}; give at least two to compare, or use scripts/trace.py"
            )
        for name, one in self.localizers.items():
            if not _NAME.fullmatch(name):
                raise UserError(f"the localizer's name {name!r} is no file name; use small letters, digits, _ and -")
            if one.needs_retain and not self.retain_sources:
                raise UserError(
                    f"the localizer {name} compares with facts that must stay; name their sources in retain"
                )
            if missing := [kind for kind in self.plan.kinds if kind not in one.scored]:
                raise UserError(
                    f"plan.kind is {self.plan.kind} but the localizer {name} does not score {', '.join(missing)}; use what all do"
                )

    @property
    def sources(self) -> tuple[str, ...]:
        """The sources of facts, always as a tuple."""
        return (self.facts,) if isinstance(self.facts, str) else self.facts

    @property
    def retain_sources(self) -> tuple[str, ...]:
        """The sources of what must stay, always as a tuple."""
        return (self.retain,) if isinstance(self.retain, str) else self.retain
