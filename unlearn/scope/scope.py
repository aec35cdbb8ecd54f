"""The axis "scope": which parameters may change. Everything else is frozen, and stays bit-identical.

A scope is named by layers x modules (by hand, or from a `LayerPlan` that tracing wrote, or from one of its controls).
It switches gradients on and off; it does not train. LoRA inside a scope is `unlearn.scope.lora`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, get_args

from torch import nn

from lm.anatomy import Anatomy, Module
from lm.errors import UserError
from tracing.plan.layer_plan import LayerPlan

Use = Literal["chosen", "random", "inverse", "all"]


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters on the linear layers inside the scope, merged into plain weights when saved."""

    old_keys: ClassVar[Mapping[str, str]] = {"quantise": "quantize"}

    rank: int = 8
    """Rank of the update."""
    alpha: int = 16
    """The update is scaled by alpha / rank."""
    use_dora: bool = False
    """Learn each output's length apart from its direction (DoRA, Liu et al. 2024, arXiv 2402.09353)."""
    quantize: bool = False
    """Hold the layers' linear weights in 4 bits (NF4) while training (QLoRA, Dettmers et al. 2023, arXiv 2305.14314). Needs
    bitsandbytes. The result is the dense model that was loaded with the update added: nothing else in it was quantized."""

    def __post_init__(self) -> None:
        if self.quantize and self.use_dora:
            raise UserError("lora.quantize and lora.use_dora do not go together: set one of them to false")
        if self.rank < 1:
            raise UserError(f"lora.rank is {self.rank}: give at least 1")
        if self.alpha < 1:
            raise UserError(f"lora.alpha is {self.alpha}: give at least 1, or nothing would change")


@dataclass(frozen=True, kw_only=True)
class WeightMask:
    """Of the weights inside the scope, those that matter most to the forget rows beside the retain rows.

    A weight's score is `|g w|` on the forget rows over `|g w|` on the retain rows plus its mean, g the gradient of the mean
    cross-entropy. See `unlearn.training.masks`.
    """

    share: float = 0.1
    """Which share of the scope's weights may change."""
    rows: int = 256
    """At most so many rows of each side are read to choose them."""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UserError(f"scope.mask.share is {self.share}: give a share above 0 and up to 1")
        if self.rows < 1:
            raise UserError(f"scope.mask.rows is {self.rows}: give at least 1")


