"""Forget-versus-retain gradient overlap: where can a fact be pushed without pushing what must stay?

A fact's gradient in a module has a part along the mean gradient of the retain facts, which a step for the fact would spend on
them, and a part across it, which is the fact's own. Layers with much of the latter are where training is specific. This asks
the weights; what activations carry is `tracing.causal_tracing`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from lm.anatomy import Kind
from lm.errors import UserError
from lm.model import LanguageModel
from lm.run_folder import progress as progress_bar
from tracing.arrays import Array
from tracing.effects.layer_scores import LayerScores
from tracing.known import evaluating, known_facts
from tracing.localizers.base import Localization, Localizer, made_with
from tracing.localizers.gradients import add_to, answer_gradient, check_kinds, differentiable, module_weights
from tracing.question.encoded_fact import EncodedFact


@dataclass(frozen=True, kw_only=True)
class GradientOverlap(Localizer):
    """The part of a fact's gradient, module by module, that the mean retain gradient does not explain.

    With g the gradient of the answer's mean cross-entropy with respect to all weights of a module, and r its mean over the
    retain facts, a fact's score in the module is

        |g - (g.r / r.r) r| / sqrt(sum of |g|² over all modules that are scored)  =  |g| sqrt(1 - cos²) / ...

    so that every fact weighs alike, however well it is known, and scores lie between 0 and 1. `LayerScores.details` has, a
    fact and a layer, `cosine` (of g and r; NaN, written null, where either is zero) and `norm` (|g|, in nats a token), and
    a layer `retain_norm` (|r|).

    Facts that the model does not know are left out, on both sides; a fact whose gradient is zero has no score.

    Badge: *reconstruction*. That gradients tell where memorized text lies is from Stoehr et al. (2024, arXiv:2403.19851), that
    inner products of gradients choose layers from Layer Gradient Analysis (2026, arXiv:2602.20207); of both the
    abstract alone was at hand, and the score is ours.

    Cost: a forward and a backward pass a fact; beside the model, two gradients of the scored modules in float32.
    """

    kinds: tuple[Kind, ...] = ("mlp", "attn")
    """Which modules' weights: mlp, attn."""

    def __post_init__(self) -> None:
        check_kinds(self.kinds)

    @property
    def scored(self) -> tuple[Kind, ...]:
        return self.kinds

    @property
    def needs_retain(self) -> bool:
        return True

    def locate(self, task: Localization) -> LayerScores:
        model, progress = task.model, task.progress
        if not task.retain:
            raise UserError("gradient overlap compares with facts that must stay: give retain facts")
        weights = module_weights(model, self.kinds)
        every = {name: weight for weights_of in weights.values() for name, weight in weights_of.items()}
        with evaluating(model), differentiable(list(every.values())):
            known, skipped = known_facts(model, task.facts, task.prompt, show=progress)
            kept, unkept = known_facts(model, task.retain, task.prompt, show=progress)
            mean = mean_gradient(model, kept, every, progress=progress)
            retain_norm = {module: _dot(mean, mean, weights_of) ** 0.5 for module, weights_of in weights.items()}
            norms, cosines = np.zeros((2, len(known), len(self.kinds), model.anatomy.layers))
            with progress_bar(len(known), label="gradient overlap", unit="facts", enabled=progress) as advance:
                for row, encoded in enumerate(known):
                    gradient = answer_gradient(model, encoded, every)
                    for module, weights_of in weights.items():
                        cell = (row, self.kinds.index(module[0]), module[1])
                        norms[cell] = _dot(gradient, gradient, weights_of) ** 0.5
                        cosines[cell] = _cosine(_dot(gradient, mean, weights_of), norms[cell], retain_norm[module])
                    advance(1)
        scores = unexplained(norms, cosines)
        silent = [encoded.fact.label for encoded, row in zip(known, norms, strict=True) if not row.any()]
        return LayerScores(
            source="gradient overlap",
            unit="share of the fact's gradient that the retain gradient does not explain",
            facts=tuple(encoded.fact for encoded in known),
            values={kind: scores[:, module] for module, kind in enumerate(self.kinds)},
            details={
                "cosine": _by_kind(self.kinds, cosines),
                "norm": _by_kind(self.kinds, norms),
                "retain_norm": {
                    kind: [retain_norm[kind, layer] for layer in range(model.anatomy.layers)] for kind in self.kinds
                },
                "left_out": {skip.fact.label: skip.why for skip in skipped},
                "without_gradient": silent,
                "retain_facts": [encoded.fact.label for encoded in kept],
                "retain_left_out": {skip.fact.label: skip.why for skip in unkept},
            },
            provenance=made_with(model, self, task.prompt),
        )


def mean_gradient(
    model: LanguageModel,
    encoded_facts: Sequence[EncodedFact],
    weights: Mapping[str, nn.Parameter],
    *,
    progress: bool = False,
) -> dict[str, Tensor]:
    """The mean of the facts' `answer_gradient`s, one at a time. Call it inside `differentiable`."""
    mean: dict[str, Tensor] = {}
    with progress_bar(len(encoded_facts), label="retain gradients", unit="facts", enabled=progress) as advance:
        for encoded in encoded_facts:
            add_to(mean, answer_gradient(model, encoded, weights), 1 / len(encoded_facts))
            advance(1)
    return mean


def unexplained(norms: Array, cosines: Array) -> Array:
    """The score of `GradientOverlap` of a fact's gradients: norms and cosines (facts, kinds, layers) -> the same shape.

    Nothing is explained where the cosine is NaN; NaN for a fact whose norms are all zero.
    """
    across = norms * np.sqrt(np.clip(1 - np.nan_to_num(cosines) ** 2, 0, None))
    whole = np.sqrt((norms**2).sum(axis=(1, 2), keepdims=True))
    return np.asarray(np.divide(across, whole, out=np.full_like(across, np.nan), where=whole > 0))


def _dot(one: Mapping[str, Tensor], other: Mapping[str, Tensor], names: Mapping[str, object]) -> float:
    """The inner product over some of the weights, each in its own type, summed in float64."""
    return sum(float((one[name] * other[name]).sum()) for name in names)


def _cosine(dot: float, norm: float, retain_norm: float) -> float:
    return float(np.clip(dot / (norm * retain_norm), -1, 1)) if norm > 0 and retain_norm > 0 else float("nan")


def _by_kind(kinds: Sequence[Kind], values: Array) -> dict[str, list[list[float | None]]]:
    """Plain data: for each kind a list of layers a fact."""
    return {
        kind: [[None if np.isnan(value) else float(value) for value in row] for row in values[:, place]]
        for place, kind in enumerate(kinds)
    }
