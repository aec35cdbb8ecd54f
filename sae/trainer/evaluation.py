"""Held-out measures of an autoencoder in training, over the mesh, without touching anything that training uses.

Two ways, both reported: with the training selection (the budgets of training, over batches as large as in training) and
with thresholds, token by token, which is what the exported file does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lm.anatomy import Site
from lm.errors import UserError
from sae.metrics import Moments, Reconstruction, Usage
from sae.sharding import Mesh
from sae.trainer.config import AutoencoderSpec, TrainerConfig
from sae.trainer.set_thresholds import split_held_out
from sae.trainer.training_choice import TrainingChoice, by_threshold
from sae.trainer.training_sae import TrainingSae


@torch.no_grad()
def evaluate(
    member: TrainingSae, weights: Mapping[str, Tensor], threshold: Tensor | None, held_out: Tensor
) -> tuple[dict[str, float], Tensor]:
    """(measures, (features,) float64 densities by the exported rule) on held-out (tokens, hidden), the same everywhere.

    `fvu`, `l0`, `dead`: training selection; `fvu_exported`, `l0_exported`: with `threshold` (token choice: the same). Tokens
    beyond the last whole batch are left out, unless there is no whole one. Dead: not one firing on these tokens.
    """
    mesh, features = member.mesh, member.spec.features
    batch = min(member.recipe.trainer.batch_tokens, len(held_out))
    if not batch:
        raise UserError("there are no held-out tokens to evaluate on: give a source with text, or NoSource")
    device = member.weights["b_dec"].device
    start, end = mesh.bounds(features)
    sums = [Reconstruction.start(held_out.shape[1], scale=1 / member.scale) for _ in range(2)]
    counts = torch.zeros(3, end - start, dtype=torch.int64, device=device)
    tokens = 0
    for number, first in enumerate(range(0, len(held_out) - batch + 1, batch)):
        x = held_out[first : first + batch][mesh.global_rows(batch)].to(device) / member.scale
        choose = _as_in_training(member, batch, number)
        output = member.forward(x, choose, weights, splits=choose.splits)
        sums[0] = sums[0].update(x, output.x_hat)
        counts[0] += torch.bincount(output.code.indices[output.code.values != 0], minlength=end - start)
        counts[1] += torch.bincount(output.code.indices[output.code.values > 1e-3], minlength=end - start)
        tokens += batch
        if threshold is not None:
            rule = by_threshold(threshold.expand(end - start).to(device))
            output = member.forward(x, rule, weights, splits="tokens", dtype=torch.float32)  # as the file does
        sums[1] = sums[1].update(x, output.x_hat)
        counts[2] += output.code.feature_counts()
    parts = [_over_data(mesh, own) for own in sums]
    whole = mesh.whole_features(mesh.sum_(counts, "data", "evaluation").T.contiguous(), features, "evaluation").T.cpu()
    usage = Usage(tokens, whole[0], whole[1], tokens, int(whole[2].sum())).result()
    trained, used = (part.result(variance=member.variance) for part in parts)
    measures = {
        "tokens": float(tokens),
        "fvu": trained.fvu,
        "nmse": trained.normalized_mse,
        "l0": usage.l0,
        "dead": usage.dead_share,
        "fvu_exported": used.fvu,
        "l0_exported": usage.l0_exported if usage.l0_exported is not None else math.nan,
    }
    return measures, whole[2].double() / tokens


def check_held_out(
    held_out: Mapping[Site, Tensor],
    autoencoders: Mapping[str, tuple[Site, AutoencoderSpec]],
    trainer: TrainerConfig,
    *,
    hidden: int,
) -> None:
    """Raise UserError, before anything is trained, for (tokens, `hidden`) that cannot be scored, or calibrated on."""
    sample, _ = split_held_out(held_out, trainer, [spec for _, spec in autoencoders.values()])
    for site, spec in autoencoders.values():
        if held_out and site not in held_out:
            raise UserError(f"held_out lacks {site}: give tokens for every site, or none at all")
        values = held_out.get(site)
        if values is not None and (values.ndim != 2 or values.shape[1] != hidden):
            raise UserError(
                f"held_out is {tuple(values.shape)} at {site} and what is trained on is {hidden} wide: give held-out activations "
                "of the same model and site, or NoSource"
            )
        if values is not None and not bool(values.isfinite().all()):
            raise UserError(
                f"held_out holds NaN or infinity at {site}: leave those tokens out, or load the model in bfloat16 or float32"
            )
        tokens = len(sample[site]) if sample else trainer.calibrate_tokens
        if spec.choice == "feature" and trainer.thresholds == "calibrated" and spec.k * tokens < spec.features:
            raise UserError(
                f"thresholds of {spec.features} features cannot be calibrated on {tokens} tokens with k {spec.k}, less than a "
                f"firing a feature: set trainer.calibrate_tokens to at least {-(-spec.features // spec.k)}, and hold as many "
                "tokens out, or set trainer.thresholds to running"
            )


def _as_in_training(member: TrainingSae, batch: int, number: int) -> TrainingChoice:
    """The selection of training for a batch, from 0; of a smaller batch than in training, with budgets scaled and rounded."""
    budgets = None
    if member.spec.choice == "feature":
        budgets = member.law.own_budgets(number)
        if batch < member.recipe.trainer.batch_tokens:
            budgets = member.law.own_budgets_for(batch)
    return TrainingChoice(
        mesh=member.mesh,
        choice=member.spec.choice,
        k=member.spec.k,
        features=member.spec.features,
        batch=batch,
        budgets=budgets,
    )


def _over_data(mesh: Mesh, own: Reconstruction) -> Reconstruction:
    """The streams of all data ranks together; one collective."""
    if mesh.sizes["data"] == 1:
        return own
    tokens, mean, squares = own.inputs.tokens, own.inputs.mean, own.inputs.squares
    packed = torch.cat([mean.new_tensor([tokens]), mean, squares, own.error.to(mean.device).view(1)])
    hidden = len(mean)
    whole: Reconstruction | None = None
    for part in mesh.gather(packed, "data", "evaluation"):
        inputs = Moments(round(float(part[0])), part[1 : 1 + hidden], part[1 + hidden : 1 + 2 * hidden])
        rank = Reconstruction(inputs, part[-1], own.scale)
        whole = rank if whole is None else whole.merge(rank)
    assert whole is not None
    return whole
