"""What is minimized: an objective on the forget rows, a retain term on the others, and the weight between them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from unlearn.objectives.base import Needs, Objective, Retain, Weight
from unlearn.objectives.retain import AsPublished, NoRetain
from unlearn.objectives.weight import AsPublishedWeight


@dataclass(frozen=True)
class Loss:
    """`forget_term + weight * retain_term`: any objective with any retain term and any weight."""

    objective: Objective
    retain: Retain
    weight: Weight

    @classmethod
    def of(
        cls,
        objective: Objective,
        retain: Retain = AsPublished(),  # noqa: B008 (frozen)
        weight: Weight = AsPublishedWeight(),  # noqa: B008 (frozen)
    ) -> Loss:
        """With the objective's published retain term and weight where none is given."""
        return cls(
            objective=objective,
            retain=objective.published_retain if isinstance(retain, AsPublished) else retain,
            weight=objective.published_weight if isinstance(weight, AsPublishedWeight) else weight,
        )

    @property
    def uses_retain(self) -> bool:
        """Whether retain rows are drawn at all."""
        return not isinstance(self.retain, NoRetain)

    @property
    def forget_needs(self) -> Needs:
        """What the forget term reads."""
        return self.objective.forget_needs()

    @property
    def retain_needs(self) -> Needs:
        """What the retain term and its weight read."""
        needs = self.retain.needs()
        return replace(needs, logprob=True) if self.weight.needs_cross_entropy else needs

    @property
    def needs_original(self) -> bool:
        """Whether anything of the original model is wanted, on either side."""
        return self.forget_needs.reference or (self.uses_retain and self.retain_needs.reference)
