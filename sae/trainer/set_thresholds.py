"""Where the thresholds of a result are set: calibrated on a sample after the last step, or the running averages of training.

One for all features with mutual choice, one a feature with feature choice, none with token choice. The same rules on plain
tensors are in `sae.thresholds`; here the features may be dealt over processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lm.anatomy import Site
from sae.sharding import kth_largest
from sae.thresholds import calibrate_features
from sae.trainer.config import AutoencoderSpec, TrainerConfig
from sae.trainer.training_sae import TrainingSae

_CHUNK = 1 << 24
"""Affinities made together."""


def needs_calibration(trainer: TrainerConfig, specs: Sequence[AutoencoderSpec]) -> bool:
    """Whether thresholds are calibrated at all."""
    return trainer.thresholds == "calibrated" and any(spec.choice != "token" for spec in specs)


def split_held_out(
    held_out: Mapping[Site, Tensor], trainer: TrainerConfig, specs: Sequence[AutoencoderSpec]
) -> tuple[dict[Site, Tensor], dict[Site, Tensor]]:
    """Held-out tokens in two: those that thresholds are calibrated on (none if they are not, or on other tokens), the rest."""
    if trainer.calibrate_on != "held_out" or not needs_calibration(trainer, specs):
        return {}, dict(held_out)
    spare = {site: max(len(values) - trainer.held_out_tokens, len(values) // 2) for site, values in held_out.items()}
    cut = {site: min(trainer.calibrate_tokens, tokens) for site, tokens in spare.items()}
    return (
        {site: values[: cut[site]] for site, values in held_out.items()},
        {site: values[cut[site] :] for site, values in held_out.items()},
    )


@torch.no_grad()
def calibrated_threshold(member: TrainingSae, weights: Mapping[str, Tensor], sample: Tensor) -> Tensor | None:
    """Float64 thresholds that give a (tokens, hidden) sample, the same on every process, the budgets of training exactly.

    A scalar for mutual choice, (own features,) for feature choice, None for token choice. Badge: **reconstruction**.
    """
    if member.spec.choice == "token":
        return None
    tokens = len(sample)
    centered = sample / member.scale - weights["b_dec"]

    def affinities() -> Iterator[Tensor]:
        step = max(1, _CHUNK // max(tokens, 1))
        for w_enc, b_enc in zip(torch.split(weights["w_enc"], step), torch.split(weights["b_enc"], step), strict=True):
            yield torch.addmm(b_enc.unsqueeze(1), w_enc, centered.T)

    if member.spec.choice == "mutual":
        kth = kth_largest(
            affinities, member.spec.k * tokens, lambda counts: member.mesh.sum_(counts, "features", "calibration")
        )
        if kth is None:
            return torch.tensor(torch.inf, dtype=torch.float64)
        return torch.nextafter(kth.value, kth.value.new_zeros(())).double()
    budgets = member.law.own_budgets_for(tokens)
    parts, start = [], 0
    for part in affinities():
        parts.append(calibrate_features(part.T, budgets[start : start + len(part)]))
        start += len(part)
    return torch.cat(parts)


def running_threshold(member: TrainingSae) -> Tensor | None:
    """The running thresholds, like `calibrated_threshold`; None for token choice."""
    return None if member.spec.choice == "token" else member.threshold.value
