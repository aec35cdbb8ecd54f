"""`Localizer`: one face for every way to say where facts are stored, and causal tracing behind it.

A localizer is given a model, facts that it knows, and perhaps facts that must stay; it gives `LayerScores`. None of them is
the truth: they are compared (`tracing.agreement`), combined (`tracing.combine`), and checked by training (`LayerPlan.controls`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from lm.anatomy import Kind
from lm.model import LanguageModel, fingerprint
from lm.prompts import PromptSpec
from tracing.causal_tracing import trace
from tracing.corruption.noise import Corruption, GaussianNoise
from tracing.effects.effects import Effects
from tracing.effects.interaction import interaction
from tracing.effects.layer_scores import LayerScores
from tracing.effects.roles import SUBJECT_ROLES, check_reached
from tracing.question.facts import Fact, with_foils
from tracing.question.metrics import Metric
from tracing.question.sweep import Positions, Sweep


@dataclass(frozen=True, kw_only=True)
class Localizer(ABC):
    """The axis: a way to localize."""

    config_axis: ClassVar[bool] = True

    @property
    @abstractmethod
    def scored(self) -> tuple[Kind, ...]:
        """The kinds that it scores."""

    @property
    def needs_retain(self) -> bool:
        """Whether it cannot do without facts that must stay."""
        return False

    @abstractmethod
    def localize(
        self,
        model: LanguageModel,
        facts: Sequence[Fact],
        *,
        retain: Sequence[Fact] = (),
        others: Sequence[Fact] = (),
        prompt: PromptSpec = PromptSpec(),  # noqa: B008 (frozen)
        cache: str | Path | None = None,
        progress: bool = True,
    ) -> LayerScores:
        """Score every layer for every fact.

        Args:
            model: from `lm.load`; put in eval mode meanwhile, its gradients untouched.
            facts: what to locate; facts that the model does not know may be left out.
            retain: facts that must stay, for the localizers that compare with them.
            others: facts that are not located but belong to the corruption: their subjects may be put in place of those of
                `facts`, and the noise is measured on them too. With others, `facts` are taken as known.
            prompt: how questions are rendered: as they are trained.
            cache: a folder where a localizer may keep finished facts.
            progress: show facts done, rate and time left.

        Raises:
            UserError: nothing to do, NaN, a setting or facts that it cannot work with.
        """


def among(
    facts: Sequence[Fact], others: Sequence[Fact], metric: Metric
) -> tuple[Sequence[Fact], Sequence[Fact] | None]:
    """`facts` before the others, and which of all are asked for (None: all), both with foils where the metric needs them."""
    if not others:
        return facts, None
    own = set(facts)
    every = [*facts, *(fact for fact in others if fact not in own)]
    if metric == "logit_difference":
        every = with_foils(every)
    return every, every[: len(facts)]


def made_with(model: LanguageModel, localizer: Localizer, prompt: PromptSpec) -> dict[str, Any]:
    """The provenance of scores: model, weights, settings."""
    return {
        "model": model.name,
        "architecture": model.anatomy.architecture,
        "weights": fingerprint(model),
        "localizer": {"kind": type(localizer).__name__, **asdict(localizer)},
        "prompt": asdict(prompt),
    }


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
    metric: Metric = "log_probability"
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

    def localize(
        self,
        model: LanguageModel,
        facts: Sequence[Fact],
        *,
        retain: Sequence[Fact] = (),
        others: Sequence[Fact] = (),
        prompt: PromptSpec = PromptSpec(),  # noqa: B008 (frozen)
        cache: str | Path | None = None,
        progress: bool = True,
    ) -> LayerScores:
        every, only = among(facts, others, self.metric)

        def traced(window: int) -> Effects:
            return trace(
                model,
                every,
                self.corruption,
                kinds=self.kinds,
                window=window,
                metric=self.metric,
                prompt=prompt,
                positions=self.positions,
                only=only,
                cache=cache,
                progress=progress,
            )

        effects = traced(self.window)
        scores = effects.scores(self.roles)
        if self.window == 1 or set(self.kinds) == {"resid"}:
            return scores
        beyond = interaction(effects, traced(1)).to_json(self.roles)
        return replace(scores, details={**scores.details, "interaction": beyond})
