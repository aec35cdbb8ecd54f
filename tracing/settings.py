"""What a trace is asked to do: `TraceSettings`, one value that tracing, its estimate, attribution and the localizers take."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lm.anatomy import Kind
from lm.errors import UserError
from lm.prompts import PromptSpec
from tracing.corruption.noise import Corruption, GaussianNoise
from tracing.engine.engines import check_engine
from tracing.question.facts import Fact
from tracing.question.metrics import MetricName
from tracing.question.sweep import Positions, Severed, Sweep


@dataclass(frozen=True)
class Workers:
    """The processes that share a trace, each with the whole model: this one's number, how many, and how to wait for all."""

    index: int = 0
    count: int = 1
    wait: Callable[[], None] = lambda: None


@dataclass(frozen=True, kw_only=True)
class TraceSettings:
    """How facts are traced; what each of these means is said once more by `tracing.trace`, which takes them as keywords too.

    Raises UserError for what no model could be traced with.
    """

    corruption: Corruption = field(default_factory=GaussianNoise)
    """How the subject is made unreadable."""
    kinds: Sequence[Kind] = ("resid", "mlp", "attn")
    """Which activations are restored."""
    window: int = 1
    """How many layers of mlp and attn are restored together."""
    metric: MetricName = "probability"
    """What is read off: a class of `tracing.question.metrics`."""
    engine: str = "wavefront"
    """How cells are computed: `wavefront` or `reference`."""
    prompt: PromptSpec = field(default_factory=PromptSpec)
    """How questions are rendered: as they are trained."""
    positions: Positions = "all"
    """Which prompt tokens are restored."""
    also_metrics: Sequence[MetricName] = ()
    """Further metrics, read off the same passes."""
    sever: Severed | None = None
    """Hold all MLPs, or all attention layers, at the restored token at their corrupted values."""
    memory: float = 2.0
    """Gigabytes (10^9 bytes) that may be taken beside the model, about."""
    max_facts: int | None = None
    """Trace only so many of the known facts; None traces all."""
    seed: int | None = 0
    """Of that draw; None takes the first ones."""
    least_total: float | None = None
    """Leave out facts of which the corruption takes less than this, in units of the metric."""
    only: Collection[Fact] | None = None
    """Trace exactly these of the facts, known or not; None traces those that the model knows."""
    cache: str | Path | None = None
    """A folder for finished facts."""
    workers: Workers = field(default_factory=Workers)
    """The processes that share the trace."""
    progress: bool = True
    """Show what is done, the rate and the time left."""

    def __post_init__(self) -> None:
        self.sweep  # noqa: B018 (it refuses what there is not)
        check_engine(self.engine)
        if not self.memory > 0:
            raise UserError(f"memory is {self.memory} GB: give what may be taken beside the model (2 is usual)")
        if self.max_facts is not None and self.max_facts < 1:
            raise UserError(f"max_facts is {self.max_facts}: give at least 1, or leave it out for all")
        if self.seed is not None and self.seed < 0:
            raise UserError(f"seed is {self.seed}: give 0 or more, or None for facts that are drawn already")
        if self.least_total is not None and not self.least_total >= 0:
            raise UserError(
                f"least_total is {self.least_total}: give 0 or more in units of the metric, or leave it out"
            )
        if self.workers.count > 1 and self.cache is None:
            raise UserError("several processes trace through a cache folder that all of them see: give cache")

    @property
    def sweep(self) -> Sweep:
        """Which cells are computed, and how they are scored."""
        return Sweep(
            kinds=tuple(self.kinds),
            window=self.window,
            metric=self.metric,
            positions=self.positions,
            sever=self.sever,
            also=tuple(self.also_metrics),
        )

    @property
    def bytes(self) -> int:
        """`memory` in bytes."""
        return int(self.memory * 1e9)

    @property
    def show(self) -> bool:
        """Whether this process shows what is done."""
        return self.progress and self.workers.index == 0


def settings_or(settings: TraceSettings | None, keywords: TraceSettings) -> TraceSettings:
    """The settings, or what the keywords made where there are none. Raises UserError for both, or for what is neither."""
    if settings is None:
        return keywords
    if not isinstance(settings, TraceSettings):
        raise UserError(
            f"the settings are a {type(settings).__name__}: give TraceSettings, or the setting by its name, as in "
            "corruption=GaussianNoise()"
        )
    if keywords != TraceSettings():
        raise UserError(
            "there are settings and keywords: put all into the settings, as in dataclasses.replace(settings, window=3)"
        )
    return settings
