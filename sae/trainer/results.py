"""From training to the autoencoder that is kept: averaged weights, thresholds, activations as they are, held-out measures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lm.anatomy import Site
from sae.model import SparseAutoencoder
from sae.trainer.config import AutoencoderSpec
from sae.trainer.evaluation import evaluate
from sae.trainer.set_thresholds import calibrated_threshold, running_threshold
from sae.trainer.training_sae import TrainingSae


@dataclass(frozen=True, kw_only=True, eq=False)
class Trained:
    """One result."""

    name: str
    site: Site
    spec: AutoencoderSpec
    autoencoder: SparseAutoencoder
    """For activations as they are, in evaluation mode, on the CPU."""
    measures: dict[str, float]
    """On held-out tokens (see `evaluate`); empty without them. `dead` counts there, so of few tokens it says little."""
    dead_in_training: float
    """The share of features that did not fire in the last `auxiliary.window` tokens of training, or in all of them."""
    densities: Tensor | None
    """(features,): the share of held-out tokens on which each feature fires by the exported rule."""
    fitted: dict[str, Any] | None
    """The last fit of a Zipf law, if one was made."""
    backend: str
    """Of the sparse operations: `auto` may choose another one on another day, with rounding of its own."""
    thresholds: str
    """What they were set on: held_out or training tokens, or running; or none, for token choice."""


def finished(member: TrainingSae, sample: Tensor | None, held_out: Tensor | None, *, sampled_from: str) -> Trained:
    """The result of a member: thresholds calibrated on a (tokens, hidden) sample, or the running ones without it."""
    weights = result_weights(member)
    threshold = running_threshold(member) if sample is None else calibrated_threshold(member, weights, sample)
    measures, densities = ({}, None) if held_out is None else evaluate(member, weights, threshold, held_out)
    return Trained(
        name=member.name,
        site=member.site,
        spec=member.spec,
        autoencoder=exported(member, weights, threshold),
        measures=measures,
        dead_in_training=member.dead_in_training,
        densities=densities,
        fitted=member.law.fitted,
        backend=member.backend,
        thresholds="none" if threshold is None else "running" if sample is None else sampled_from,
    )


@torch.no_grad()
def result_weights(member: TrainingSae) -> dict[str, Tensor]:
    """The weights that are the result, held here, in units of the scale: those in training, or their average.

    An average has decoder rows shorter than 1; their length moves to the encoder, so that affinities measure what a feature
    adds. A given choice decodes to the same, but another few features may be chosen: a **variant** of Gao et al.'s average.
    """
    if member.average is None or not member.average.steps:
        return {name: value.clone() for name, value in member.named().items()}
    weights = member.average.value()
    lengths = weights["w_dec"].norm(dim=1, keepdim=True)
    safe = torch.where(lengths > 0, lengths, 1.0)
    return {
        "w_enc": weights["w_enc"] * lengths,
        "b_enc": weights["b_enc"] * lengths.squeeze(1),
        "w_dec": weights["w_dec"] / safe,
        "b_dec": weights["b_dec"],
    }


@torch.no_grad()
def exported(member: TrainingSae, weights: Mapping[str, Tensor], threshold: Tensor | None) -> SparseAutoencoder:
    """The whole autoencoder, for activations as they are, in evaluation mode on the CPU. Collectives: one a tensor."""
    mesh, scale = member.mesh, member.scale
    model = SparseAutoencoder(member.config)
    for name in ("w_enc", "b_enc", "w_dec"):
        whole = mesh.whole_features(weights[name], member.spec.features, "export").cpu()
        getattr(model, name).data.copy_(whole * scale if name == "b_enc" else whole)
    model.b_dec.data.copy_(weights["b_dec"].cpu() * scale)
    if threshold is not None:
        wide = threshold if threshold.ndim == 0 else mesh.whole_features(threshold, member.spec.features, "export")
        model.set_threshold(wide.cpu() * scale)
    model.variance.fill_(member.variance)
    return model.eval()
