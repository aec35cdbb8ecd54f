"""The axis "perturbation": which weights are moved before the first step, how far, and towards what.

Every kind is one line, `theta <- (1 - share) theta + share * other`; the kinds differ in `other`. What was stored in a weight
goes with `(1 - share)`, and what must be kept is healed by the retain term (`Divergence`, on retain rows and general text).
Doing it to a model is `unlearn.perturbation.apply`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lm.anatomy import Anatomy, Module
from lm.errors import UserError
from lm.model import LanguageModel
from unlearn.scope.scope import ResolvedScope, Scope, Use

Also = Literal["embeddings", "head", "norms"]
Other = Callable[[str, torch.Size], Tensor]
"""(name, shape) of a parameter to what it is moved towards: whole, float32 or the model's type, on the CPU."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some of the weights, and how far they are moved.

    With neither `layers` nor `plan` nor `also` it is every weight but the norms.
    """

    share: float = 0.6
    """How far, from 0 (not at all) to 1 (nothing of the weights is left)."""
    layers: tuple[int, ...] | Literal["all", "model"] | None = None
    """Layer numbers from 0; `all` blocks; or the whole `model`, embeddings and head with it."""
    modules: tuple[Module, ...] | None = None
    """`mlp`, `attn`, or `all` of the block. Default: mlp, or what the plan says."""
    plan: str | None = None
    """A LayerPlan JSON file; replaces `layers`."""
    use: Use = "chosen"
    """The plan's chosen layers, or one of its controls."""
    also: tuple[Also, ...] = ()
    """What lies outside the blocks (`embeddings`, `head`), and `norms`: all of the model's, which are moved only where they are
    named here. With these alone no block is moved."""
    unhealed: bool = False
    """Of embeddings and head, only the rows of tokens that no retain row and no general text has: nothing else touches them."""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UserError(
                f"perturbation share is {self.share}: give more than 0 and at most 1, or leave the part out"
            )
        if self.layers is not None and self.plan is not None:
            raise UserError(
                f"a part of the perturbation has layers {self.layers} and plan {self.plan}, both name layers: give one of them"
            )
        if self.plan is None and self.use != "chosen":
            raise UserError(
                f"a part of the perturbation has use {self.use!r} and no plan to take it from: give the plan's file"
            )
        named = (self.layers, self.plan, self.modules) != (None, None, None)
        if self.unhealed and (named or not {"embeddings", "head"} & {*self.also}):
            raise UserError(
                "perturbation unhealed is of rows of embeddings and head: set also to one of them or both, and leave layers, "
                "modules and plan out"
            )
        if len(set(self.also)) < len(self.also):
            raise UserError(f"perturbation also is {list(self.also)}: name each once")
        _ = self._scope  # refuses what does not go together

    @property
    def _scope(self) -> Scope | None:
        """Its blocks as a scope; None if it has none."""
        if self.layers is not None or self.plan is not None:
            return Scope(layers=self.layers, modules=self.modules, plan=self.plan, use=self.use)
        if self.modules is not None:
            return Scope(layers="all", modules=self.modules)
        return None if self.also else Scope(layers="model")

    def resolve(self, model: LanguageModel) -> ResolvedPart:
        """Fix it for one model. Raises UserError for layers that the model does not have."""
        scope = self._scope
        return ResolvedPart(self, None if scope is None else scope.resolve(model.anatomy), norms_of(model.model))


@dataclass(frozen=True)
class ResolvedPart:
    """A part fixed for one model."""

    part: Part
    scope: ResolvedScope | None
    norms: frozenset[str]

    def contains(self, anatomy: Anatomy, name: str) -> bool:
        """Whether the parameter `name` belongs to it."""
        if not anatomy.reads_text(name):
            return False
        if name in self.norms:
            return "norms" in self.part.also
        in_blocks = self.scope is not None and self.scope.contains(anatomy, name)
        return in_blocks or place_of(anatomy, name) in self.part.also


def norms_of(model: nn.Module) -> frozenset[str]:
    """The names of the parameters of normalization layers."""
    found = set()
    for path, module in model.named_modules():
        if "norm" in type(module).__name__.lower():
            found |= {f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)}
    return frozenset(found)


def place_of(anatomy: Anatomy, name: str) -> str:
    """Where a parameter is, for a person: `layer 3`, `embeddings`, `head`, `final norm`."""
    if name.startswith(f"{anatomy.blocks}."):
        return f"layer {name.removeprefix(f'{anatomy.blocks}.').partition('.')[0]}"
    if name.startswith(f"{anatomy.norm}."):
        return "final norm"
    return "head" if name.startswith(f"{anatomy.head}.") else "embeddings"


@dataclass(frozen=True, kw_only=True)
class Perturbation:
    """What is done to the weights before the first step.

    The axis "perturbation".
    """

    config_axis: ClassVar[bool] = True

    parts: tuple[Part, ...] = (Part(),)
    """Which weights, and how far; a weight belongs to the first part that holds it."""
    seed: int | None = None
    """Of what is drawn; null takes the trainer's."""

    def __post_init__(self) -> None:
        if not self.parts and type(self) is not NoPerturbation:
            raise UserError(
                "perturbation.parts is empty, so nothing would be moved: name a part, or take NoPerturbation"
            )
        if self.seed is not None and self.seed < 0:
            raise UserError(f"perturbation.seed is {self.seed}: give 0 or more")

    def other(self, model: LanguageModel, seed: int) -> Other:
        """What the weights of `model` are moved towards, the same on every process."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class NoPerturbation(Perturbation):
    """The weights stay as they are."""

    parts: tuple[Part, ...] = ()
    """Nothing."""
