"""What tracing found: `Effects`, the cells of all facts with what they say in a line, in sentences, as a table and by layer.

The numbers are `tracing.effects.cells`. Nothing is chosen here (`tracing.plan.choose`) and nothing is drawn
(`tracing.plots.pictures`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from lm.anatomy import Kind
from lm.errors import UserError
from tracing.arrays import Array
from tracing.bootstrap import mean_over_facts
from tracing.effects.cells import Cells
from tracing.effects.dataframe import dataframe
from tracing.effects.layer_scores import LayerScores
from tracing.effects.roles import SUBJECT_ROLES, Aggregation
from tracing.effects.summary import brought_back, sentences

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Effects(Cells):
    """What `tracing.trace` found of some facts; its arrays and their shapes: see `tracing.effects.cells.Cells`."""

    also: Mapping[str, Effects] = field(default_factory=dict)

    def __repr__(self) -> str:
        how = "other names" if self.sigma is None else f"noise σ {self.sigma:.3g}"
        window = f", windows of {self.window}" if self.window > 1 else ""
        left = f", {len(self.skipped)} left out" if self.skipped else ""
        traced = f"{', '.join(self.kinds)} of {self.layers} layers{window}"
        what = "nothing"
        if len(self.facts):
            what = f"mean total effect {self.total.mean():.3g}, {brought_back(self)}"
        also = f"; also {', '.join(self.also)}" if self.also else ""
        return f"Effects({len(self.facts)} facts{left}; {traced}; {self.metric}, {how}; {what}{also})"

    def scores(self, roles: Sequence[str] = SUBJECT_ROLES, aggregation: Aggregation = "fixed") -> LayerScores:
        """For each fact, kind and layer the mean indirect effect over the `roles` that the fact has, each over its tokens.

        Raises UserError for roles that no fact has.
        """
        values: dict[Kind, Array] = {}
        for kind in self.kinds:
            by_role = self.by_role(kind, roles, aggregation)
            values[kind] = np.stack([mean_over_facts(of_fact) for of_fact in by_role])
            if np.isnan(values[kind]).all():
                raise UserError(
                    f"no fact has traced tokens in the roles {', '.join(roles)}: choose other roles or positions"
                )
        corruption = dict(self.provenance.get("corruption", {})).get(
            "kind", "other names" if self.sigma is None else "noise"
        )
        windows = f", windows of {self.window}" if self.window > 1 else ""
        return LayerScores(
            source=f"causal tracing ({corruption}{windows})",
            unit=f"indirect effect ({self.metric}) at the {', '.join(roles)}",
            facts=self.facts,
            values=values,
            total=self.total,
            details={
                "metric": self.metric,
                "window": self.window,
                "sigma": self.sigma,
                "roles": list(roles),
                "aggregation": aggregation,
                "left_out": {skip.fact.label: skip.why for skip in self.skipped},
            },
            provenance=self.provenance,
        )

    def to_dataframe(self) -> pandas.DataFrame:
        """One row a cell, with every number that belongs to it: see `tracing.effects.dataframe`."""
        return dataframe(self)

    def summary(self, *, confidence: float = 0.95, seed: int = 0) -> str:
        """What was found, in a few sentences: what the corruption took, and what brings most back; see
        `tracing.effects.summary`."""
        return "\n".join(sentences(self, confidence=confidence, seed=seed))
