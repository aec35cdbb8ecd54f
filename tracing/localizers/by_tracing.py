"""Causal tracing as a localizer: the effects of `tracing.trace`, as scores of layers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from lm.anatomy import Kind
from tracing.causal_tracing import trace
from tracing.corruption.noise import Corruption, GaussianNoise
from tracing.effects.interaction import interaction
from tracing.effects.layer_scores import LayerScores
from tracing.effects.roles import SUBJECT_ROLES, check_reached
from tracing.localizers.base import Localization, Localizer
from tracing.question.metrics import MetricName
from tracing.question.sweep import Positions, Sweep
from tracing.settings import TraceSettings


@dataclass(frozen=True, kw_only=True)
class CausalTracing(Localizer):
    """Restore one activation in a corrupted run and see what comes back: `tracing.trace`.

    With windows, single layers are traced too, and what the windows bring back beyond the sum of their layers stands in
    `LayerScores.details` as `interaction` (`tracing.interaction`).
    """

    corruption: Corruption = field(default_factory=GaussianNoise)
    """How the subject is made unreadable."""
    kinds: tuple[Kind, ...] = ("mlp", "attn")
    """What is restored."""
    window: int = 1
    """How many layers of mlp and attn are restored together."""
    metric: MetricName = "log_probability"
    """What is read off."""
    positions: Positions = "subject_and_last"
    """Which prompt tokens are restored."""
    roles: tuple[str, ...] = SUBJECT_ROLES
    """The token roles whose effects count."""

    def __post_init__(self) -> None:
        Sweep(kinds=self.kinds, window=self.window, metric=self.metric, positions=self.positions)
        check_reached(self.roles, self.positions)

    @property
    def scored(self) -> tuple[Kind, ...]:
        return self.kinds

    def locate(self, task: Localization) -> LayerScores:
        every, only = task.among(self.metric)
        settings = TraceSettings(
            corruption=self.corruption,
            kinds=self.kinds,
            window=self.window,
            metric=self.metric,
            prompt=task.prompt,
            positions=self.positions,
            only=only,
            cache=task.cache,
            progress=task.progress,
        )
        effects = trace(task.model, every, settings)
        scores = effects.scores(self.roles)
        if self.window == 1 or set(self.kinds) == {"resid"}:
            return scores
        single = trace(task.model, every, replace(settings, window=1))
        beyond = interaction(effects, single).to_json(self.roles)
        return replace(scores, details={**scores.details, "interaction": beyond})
