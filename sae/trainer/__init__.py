"""Training sparse autoencoders: several at several sites from one stream of activations, on one process or a mesh.

`train` is the loop (activations in, `Trained` autoencoders out), `run_train_sae` the stage from a config to files. The
maths is `sae`'s; nothing here chooses matches or defines a loss.
"""

from sae.trainer.config import (
    AutoencoderSpec,
    AuxiliarySpec,
    NoSource,
    TrainerConfig,
    TrainSaeConfig,
    ZipfSpec,
    crossed,
    named,
)
from sae.trainer.evaluation import evaluate
from sae.trainer.exporting import Trained
from sae.trainer.loop import train
from sae.trainer.stage import run_train_sae
from sae.trainer.training_sae import Member, Recipe

__all__ = [
    "AutoencoderSpec",
    "AuxiliarySpec",
    "Member",
    "NoSource",
    "Recipe",
    "TrainSaeConfig",
    "Trained",
    "TrainerConfig",
    "ZipfSpec",
    "crossed",
    "evaluate",
    "named",
    "run_train_sae",
    "train",
]
