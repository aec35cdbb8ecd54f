"""From training to the model that is kept: averaged weights, calibrated thresholds, activations as they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lm.anatomy import Site
from sae.model import SparseAutoencoder
from sae.sharding import kth_largest
from sae.thresholds import calibrate_features
from sae.trainer.config import AutoencoderSpec, TrainerConfig
from sae.trainer.evaluation import evaluate
from sae.trainer.training_sae import Member

_CHUNK = 1 << 24
"""Affinities made together."""


def needs_sample(trainer: TrainerConfig, specs: Sequence[AutoencoderSpec]) -> bool:
    """Whether thresholds are calibrated at all."""
    return trainer.thresholds == "calibrated" and any(spec.choice != "token" for spec in specs)


def parted(
    held_out: Mapping[Site, Tensor], trainer: TrainerConfig, specs: Sequence[AutoencoderSpec]
) -> tuple[dict[Site, Tensor], dict[Site, Tensor]]:
    """Held-out tokens in two: those that thresholds are calibrated on (none if they are not, or on other tokens), the rest."""
    if trainer.calibrate_on != "held_out" or not needs_sample(trainer, specs):
        return {}, dict(held_out)
    spare = {site: max(len(values) - trainer.held_out_tokens, len(values) // 2) for site, values in held_out.items()}
    cut = {site: min(trainer.calibrate_tokens, tokens) for site, tokens in spare.items()}
    return (
        {site: values[: cut[site]] for site, values in held_out.items()},
        {site: values[cut[site] :] for site, values in held_out.items()},
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Trained:
    """One result."""

    name: str
    site: Site
    spec: AutoencoderSpec
    autoencoder: SparseAutoencoder
    """For activations as they are, in evaluation mode, on the CPU."""
    measures: dict[str, float]
    """On held-out tokens (see `evaluate`); empty without them."""
    densities: Tensor | None
    """(features,): the share of held-out tokens on which each feature fires by the exported rule."""
    fitted: dict[str, Any] | None
    """The last fit of a Zipf law, if one was made."""
    backend: str
    """Of the sparse operations: `auto` may choose another one on another day, with rounding of its own."""
    thresholds: str
    """What they were set on: held_out or training tokens, or running; or none, for token choice."""


def finished(member: Member, sample: Tensor | None, held_out: Tensor | None, *, sampled_from: str) -> Trained:
    """The result of a member: thresholds calibrated on a (tokens, hidden) sample, or the running ones without it."""
    weights = result_weights(member)
    threshold = running(member) if sample is None else calibrated(member, weights, sample)
    measures, densities = ({}, None) if held_out is None else evaluate(member, weights, threshold, held_out)
    return Trained(
        name=member.name,
        site=member.site,
        spec=member.spec,
        autoencoder=exported(member, weights, threshold),
        measures=measures,
        densities=densities,
        fitted=member.law.fitted,
        backend=member.backend,
        thresholds="none" if threshold is None else "running" if sample is None else sampled_from,
    )


@torch.no_grad()
def result_weights(member: Member) -> dict[str, Tensor]:
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
def calibrated(member: Member, weights: Mapping[str, Tensor], sample: Tensor) -> Tensor | None:
    """Float64 thresholds that give a (tokens, hidden) sample, the same on every process, the budgets of training exactly.

    A scalar for mutual choice, (own features,) for feature choice, None for token choice. Badge: **reconstruction**.
    """
    if member.spec.choice == "token":
        return None
    tokens, batch = len(sample), member.recipe.trainer.batch_tokens
    centered = sample / member.scale - weights["b_dec"]

    def affinities() -> Iterator[Tensor]:
        step = max(1, _CHUNK // max(tokens, 1))
        for w_enc, b_enc in zip(torch.split(weights["w_enc"], step), torch.split(weights["b_enc"], step), strict=True):
            yield torch.addmm(b_enc.unsqueeze(1), w_enc, centered.T)

    if member.spec.choice == "mutual":
        found = kth_largest(
            affinities, member.spec.k * tokens, lambda counts: member.mesh.sum_(counts, "features", "calibration")
        )
        if found is None:
            return torch.tensor(torch.inf, dtype=torch.float64)
        return torch.nextafter(found.value, found.value.new_zeros(())).double()
    assert member.law.budgets is not None
    budgets = (member.law.budgets.double().mean(0) * tokens / batch).round().long().clamp(1, tokens)
    parts, start = [], 0
    for part in affinities():
        parts.append(calibrate_features(part.T, budgets[start : start + len(part)]))
        start += len(part)
    return torch.cat(parts)


def running(member: Member) -> Tensor | None:
    """The running thresholds, like `calibrated`; None for token choice."""
    return None if member.spec.choice == "token" else member.threshold.value


@torch.no_grad()
def exported(member: Member, weights: Mapping[str, Tensor], threshold: Tensor | None) -> SparseAutoencoder:
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
