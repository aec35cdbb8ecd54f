"""The gradient-ascent family: baselines that push the forget cross-entropy up, alone, or with a fixed retain term."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from unlearn.objectives.base import Objective, RetainMemory, Term, TokenStats, ascent
from unlearn.objectives.joint import check_cap, check_factor


@dataclass(frozen=True, kw_only=True)
class GradientAscent(Objective):
    """`L = -CE(forget)`. Source: Jang et al. 2022 (arXiv 2210.01504). Badge: **faithful** with `forget_cap: null`."""

    uses_retain: ClassVar[bool] = False

    forget_cap: float | None = None
    """Nats a token beyond which a forget token is not pushed further; null is the published form."""

    def __post_init__(self) -> None:
        check_cap(self.forget_cap)

    def forget_term(self, stats: TokenStats) -> Term:
        """`-CE`."""
        return Term(ascent(stats, self.forget_cap))


@dataclass(frozen=True, kw_only=True)
class GradientDifference(GradientAscent):
    """`L = -CE(forget) + CE(retain)`. Source: Liu et al. 2022 (arXiv 2203.12817), as in TOFU. Badge: **faithful**."""

    uses_retain: ClassVar[bool] = True

    retain_factor: float = 1.0
    """The fixed weight of the retain term."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_factor(self.retain_factor)

    def retain_weight(self, memory: RetainMemory, retain_cross_entropy: float) -> float:
        """Fixed."""
        return self.retain_factor


@dataclass(frozen=True, kw_only=True)
class KLMinimisation(GradientDifference):
    """`L = -CE(forget) + KL(original || model)(retain)`, over the whole vocabulary at each supervised token.

    Source: TOFU (arXiv 2401.06121), section on KL minimisation. Badge: **variant**: the divergence is taken on supervised
    tokens only, where TOFU's code takes all.
    """

    needs_retain_divergence: ClassVar[bool] = True

    def retain_term(self, stats: TokenStats) -> Term:
        """The divergence, summed over supervised tokens."""
        assert stats.divergence is not None
        return Term(stats.total(stats.divergence))
