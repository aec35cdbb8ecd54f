"""`Localizer`: one face for every way to say where facts are stored, and causal tracing behind it.

A localiser is given a model, facts that it knows, and perhaps facts that must stay; it gives `LayerScores`. None of them is
the truth: they are compared (`tracing.agreement`), combined (`tracing.combine`), and checked by training (`LayerPlan.controls`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from lm.anatomy import Kind
from lm.load import LanguageModel
from lm.prompts import PromptSpec
from tracing.corruption import Corruption, GaussianNoise
from tracing.effects import SUBJECT_ROLES
from tracing.facts import Fact
from tracing.metrics import Metric
from tracing.scores import LayerScores
from tracing.sweep import Positions
from tracing.tracer import trace


@dataclass(frozen=True, kw_only=True)
class Localizer(ABC):
    """The axis: a way to localise."""

    config_axis: ClassVar[bool] = True

    @abstractmethod
    def localize(
        self,
        model: LanguageModel,
        facts: Sequence[Fact],
        *,
        retain: Sequence[Fact] = (),
        prompt: PromptSpec = PromptSpec(),  # noqa: B008 (frozen)
        cache: str | Path | None = None,
        progress: bool = True,
    ) -> LayerScores:
        """Score every layer for every fact.

        Args:
            model: from `lm.load`; put in eval mode meanwhile, its gradients untouched.
            facts: what to locate; facts that the model does not know may be left out.
            retain: facts that must stay, for the localisers that compare with them.
            prompt: how questions are rendered: as they are trained.
            cache: a folder where a localiser may keep finished facts.
            progress: show facts done, rate and time left.

        Raises:
            UserError: nothing to do, NaN, a setting or facts that it cannot work with.
        """


@dataclass(frozen=True, kw_only=True)
class CausalTracing(Localizer):
    """Restore one activation in a corrupted run and see what comes back: `tracing.trace`."""

    corruption: Corruption = field(default_factory=GaussianNoise)
    """How the subject is made unreadable."""
    kinds: tuple[Kind, ...] = ("mlp", "attn")
    """What is restored."""
    window: int = 1
    """How many layers of mlp and attn are restored together."""
    metric: Metric = "log_probability"
    """What is read off."""
    positions: Positions = "subject_and_last"
    """Which prompt tokens are restored."""
    roles: tuple[str, ...] = SUBJECT_ROLES
    """The token roles whose effects count."""

    def localize(
        self,
        model: LanguageModel,
        facts: Sequence[Fact],
        *,
        retain: Sequence[Fact] = (),
        prompt: PromptSpec = PromptSpec(),  # noqa: B008 (frozen)
        cache: str | Path | None = None,
        progress: bool = True,
    ) -> LayerScores:
        effects = trace(
            model,
            facts,
            self.corruption,
            kinds=self.kinds,
            window=self.window,
            metric=self.metric,
            prompt=prompt,
            positions=self.positions,
            cache=cache,
            progress=progress,
        )
        return effects.scores(self.roles)
