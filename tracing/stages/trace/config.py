"""One tracing experiment as data: model x facts x corruption x sweep, and the plan to draw from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from lm.anatomy import Kind
from lm.errors import UserError
from lm.model import ModelSpec
from lm.prompts import PromptSpec
from tracing.bootstrap import check_confidence
from tracing.corruption.noise import Corruption, GaussianNoise
from tracing.effects.roles import SUBJECT_ROLES, Aggregation, check_reached, check_roles
from tracing.engine.engines import EngineName
from tracing.plan.choose import PlanKind
from tracing.plan.rules import RuleName, check_rule, usual_size
from tracing.question.fact_source import OLD_KEYS, SHORT_KEYS, FactSource
from tracing.question.metrics import MetricName
from tracing.question.sweep import Positions, Severed, Sweep

HELP = """Where is it stored? Trace facts through a model, and choose the layers to train from what comes back.

palimpsest trace --config builtin --out runs/trace
accelerate launch --config_file "$(palimpsest configs accelerate/gpu8_ddp)" -m palimpsest trace --config lume
"""


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """How layers are chosen from the effects: see `tracing.choose_layers`."""

    rule: RuleName = "band"
    """How layers are picked from their scores: band (neighbors), top (the highest), mass (the fewest that hold `share` of all
    positive effect), elbow (before the bend of the sorted scores), or permutation (those that stand out from shuffled layers)."""
    size: int | None = None
    """How many layers, for band and top; null takes three eighths of them, as the authors of the joint method do (6 of 16)."""
    share: float = 0.5
    """How much of all positive effect `mass` must hold."""
    kind: PlanKind = "mlp"
    """Which effects count, and with it what is trained: mlp, attn, both, or resid (whole blocks)."""
    roles: tuple[str, ...] = SUBJECT_ROLES
    """The prompt tokens that count: before, first_subject, middle_subject, last_subject, first_after, further, last."""
    confidence: float = 0.95
    """Of the bootstrap intervals."""
    stability: float = 0.9
    """In how many resamples a like band must win."""
    least_share: float = 0.05
    """How much of what the corruption took the band's best layer must bring back."""
    aggregation: Aggregation = "fixed"
    """Which prompt tokens a role has; `authors` repeats the slips in the pictures of the joint method's authors."""

    def __post_init__(self) -> None:
        check_roles(self.roles)
        check_confidence(self.confidence)
        if self.size is not None and self.size < 1:
            raise UserError(f"plan.size is {self.size}: give at least 1, or null")
        check_rule(self.rule, self.size, self.share)
        if not 0 < self.stability <= 1:
            raise UserError(f"plan.stability is {self.stability}: give a share above 0 and up to 1 (0.9 is usual)")
        if not 0 <= self.least_share < 1:
            raise UserError(f"plan.least_share is {self.least_share}: give a share from 0 to below 1 (0.05 is usual)")

    def layers(self, model_layers: int) -> int | None:
        """How many layers to choose of a model that has `model_layers`; None where the rule finds that itself."""
        if self.rule not in ("band", "top"):
            return None
        return usual_size(model_layers) if self.size is None else self.size


@dataclass(frozen=True, kw_only=True)
class TraceConfig:
    """Which model is asked what, how the subject is corrupted, and which layers come of it."""

    short_keys: ClassVar[dict[str, str]] = SHORT_KEYS
    old_keys: ClassVar[dict[str, str]] = OLD_KEYS

    model: ModelSpec = field(default_factory=ModelSpec)
    """The model that has memorized the facts."""
    facts: FactSource = field(default_factory=FactSource)
    """What to ask: where from, and how much of it."""
    least_total: float | None = None
    """Leave out, before any cell is computed, facts of which the corruption takes less than this, in units of the metric."""
    stop_when_apart: bool = False
    """Trace facts in a drawn order and stop as soon as a plan singles layers out: it looks after 8, 16, 32, … facts, each time at
    a higher confidence, so that all looks together have the plan's."""
    corruption: Corruption = field(default_factory=GaussianNoise)
    """How the subject is made unreadable."""
    also: tuple[Corruption, ...] = ()
    """Other corruptions under which the same facts are traced, such as [TokenReplacement]: how far they agree is reported, and a
    plan that they do not confirm is not singled out. One that is `corruption` already is not traced twice."""
    kinds: tuple[Kind, ...] = ("resid", "mlp", "attn")
    """What is restored: the whole stream after a block, or what its MLP or attention adds."""
    window: int = 1
    """How many layers of mlp and attn are restored together (the published script: 10). Above 1 single layers are traced too, and
    what windows bring back beyond them is reported."""
    positions: Positions = "all"
    """Which prompt tokens are restored: all, subject_and_after, or subject_and_last (the cheapest)."""
    metric: MetricName = "probability"
    """What is read off the model's answer, higher where the answer is nearer. The usual ones are probability (of the whole
    answer) and log_probability; in Python, help("tracing.question.metrics") says what each is."""
    also_metrics: tuple[MetricName, ...] = ()
    """Further metrics, read off the same passes at next to no cost and written beside: effects-METRIC.npz. The plan is drawn from
    `metric` alone."""
    sever: Severed | None = None
    """Hold all MLPs (mlp) or all attention layers (attn) at the restored token at their corrupted values."""
    engine: EngineName = "wavefront"
    """How cells are computed: exactly and fast, or by the published loop."""
    memory: float = 2.0
    """Gigabytes that the wavefront may take beside the model, about; a run may go on with another number."""
    prompt: PromptSpec = field(default_factory=PromptSpec)
    """How questions are rendered: as they are trained."""
    plan: PlanConfig = field(default_factory=PlanConfig)
    """How layers are chosen."""
    texts: bool = False
    """Write the texts of the facts into effects.json (prompts, answers, what the model said instead), not their ids alone."""
    seed: int = 0
    """Of the drawn facts, the resampling and the random control (the noise has its own)."""
    out: str = "runs/trace"
    """The run folder; the plan is its plan.json."""
    resume: bool = False
    """Go on with the trace in `out`: finished facts are not traced again."""

    def __post_init__(self) -> None:
        Sweep(
            kinds=self.kinds,
            window=self.window,
            metric=self.metric,
            positions=self.positions,
            sever=self.sever,
            also=self.also_metrics,
        )
        if self.least_total is not None and not self.least_total >= 0:
            raise UserError(f"least_total is {self.least_total}: give 0 or more in units of the metric, or null")
        if self.seed < 0:
            raise UserError(f"seed is {self.seed}: give 0 or more")
        wanted = {"both": {"mlp", "attn"}}.get(self.plan.kind, {self.plan.kind})
        if missing := sorted(wanted - set(self.kinds)):
            raise UserError(f"plan.kind is {self.plan.kind} but kinds leaves out {', '.join(missing)}: add it to kinds")
        check_reached(self.plan.roles, self.positions)

    @property
    def others(self) -> dict[str, Corruption]:
        """The corruptions of `also` but for repeated ones, by name: their class, numbered where it occurs again."""
        each = list(dict.fromkeys((self.corruption, *self.also)))
        kinds = [type(one).__name__ for one in each]
        count = [kinds[:place].count(kind) + 1 for place, kind in enumerate(kinds)]
        names = [f"{kind}-{number}" if number > 1 else kind for kind, number in zip(kinds, count, strict=True)]
        return dict(zip(names[1:], each[1:], strict=True))
