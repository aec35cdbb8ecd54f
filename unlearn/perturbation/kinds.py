"""The kinds of perturbation: towards noise, towards another checkpoint, towards the architecture's own initialization."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lm.errors import UserError
from lm.loading import load
from lm.model import LanguageModel
from unlearn.perturbation.base import Other, Part, Perturbation


@dataclass(frozen=True, kw_only=True)
class Noise(Perturbation):
    """`theta <- (1 - share) theta + share * scale * eps`, eps standard normal: shrink and perturb.

    Source: Ash & Adams 2020 (arXiv 1910.08475), the operation; Lee et al. 2025 (UNDO, arXiv 2506.06278), to make unlearning
    robust. Badge: **variant**: UNDO unlearns in a copy first and distills that, where here the untouched model is the teacher.
    """

    scale: float | None = None
    """Standard deviation of the noise; null takes the model's own `initializer_range`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale is not None and not 0 <= self.scale < math.inf:
            raise UserError(f"perturbation.scale is {self.scale}: give 0 (shrink alone) or more")

    def other(self, model: LanguageModel, seed: int) -> Other:
        """Noise, drawn in float32 on the CPU, each tensor by its own name."""
        scale = self.scale
        if scale is None:
            scale = getattr(model.config, "initializer_range", None)
            if scale is None:
                raise UserError(f"{model.name} has no initializer_range: set perturbation.scale (0.02 is usual)")

        def noise(name: str, shape: torch.Size) -> Tensor:
            return scale * torch.randn(shape, generator=generator_of(seed, name))

        return noise


@dataclass(frozen=True, kw_only=True)
class TowardsCheckpoint(Perturbation):
    """`theta <- (1 - share) theta + share * theta_other`: back towards a model that had not yet learned it.

    With `share` 1 training starts from that checkpoint. Badge: **reconstruction**; nothing was found that publishes it.
    """

    path: str
    """The other model, of the same shape: a folder or a hub id, such as the public model that was fine-tuned."""
    revision: str | None = None
    """A commit, branch or tag of a hub id."""

    def other(self, model: LanguageModel, seed: int) -> Other:
        """The other model's weights."""
        dtype = str(model.model.dtype).removeprefix("torch.")
        loaded = load(self.path, device="cpu", dtype=dtype, revision=self.revision)  # type: ignore[arg-type]
        weights = dict(loaded.model.named_parameters())

        def weight(name: str, shape: torch.Size) -> Tensor:
            if name not in weights or weights[name].shape != shape:
                has = "has none" if name not in weights else f"has one of shape {list(weights[name].shape)}"
                raise UserError(
                    f"perturbation.path is {self.path}, which {has} where {model.name} has {name} of shape {list(shape)}: "
                    "give the checkpoint that this model was trained from"
                )
            return weights[name].detach()

        return weight


@dataclass(frozen=True, kw_only=True)
class Reinitialize(Perturbation):
    """`theta <- (1 - share) theta + share * theta_new`, theta_new as the architecture initializes itself.

    Badge: **reconstruction**.
    """

    parts: tuple[Part, ...] = (Part(share=1.0),)
    """Which weights, and how far; a weight belongs to the first part that holds it."""

    def other(self, model: LanguageModel, seed: int) -> Other:
        """The weights of a new model of this config, made whole on the CPU in float32, so that nothing depends on the parts."""
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(seed)
            fresh = type(model.model)(model.model.config)
        weights = dict(fresh.named_parameters())
        return lambda name, shape: weights[name].detach()


def generator_of(seed: int, name: str) -> torch.Generator:
    """A generator on the CPU for one tensor: of a seed and a name alone, so that no order and no sharding matters."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
