"""KL minimisation: ascent on the forget rows while the model's distribution on the retain rows stays the original one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from unlearn.objectives.base import Objective, RetainMemory, Term, TokenStats, ascent
from unlearn.objectives.joint import check_cap


@dataclass(frozen=True, kw_only=True)
class KLMinimisation(Objective):
    """`L = -CE(forget) + KL(original || model)(retain)`, over the whole vocabulary at each supervised token.

    Source: TOFU (arXiv 2401.06121), section on KL minimisation. Badge: **variant**: the divergence is taken on supervised
    tokens only, where TOFU's code takes all.
    """

    needs_retain_divergence: ClassVar[bool] = True

    retain_factor: float = 1.0
    """The fixed weight of the divergence."""
    forget_cap: float | None = None
    """Nats a token beyond which a forget token is not pushed further; null is the published form."""

    def __post_init__(self) -> None:
        check_cap(self.forget_cap)

    def forget_term(self, stats: TokenStats) -> Term:
        """`-CE`."""
        return Term(ascent(stats, self.forget_cap))

    def retain_term(self, stats: TokenStats) -> Term:
        """The divergence, summed over supervised tokens."""
        assert stats.divergence is not None
        return Term(stats.total(stats.divergence))

    def retain_weight(self, memory: RetainMemory, retain_cross_entropy: float) -> float:
        """Fixed."""
        return self.retain_factor
