"""The objectives, one file a family. A new one is a dataclass and its terms here; nothing else changes."""

from unlearn.objectives.alternate import FLAT, LearnAlternate
from unlearn.objectives.ascent import GradientAscent, GradientDifference, KLMinimization
from unlearn.objectives.base import (
    Calibrated,
    HiddenNeed,
    Needs,
    Objective,
    Retain,
    RetainMemory,
    RowTargets,
    Statistic,
    Term,
    TokenStats,
    Weight,
)
from unlearn.objectives.distillation import CEU, PDU, UNDIAL
from unlearn.objectives.finetune import Learn, NoForget
from unlearn.objectives.joint import Joint
from unlearn.objectives.loss import Loss
from unlearn.objectives.preference import DPO, NPO, SimNPO
from unlearn.objectives.retain import AsPublished, Blend, CrossEntropy, Divergence, HiddenDistance, NoRetain
from unlearn.objectives.reweighted import WGA, GeneralizedCrossEntropy, SatImp
from unlearn.objectives.rmu import RMU, AdaptiveRMU
from unlearn.objectives.unseen import LookUnseen
from unlearn.objectives.weight import Adaptive, AsPublishedWeight, Dual, Fixed

__all__ = [
    "CEU",
    "DPO",
    "FLAT",
    "NPO",
    "PDU",
    "RMU",
    "UNDIAL",
    "WGA",
    "Adaptive",
    "AdaptiveRMU",
    "AsPublished",
    "AsPublishedWeight",
    "Blend",
    "Calibrated",
    "CrossEntropy",
    "Divergence",
    "Dual",
    "Fixed",
    "GeneralizedCrossEntropy",
    "GradientAscent",
    "GradientDifference",
    "HiddenDistance",
    "HiddenNeed",
    "Joint",
    "KLMinimization",
    "Learn",
    "LearnAlternate",
    "LookUnseen",
    "Loss",
    "Needs",
    "NoForget",
    "NoRetain",
    "Objective",
    "Retain",
    "RetainMemory",
    "RowTargets",
    "SatImp",
    "SimNPO",
    "Statistic",
    "Term",
    "TokenStats",
    "Weight",
]
