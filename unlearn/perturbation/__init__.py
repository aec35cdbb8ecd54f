"""What is done to the weights before the first step: noise, a step towards another checkpoint, a new initialization."""

from unlearn.perturbation.apply import Moved, check_perturbation, perturb
from unlearn.perturbation.base import NoPerturbation, Part, Perturbation
from unlearn.perturbation.kinds import Noise, Reinitialize, TowardsCheckpoint

__all__ = [
    "Moved",
    "NoPerturbation",
    "Noise",
    "Part",
    "Perturbation",
    "Reinitialize",
    "TowardsCheckpoint",
    "check_perturbation",
    "perturb",
]
