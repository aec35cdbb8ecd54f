"""Attribution patching as a localizer: estimates of all cells, the largest and some random ones computed exactly, and a bound.

The estimates are `tracing.localizers.attribution`'s, the check is `tracing.localizers.verify`'s; here they become `LayerScores`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lm.anatomy import Kind
from lm.errors import UserError
from lm.model import LanguageModel
from tracing.corruption.noise import Corruption, Corruptor, GaussianNoise
from tracing.effects.effects import Effects
from tracing.effects.layer_scores import LayerScores
from tracing.effects.roles import SUBJECT_ROLES, check_roles
from tracing.known import evaluating
from tracing.localizers import query_key
from tracing.localizers.attribution import attributed, check_differentiable
from tracing.localizers.base import Localization, Localizer
from tracing.localizers.verify import Verification, verify
from tracing.question.encoded_fact import EncodedFact
from tracing.question.metrics import MetricName
from tracing.question.sweep import Sweep
from tracing.settings import TraceSettings


@dataclass(frozen=True, kw_only=True)
class AttributionPatching(Localizer):
    """Attribution of restoring, at the cost of a forward and a backward pass a fact, with its largest cells computed exactly.

    Badge: attribution itself is faithful, turned round (the clean activation is put into the corrupted run, as in our
    tracing); GradDrop and the correction of queries and keys are *reconstructions* of AtP* (`attribute_fact`,
    `tracing.localizers.query_key`). Where a cell was computed exactly (the top ones and the random ones), its exact effect stands
    in the scores instead of the estimate; with GradDrop, whose scores are sizes, its absolute value. `LayerScores.details` has
    the `verification`, with the bound on what was missed, and the layers' means as `estimated`, before any cell was verified.
    """

    corruption: Corruption = field(default_factory=GaussianNoise)
    """How the subject is made unreadable."""
    kinds: tuple[Kind, ...] = ("mlp", "attn")
    """What is restored. Gradients say little of resid: verify many."""
    metric: MetricName = "log_probability"
    """What is read off; a metric with a gradient."""
    roles: tuple[str, ...] = SUBJECT_ROLES
    """The token roles whose effects count."""
    graddrop: bool = False
    """Take the mean size over backward passes that each leave out one layer: a backward pass a layer."""
    verify: int = 16
    """How many of a fact's largest cells, of all kinds and at the tokens that count, are computed exactly."""
    chance: int = 16
    """How many random others a fact, on average, are computed exactly: what the largest ones miss is bounded from them."""
    matters: float = 0.1
    """An effect is missed if it is at least this share of the fact's total effect."""
    seed: int = 0
    """Of the random cells."""
    queries_and_keys: bool = False
    """Also attribute queries and keys, plainly and with the softmax exact: `attention_nodes.summary`, in the details."""
    memory: float = 2.0
    """Gigabytes (10^9 bytes) that may be taken beside the model, about."""

    def __post_init__(self) -> None:
        Sweep(kinds=self.kinds, metric=self.metric)
        check_differentiable(self.metric)
        check_roles(self.roles)
        for name in ("verify", "chance"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}: give how many cells a fact, 0 for none")
        for name, usual in (("matters", 0.1), ("memory", 2)):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise UserError(f"{name} is {value}: give a positive number ({usual} is usual)")

    @property
    def scored(self) -> tuple[Kind, ...]:
        return self.kinds

    def locate(self, task: Localization) -> LayerScores:
        every, only = task.among(self.metric)
        settings = TraceSettings(
            corruption=self.corruption,
            kinds=self.kinds,
            metric=self.metric,
            prompt=task.prompt,
            memory=self.memory,
            only=only,
            progress=task.progress,
        )
        with evaluating(task.model):
            effects, known, corruptor = attributed(task.model, every, settings, graddrop=self.graddrop)
            details: dict[str, Any] = {"graddrop": self.graddrop, "estimated": self._means(effects)}
            checked = self._verified(task.model, known, corruptor, effects, task.progress)
            if checked is not None:
                details["verification"] = checked.to_json()
                effects = checked.applied(effects)
                if task.progress:
                    print(f"attribution: {checked}", file=sys.stderr)
            if self.queries_and_keys:
                details["queries_and_keys"] = query_key.summary(
                    task.model, known, corruptor, self.metric, settings.bytes
                )
        scores = effects.scores(self.roles)
        what = "size of the attributed effect" if self.graddrop else "attributed indirect effect"
        how = f"attribution patching ({type(self.corruption).__name__})"
        return replace(
            scores,
            source=f"{how} with GradDrop" if self.graddrop else how,
            unit=f"{what} ({self.metric}) at the {', '.join(self.roles)}",
            details={**scores.details, **details},
        )

    def _means(self, effects: Effects) -> dict[str, list[float]]:
        """The layers' mean scores by the estimates alone."""
        scores = effects.scores(self.roles)
        return {kind: scores.mean(kind).tolist() for kind in scores.kinds}

    def _verified(
        self,
        model: LanguageModel,
        encoded_facts: Sequence[EncodedFact],
        corruptor: Corruptor,
        effects: Effects,
        show: bool,
    ) -> Verification | None:
        if not self.verify and not self.chance:
            return None
        return verify(
            model,
            encoded_facts,
            corruptor,
            effects,
            roles=self.roles,
            top=self.verify,
            chance=self.chance,
            matters=self.matters,
            seed=self.seed,
            memory=self.memory,
            signed=not self.graddrop,
            progress=show,
        )
