"""Small training recipes and autoencoders, as the tests of the trainer share them."""

from __future__ import annotations

from typing import Any

import torch

from sae.trainer import (
    AutoencoderSpec,
    AuxiliarySpec,
    Recipe,
    Trained,
    TrainerConfig,
    ZipfSpec,
)

FEATURES, K, BATCH = 24, 3, 32


def recipe(*, auxiliary: dict[str, Any] | None = None, zipf: dict[str, Any] | None = None, **trainer: Any) -> Recipe:
    small = {
        "steps": 20,
        "batch_tokens": BATCH,
        "warmup": 2,
        "start_tokens": 64,
        "calibrate_tokens": 64,
        "backend": "cpu",
    }
    return Recipe(
        trainer=TrainerConfig(**{**small, "log_every": 5, "save_every": 7, **trainer}),
        auxiliary=AuxiliarySpec(**{"k_aux": 4, "window": 40, **(auxiliary or {})}),
        zipf=ZipfSpec(**{"fit_every": 6, "window": 200, "least_firings": 0, "measure_every": 3, **(zipf or {})}),
    )


def spec(choice: str, **settings: Any) -> AutoencoderSpec:
    return AutoencoderSpec(**{"choice": choice, "features": FEATURES, "k": K, "learning_rate": 1e-3, **settings})


ALL = (spec("token", multi_topk=True), spec("mutual"), spec("feature"))


def equal(one: Trained, other: Trained) -> None:
    for name, value in one.autoencoder.state_dict().items():
        assert torch.equal(value.nan_to_num(-1), other.autoencoder.state_dict()[name].nan_to_num(-1)), name
