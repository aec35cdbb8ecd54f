"""`Localizer`: one face for every way to say where facts are stored, and `Localization`, what it is asked.

A localizer is given a model, facts that it knows, and perhaps facts that must stay; it gives `LayerScores`. None of them is
the truth: they are compared (`tracing.agreement`), combined (`tracing.combine`), and checked by training (`LayerPlan.controls`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from lm.anatomy import Kind
from lm.model import LanguageModel, fingerprint
from lm.prompts import PromptSpec
from tracing.effects.layer_scores import LayerScores
from tracing.question.facts import Fact, with_foils
from tracing.question.metrics import MetricName, metric_of


@dataclass(frozen=True, kw_only=True, eq=False)
class Localization:
    """What a localizer is asked: of which model, and of which facts.

    Attributes:
        model: from `lm.load`; put in eval mode meanwhile, its gradients untouched.
        facts: what to locate; facts that the model does not know may be left out.
        retain: facts that must stay, for the localizers that compare with them.
        others: facts that are not located but belong to the corruption: their subjects may be put in place of those of `facts`,
            and the noise is measured on them too. With others, `facts` are taken as known.
        prompt: how questions are rendered: as they are trained.
        cache: a folder where a localizer may keep finished facts.
        progress: show facts done, rate and time left.
    """

    model: LanguageModel
    facts: Sequence[Fact]
    retain: Sequence[Fact] = ()
    others: Sequence[Fact] = ()
    prompt: PromptSpec = field(default_factory=PromptSpec)
    cache: str | Path | None = None
    progress: bool = True

    def among(self, metric: MetricName) -> tuple[Sequence[Fact], Sequence[Fact] | None]:
        """`facts` before the others, and which of all are asked for (None: all), both with foils where the metric needs them."""
        if not self.others:
            return self.facts, None
        own = set(self.facts)
        every = [*self.facts, *(fact for fact in self.others if fact not in own)]
        if metric_of(metric).needs_foil:
            every = with_foils(every)
        return every, every[: len(self.facts)]


@dataclass(frozen=True, kw_only=True)
class Localizer(ABC):
    """A way to localize: an axis. To add one, write `scored` and `locate`."""

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
    def locate(self, task: Localization) -> LayerScores:
        """Score every layer for every fact.

        Raises:
            UserError: nothing to do, NaN, a setting or facts that it cannot work with.
        """

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
        """`locate` by keywords: see `Localization` for what each of them is."""
        return self.locate(
            Localization(
                model=model,
                facts=facts,
                retain=retain,
                others=others,
                prompt=prompt,
                cache=cache,
                progress=progress,
            )
        )


def made_with(model: LanguageModel, localizer: Localizer, prompt: PromptSpec) -> dict[str, Any]:
    """The provenance of scores: model, weights, settings."""
    return {
        "model": model.name,
        "architecture": model.anatomy.architecture,
        "weights": fingerprint(model),
        "localizer": {"kind": type(localizer).__name__, **asdict(localizer)},
        "prompt": asdict(prompt),
    }
