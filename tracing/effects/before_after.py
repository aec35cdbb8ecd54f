"""What changed between two traces of the same facts, before and after unlearning, with intervals. Nothing is traced here.

Facts are compared with themselves: differences are taken fact by fact, and whole groups of facts are resampled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from lm.anatomy import Kind
from lm.errors import UserError
from tracing.arrays import Array
from tracing.bootstrap import bootstrap, check_confidence, mean_over_facts
from tracing.effects.effects import Effects
from tracing.effects.roles import ROLES, Aggregation
from tracing.effects.summary import named, peak
from tracing.effects.table import EffectTable


@dataclass(frozen=True, kw_only=True)
class ScoreChange:
    """A mean score over facts before and after, and the mean of after minus before with its interval."""

    before: float
    after: float
    change: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Difference:
    """After minus before.

    Attributes:
        clean, corrupted: how the scores of the intact and of the corrupted prompt changed.
        before, after: kind -> mean indirect effects by token role and layer.
        change: kind -> the mean over facts of after minus before of these, with its intervals, without shares.
    """

    metric: str
    confidence: float
    facts: int
    clean: ScoreChange
    corrupted: ScoreChange
    before: Mapping[Kind, EffectTable]
    after: Mapping[Kind, EffectTable]
    change: Mapping[Kind, EffectTable]

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds that were traced both times."""
        return tuple(self.change)

    def strongest(self, kind: Kind) -> tuple[str, int, ScoreChange]:
        """The token role and layer with the largest effect before (`tracing.effects.summary.peak`), and what became of it."""
        table = self.before[kind]
        place = peak(kind, table.roles, np.where(np.isnan(self.after[kind].mean), np.nan, table.mean))
        assert place is not None  # both tables have numbers
        row, layer = place
        change = self.change[kind]
        values = (table.mean, self.after[kind].mean, change.mean, change.low, change.high)
        before, after, by, low, high = (float(one[row, layer]) for one in values)
        return table.roles[row], layer, ScoreChange(before=before, after=after, change=by, low=low, high=high)

    def sentence(self, kind: Kind) -> str:
        """What the numbers say of the answer, and of the cell of `kind` that brought most back before."""
        role, layer, cell = self.strongest(kind)
        table = self.before[kind]
        place = named(table, table.roles.index(role), layer)
        return (
            f"On {self.facts} fact{'s' if self.facts != 1 else ''} the answer's mean {self.metric.replace('_', ' ')} "
            f"{self._went(self.clean)}, and what putting back {place} brings, most of all before, {self._went(cell)}."
        )

    def _went(self, score: ScoreChange) -> str:
        verb = "fell" if score.high < 0 else "rose" if score.low > 0 else "did not change beyond chance:"
        verb = "went (of one group of facts, so that chance cannot be told)" if score.low != score.low else verb
        spread = (
            f", {self.confidence:.0%} interval {score.low:.3g} to {score.high:.3g}" if score.low == score.low else ""
        )
        return f"{verb} from {score.before:.3g} to {score.after:.3g} (a change of {score.change:.3g}{spread})"

    def to_json(self) -> dict[str, Any]:
        """Scores and the strongest cells as plain data, None for an interval that there is not; the tables are written by
        `tracing.stages.trace.stage`."""
        cells = {kind: self.strongest(kind) for kind in self.kinds}

        def plain(score: ScoreChange) -> dict[str, float | None]:
            return {name: None if np.isnan(value) else value for name, value in asdict(score).items()}

        return {
            "metric": self.metric,
            "confidence": self.confidence,
            "facts": self.facts,
            "clean": plain(self.clean),
            "corrupted": plain(self.corrupted),
            "strongest_before": {
                kind: {"role": role, "layer": layer, **plain(found)} for kind, (role, layer, found) in cells.items()
            },
        }


def difference(
    before: Effects,
    after: Effects,
    *,
    roles: Sequence[str] = ROLES,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    aggregation: Aggregation = "fixed",
) -> Difference:
    """Compare two traces of the same facts, such as `tracing.retracing.retrace` makes.

    Raises:
        UserError: other facts, metrics, windows or layers, or no kind that both have.
    """
    check_confidence(confidence)
    same = [(fact.prompt, fact.subject) for fact in before.facts] == [
        (fact.prompt, fact.subject) for fact in after.facts
    ]
    if not same:
        raise UserError(
            f"the traces of before and after hold other facts ({len(before.facts)} and {len(after.facts)}): retrace"
        )
    for name in ("metric", "window", "layers"):
        one, other = getattr(before, name), getattr(after, name)
        if one != other:
            raise UserError(f"the traces of before and after have the {name} {one} and {other}: compare alike ones")
    kinds = [kind for kind in before.kinds if kind in after.kinds]
    if not kinds:
        raise UserError(
            f"before traced {', '.join(before.kinds)} and after {', '.join(after.kinds)}: no kind is in both"
        )
    groups = [fact.group for fact in before.facts]

    def spread(gaps: Array) -> tuple[Array, Array]:
        return bootstrap(gaps, groups, confidence=confidence, resamples=resamples, seed=seed)

    def scores(one: Array, other: Array) -> ScoreChange:
        gap = other - one
        low, high = spread(gap)
        return ScoreChange(
            before=float(one.mean()),
            after=float(other.mean()),
            change=float(gap.mean()),
            low=float(low),
            high=float(high),
        )

    def tables(effects: Effects) -> dict[Kind, EffectTable]:
        return {
            kind: effects.table(
                kind, roles=roles, confidence=confidence, resamples=resamples, seed=seed, aggregation=aggregation
            )
            for kind in kinds
        }

    old, new = tables(before), tables(after)
    changed: dict[Kind, EffectTable] = {}
    for kind in kinds:
        gaps = after.by_role(kind, roles, aggregation) - before.by_role(kind, roles, aggregation)
        low, high = spread(gaps)
        none = np.full_like(low, np.nan)  # a change is a share of neither total
        changed[kind] = replace(
            old[kind], mean=mean_over_facts(gaps), low=low, high=high, share=none, share_low=none, share_high=none
        )
    return Difference(
        metric=before.metric,
        confidence=confidence,
        facts=len(before.facts),
        clean=scores(before.clean, after.clean),
        corrupted=scores(before.corrupted, after.corrupted),
        before=old,
        after=new,
        change=changed,
    )
