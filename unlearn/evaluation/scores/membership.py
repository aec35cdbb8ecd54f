"""Membership inference by loss, as in SemEval-2025 Task 4: the area under the curve, and the score made of it. Badge: faithful.

The arithmetic is `unlearn.evaluation.membership`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from unlearn.evaluation import membership
from unlearn.evaluation.scores.base import Direction, Need, Score, Statistics, Towards


@dataclass(frozen=True)
class MembershipAuc(Score):
    """How well losses tell what the model was trained on from what it never saw."""

    name = "mia_auc"
    title = "MIA AUC"
    meaning = (
        "How well losses tell documents of the forget set from documents never seen. 0.5: not at all (best). "
        "Near 1: still recognized. Near 0: conspicuous for their high loss."
    )

    @property
    def direction(self) -> Direction:
        """One half: losses tell nothing."""
        return Towards(0.5)

    @property
    def needs(self) -> tuple[Need, ...]:
        """The losses of both kinds of document."""
        return ("losses",)

    def value(self, statistics: Statistics) -> float | None:
        """See `membership.auc`."""
        assert statistics.losses is not None
        return membership.auc(statistics.losses.members, statistics.losses.nonmembers)

    def per_example(self, statistics: Statistics) -> Mapping[str, float]:
        """For each member, by its place, the share of non-members with a higher loss (ties one half); their mean is the AUC."""
        assert statistics.losses is not None
        members, others = statistics.losses.members, statistics.losses.nonmembers
        return {f"member {index}": membership.auc([loss], others) for index, loss in enumerate(members)}


@dataclass(frozen=True)
class MembershipScore(Score):
    """The official score of the area."""

    name = "mia_score"
    title = "MIA score"
    meaning = "1 − 2 |AUC − 0.5|: 1 is best, 0 is worst."

    @property
    def parts(self) -> tuple[Score, ...]:
        """The area."""
        return (MembershipAuc(),)

    def value(self, statistics: Statistics) -> float | None:
        """See `membership.score`."""
        auc = statistics.of(MembershipAuc())
        return None if auc is None else membership.score(auc)
