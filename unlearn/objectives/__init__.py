"""The objectives, one file a family. A new one is a dataclass and its terms here; nothing else changes."""

from unlearn.objectives.ascent import GradientAscent, GradientDifference, KLMinimisation
from unlearn.objectives.base import (
    HiddenNeed,
    Needs,
    Objective,
    Retain,
    RetainMemory,
    Statistic,
    Term,
    TokenStats,
    Weight,
)
from unlearn.objectives.joint import Joint
from unlearn.objectives.learn import Learn
from unlearn.objectives.loss import Loss
from unlearn.objectives.preference import NPO
from unlearn.objectives.retain import AsPublished, CrossEntropy, Divergence, HiddenDistance, NoRetain
from unlearn.objectives.weight import Adaptive, AsPublishedWeight, Dual, Fixed

__all__ = [
    "NPO",
    "Adaptive",
    "AsPublished",
    "AsPublishedWeight",
    "CrossEntropy",
    "Divergence",
    "Dual",
    "Fixed",
    "GradientAscent",
    "GradientDifference",
    "HiddenDistance",
    "HiddenNeed",
    "Joint",
    "KLMinimisation",
    "Learn",
    "Loss",
    "Needs",
    "NoRetain",
    "Objective",
    "Retain",
    "RetainMemory",
    "Statistic",
    "Term",
    "TokenStats",
    "Weight",
]