@dataclass(frozen=True, kw_only=True)
class Scope:
    """Which layers x modules may change. Give `layers`, or a `plan`; the defaults are the paper's: MLPs of layers 0 to 5."""

    layers: tuple[int, ...] | Literal["all", "model"] | None = None
    """Layer numbers from 0; `all` blocks; or the whole `model` with embeddings and head. Default 0 to 5."""
    modules: tuple[Module, ...] | None = None
    """`mlp`, `attn`, or `all` (the whole block). Default: mlp, or what the plan says."""
    plan: str | None = None
    """A LayerPlan JSON file; replaces `layers`."""
    use: Use = "chosen"
    """The plan's chosen layers, or one of its controls: random layers of equal size, the inverse, all."""
    lora: Lora | None = None
    """Train low-rank adapters instead of the weights themselves."""
    mask: WeightMask | None = None
    """Train a share of the single weights inside the scope."""

    def __post_init__(self) -> None:
        if self.plan is not None and self.layers is not None:
            raise UserError("scope.layers and scope.plan both name layers: give one of them")
        if self.plan is None and self.use != "chosen":
            raise UserError(
                f"scope.use is {self.use!r} but there is no scope.plan to take it from: give the plan's file"
            )
        if self.lora is not None and self.mask is not None:
            raise UserError("scope.lora trains adapters and scope.mask chooses weights: give one of them")
        if self.layers == "model" and self.modules is not None:
            raise UserError(
                f"scope.layers is model, which is all of it, and scope.modules is {list(self.modules)}: set scope.layers to all "
                "for these modules of every block, or leave scope.modules out"
            )
        if self.layers == () or self.modules == ():
            raise UserError("scope.layers or scope.modules is empty, so nothing would be trained: name at least one")

    def resolve(self, anatomy: Anatomy) -> ResolvedScope:
        """Fix the layers for one model.

        Raises:
            UserError: a layer the model does not have, or a plan that was made for another depth.
        """
        modules: tuple[Module, ...] = self.modules or ("mlp",)
        layers: tuple[int, ...]
        if self.plan is not None:
            plan = LayerPlan.load(Path(self.plan))
            depth = plan.provenance.get("model_layers", anatomy.layers)
            if depth != anatomy.layers:
                raise UserError(
                    f"the plan {self.plan} was made for a model of {depth} layers and this one has {anatomy.layers}: trace this "
                    "model for a plan of its own"
                )
            layers = plan.layers if self.use == "chosen" else plan.control(self.use).layers
            modules = self.modules or tuple(name for name in get_args(Module) if name in plan.modules)
        elif self.layers is None:
            layers = tuple(range(min(6, anatomy.layers)))
        elif isinstance(self.layers, str):
            layers = tuple(range(anatomy.layers))
        else:
            layers = tuple(sorted(set(self.layers)))
        beyond = [layer for layer in layers if not 0 <= layer < anatomy.layers]
        if beyond:
            raise UserError(
                f"layer {beyond[0]} is not in this model, which has layers 0 to {anatomy.layers - 1}: "
                "change scope.layers, or trace this model for a plan of its own"
            )
        return ResolvedScope(layers=layers, modules=modules, whole_model=self.layers == "model", lora=self.lora)

    def doubt(self, weights: str) -> str | None:
        """What speaks against the plan for a model of these weights (`lm.model.fingerprint`): it was drawn from others."""
        drawn_from = None if self.plan is None else LayerPlan.load(Path(self.plan)).weights
        if drawn_from is None or drawn_from == weights:
            return None
        return (
            f"the plan {self.plan} was drawn from weights {drawn_from}, and these are {weights}: another model, the same trained "
            "further, or loaded in another type; where its layers may not hold here, trace this model"
        )


@dataclass(frozen=True)
class ResolvedScope:
    """A scope fixed for one model."""

    layers: tuple[int, ...]
    modules: tuple[Module, ...]
    whole_model: bool = False
    lora: Lora | None = None

    def contains(self, anatomy: Anatomy, name: str) -> bool:
        """Whether the parameter `name` may change."""
        if self.whole_model:
            return anatomy.reads_text(name)
        return any(
            name.startswith(anatomy.weight_prefix(layer, module)) for layer in self.layers for module in self.modules
        )

    def apply(self, model: nn.Module, anatomy: Anatomy) -> list[str]:
        """Switch gradients on inside the scope and off elsewhere; returns the names that may change."""
        names = []
        for name, parameter in model.named_parameters():
            inside = self.contains(anatomy, name)
            parameter.requires_grad_(inside)
            if inside:
                names.append(name)
        if not names:
            raise UserError(
                f"no parameter lies in layers {self.layers}, modules {self.modules}: nothing would be trained; widen it"
            )
        return names


@dataclass(frozen=True)
class Cost:
    """What training a scope costs in memory, before it is paid."""

    trainable: int
    total: int
    optimizer_bytes: int
    gradient_bytes: int

    def sentence(self, processes: int = 1) -> str:
        """One line for a person."""
        each = "" if processes == 1 else f" (over {processes} processes, if sharded)"
        return (
            f"trainable {self.trainable:,} of {self.total:,} parameters ({self.trainable / self.total:.1%}); "
            f"AdamW states {readable_size(self.optimizer_bytes)}, gradients {readable_size(self.gradient_bytes)}{each}"
        )


def cost(model: nn.Module) -> Cost:
    """Counts parameters (tied ones once); AdamW keeps two values a trainable parameter, in the parameter's own type."""
    parameters = list(model.parameters())
    trainable = [p for p in parameters if p.requires_grad]
    gradient = sum(p.numel() * p.element_size() for p in trainable)
    return Cost(
        trainable=sum(p.numel() for p in trainable),
        total=sum(p.numel() for p in parameters),
        optimizer_bytes=2 * gradient,
        gradient_bytes=gradient,
    )


def readable_size(count: float) -> str:
    """A number of bytes for a person."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
