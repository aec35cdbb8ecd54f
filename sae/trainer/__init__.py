"""Training sparse autoencoders: several at several sites from one stream of activations, on one process or a mesh.

`train_on_stream` is the loop (activations in, `Trained` autoencoders out), `run_train_sae` the stage from a config to files. The
maths is `sae`'s; nothing here chooses matches or defines a loss.
"""

from sae.activations import NoSource
from sae.trainer.config import (
    AutoencoderSpec,
    AuxiliarySpec,
    TrainerConfig,
    TrainSaeConfig,
    ZipfSpec,
    crossed,
    named,
)
from sae.trainer.evaluation import evaluate
from sae.trainer.loop import train_on_stream
from sae.trainer.results import Trained
from sae.trainer.stage import run_train_sae
from sae.trainer.training_sae import Recipe, TrainingSae

__all__ = [
    "AutoencoderSpec",
    "AuxiliarySpec",
    "NoSource",
    "Recipe",
    "TrainSaeConfig",
    "Trained",
    "TrainerConfig",
    "TrainingSae",
    "ZipfSpec",
    "crossed",
    "evaluate",
    "named",
    "run_train_sae",
    "train_on_stream",
]
