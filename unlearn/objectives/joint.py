"""The joint objective of the constrained-unlearning paper: forget up, retain held down by an adaptive weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from unlearn.objectives.ascent import GradientAscent
from unlearn.objectives.base import Retain, Weight
from unlearn.objectives.retain import CrossEntropy
from unlearn.objectives.weight import Adaptive


@dataclass(frozen=True, kw_only=True)
class Joint(GradientAscent):
    """`L = -CE(forget) + alpha * CE(retain)`, alpha from `Adaptive`.

    Source: Selective Amnesia (arXiv 2504.12996). Badge: **faithful** in the presets `paper`, `april_code` and `january_code`;
    the default is a **variant**: see `Adaptive`, and a cap on the forget term.
    """

    published_retain: ClassVar[Retain] = CrossEntropy()
    published_weight: ClassVar[Weight] = Adaptive()

    forget_cap: float | None = 8.0
    """Nats a token beyond which a forget token is not pushed further; null is the published, unbounded form."""
