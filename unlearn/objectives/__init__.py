"""The objectives, one file a family. A new one is a dataclass and its terms here; nothing else changes."""

from unlearn.objectives.ascent import GradientAscent, GradientDifference, KLMinimisation
from unlearn.objectives.base import Objective, RetainMemory, Term, TokenStats
from unlearn.objectives.joint import Joint
from unlearn.objectives.learn import Learn
from unlearn.objectives.preference import NPO

__all__ = [
    "NPO",
    "GradientAscent",
    "GradientDifference",
    "Joint",
    "KLMinimisation",
    "Learn",
    "Objective",
    "RetainMemory",
    "Term",
    "TokenStats",
]
