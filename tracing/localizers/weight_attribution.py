"""Weight attribution: which weights does a fact's answer stand on, to first order, and in which layers are they?

Zeroing a weight w changes the loss by about -w dL/dw; summed over a module without the sign that is how much of the answer
rests there. Of single weights it makes masks (`weight_effects`). An estimate: nothing is zeroed here.
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
from tracing.effects.layer_scores import LayerScores
from tracing.known import evaluating, known_facts
from tracing.localizers.base import Localization, Localizer, made_with
from tracing.localizers.gradients import (
    add_to,
    answer_gradient,
    check_kinds,
    differentiable,
    module_weights,
    zeroing_effects,
)
from tracing.question.encoded_fact import EncodedFact


@dataclass(frozen=True, kw_only=True)
class WeightAttribution(Localizer):
    """|w dL/dw|, summed over the weights of each layer's modules.

    With s(w) = |w dL/dw| / (sum of the same over all weights of all modules that are scored), L the mean cross-entropy of a
    fact's answer, a fact's score in a module is the sum of its s(w); over all modules they add up to 1, so that every fact
    weighs alike, however well it is known. With `relative` it is the sum of max(0, s(w) - t(w)), t(w) the mean of s(w)
    over the retain facts: what rests on weights that matter more for this fact than for them. Facts that the model does
    not know are left out, on both sides; a fact whose gradient is zero has no score.

    Badge: first-order effects of weights are textbook; making layer scores of them, and `relative`, are *reconstructions*: no
    source that we know of fixes either for facts.

    Cost: a forward and a backward pass a fact; beside the model, one gradient of the scored modules in float32, and with
    `relative` a second one.
    """

    kinds: tuple[Kind, ...] = ("mlp", "attn")
    """Which modules' weights: mlp, attn."""
    relative: bool = False
    """Count only what exceeds the mean over the retain facts, weight by weight."""

    def __post_init__(self) -> None:
        check_kinds(self.kinds)

    @property
    def scored(self) -> tuple[Kind, ...]:
        return self.kinds

    @property
    def needs_retain(self) -> bool:
        return self.relative

    def locate(self, task: Localization) -> LayerScores:
        model, progress = task.model, task.progress
        if self.relative and not task.retain:
            raise UserError(
                "weight attribution relative to what must stay needs retain facts: give some, or relative: false"
            )
        modules = module_weights(model, self.kinds)
        every = {name: weight for some in modules.values() for name, weight in some.items()}
        values = np.full((len(self.kinds), len(task.facts), model.anatomy.layers), np.nan)
        with evaluating(model), differentiable(list(every.values())):
            known, skipped = known_facts(model, task.facts, task.prompt, show=progress)
            usual: dict[str, Tensor] = {}
            if self.relative:
                usual = weight_effects(
                    model, known_facts(model, task.retain, task.prompt, show=progress)[0], every, progress=progress
                )
            with progress_bar(len(known), label="weight attribution", unit="facts", enabled=progress) as advance:
                for row, encoded in enumerate(known):
                    shares = weight_shares(model, encoded, every)
                    for (kind, layer), names in modules.items() if shares else ():
                        parts = [(shares[name] - usual[name]).clamp(min=0) if usual else shares[name] for name in names]
                        values[self.kinds.index(kind), row, layer] = sum(float(part.sum()) for part in parts)
                    advance(1)
        silent = [encoded.fact.label for row, encoded in enumerate(known) if np.isnan(values[0, row]).all()]
        beyond = " beyond that for the retain facts" if self.relative else ""
        return LayerScores(
            source=f"weight attribution{' relative to retain' if self.relative else ''}",
            unit=f"share of the first-order effect of zeroing weights{beyond}",
            facts=tuple(encoded.fact for encoded in known),
            values={kind: values[place, : len(known)] for place, kind in enumerate(self.kinds)},
            details={
                "left_out": {skip.fact.label: skip.why for skip in skipped},
                "without_gradient": silent,
            },
            provenance=made_with(model, self, task.prompt),
        )


def weight_shares(model: LanguageModel, encoded: EncodedFact, weights: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """One fact's |w dL/dw| by name, in the shapes of the weights, divided by their sum over all of them; nothing where that is 0.

    Call it inside `tracing.localizers.gradients.differentiable`.
    """
    effects = zeroing_effects(weights, answer_gradient(model, encoded, weights))
    whole = sum(float(effect.sum()) for effect in effects.values())
    return {name: effect / whole for name, effect in effects.items()} if whole > 0 else {}


def weight_effects(
    model: LanguageModel,
    encoded_facts: Sequence[EncodedFact],
    weights: Mapping[str, nn.Parameter],
    *,
    progress: bool = False,
) -> dict[str, Tensor]:
    """The mean over facts of `weight_shares`, single weight by single weight: high where the facts rest on a weight.

    Call it inside `tracing.localizers.gradients.differentiable`. Facts without a gradient do not count.

    Args:
        model: in eval mode.
        encoded_facts: at least one.
        weights: name -> parameter; the shares are of these.

    Returns:
        Name -> a tensor of the weight's shape and device, float32 (float64 stays); they sum to 1 over all weights.

    Raises:
        UserError: NaN or infinite numbers, or no fact has a gradient.
    """
    total: dict[str, Tensor] = {}
    counted = 0
    with progress_bar(len(encoded_facts), label="weight effects", unit="facts", enabled=progress) as advance:
        for encoded in encoded_facts:
            shares = weight_shares(model, encoded, weights)
            counted += bool(shares)
            add_to(total, shares)
            advance(1)
    if not counted:
        raise UserError(
            f"none of the {len(encoded_facts)} facts has a gradient in the weights: use facts that are less certain"
        )
    return {name: value.div_(counted) for name, value in total.items()}
