"""One comparison of localizers as data: model x facts x facts that must stay x localizers, and the plan to draw from them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import ClassVar

from lm.anatomy import Kind
from lm.errors import UserError
from lm.model import ModelSpec
from lm.prompts import PromptSpec
from tracing.bootstrap import check_confidence
from tracing.localizers.attribution_patching import AttributionPatching
from tracing.localizers.base import Localizer
from tracing.localizers.by_tracing import CausalTracing
from tracing.localizers.fact_lookup import FactLookup
from tracing.localizers.gradient_overlap import GradientOverlap
from tracing.localizers.weight_attribution import WeightAttribution
from tracing.plan.choose import PlanKind
from tracing.plan.rules import usual_size
from tracing.question.fact_source import OLD_KEYS, SHORT_KEYS, FactSource

HELP = """Where is it stored, by several localizers? Run them on the same facts, compare them, and choose layers if they agree.

palimpsest localize --config builtin --out runs/localize
accelerate launch --config_file "$(palimpsest configs accelerate/cpu2_ddp)" -m palimpsest localize --config builtin
"""

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
            raise UserError(f"plan.size is {self.size}: give at least 1, or null")
        if not 0 < self.stability <= 1:
            raise UserError(f"plan.stability is {self.stability}: give a share above 0 and up to 1 (0.9 is usual)")

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

    short_keys: ClassVar[dict[str, str]] = SHORT_KEYS
    old_keys: ClassVar[dict[str, str]] = OLD_KEYS

    model: ModelSpec = field(default_factory=ModelSpec)
    """The model that has memorized the facts."""
    facts: FactSource = field(default_factory=FactSource)
    """What to locate: where from, and how much of it (`max_facts` on either side)."""
    retain: tuple[str, ...] | str = ("builtin:retain",)
    """What must stay, for the localizers that compare with it; sources as for facts, read in the same way, or none: []."""
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
        if self.facts.max_facts is not None and self.facts.max_facts < 2:
            raise UserError(f"facts.max_facts is {self.facts.max_facts}: give at least 2, or null")
        if self.seed < 0:
            raise UserError(f"seed is {self.seed}: give 0 or more")
        if len(self.localizers) < 2:
            raise UserError(
                f"localizers names {len(self.localizers)}: give at least two to compare, or use the stage trace"
            )
        for name, one in self.localizers.items():
            if not _NAME.fullmatch(name):
                raise UserError(f"the localizer's name {name!r} is no file name: use small letters, digits, _ and -")
            if one.needs_retain and not self.retain:
                raise UserError(
                    f"the localizer {name} compares with facts that must stay: name their sources in retain"
                )
            if missing := [kind for kind in self.plan.kinds if kind not in one.scored]:
                raise UserError(
                    f"plan.kind is {self.plan.kind} but the localizer {name} does not score {', '.join(missing)}: use what all do"
                )
