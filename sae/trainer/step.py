"""One training step of one autoencoder: the losses of the global batch, one reduction of the gradients, and the update.

    loss = mean((x - x_hat)^2) / variance + coefficient * auxiliary + (1/8) * mean((x - x_hat_4k)^2) / variance

over all tokens of the global batch. Then the decoder's gradient loses its part along the rows, Adam steps, rows return to
unit length, and counters move. Source: Gao et al. 2024 (arXiv 2406.04093) and its released code. Badge: **variant** in five
points of that loop: gradients are cleared between steps; the average of weights is taken after Adam; the decoder is brought to
unit length after Adam, not before the projection of its gradient; the auxiliary loss moves the pre-bias through its affinities
alone; and what is idle is what it was before this batch, whose own firings count from the next one on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lm.errors import UserError
from sae.auxiliary import residual_loss
from sae.kernels import take_parallel_, unit_rows_
from sae.sharding import Mesh
from sae.trainer.timing import Phases
from sae.trainer.training_choice import TrainingChoice
from sae.trainer.training_sae import WEIGHTS, TrainingSae

FIRES = 1e-3
"""A feature fires if its activation exceeds this, in units of the scaled input (Gao et al.'s released code)."""
MULTI = 1 / 8


def train_step(member: TrainingSae, x: Tensor, *, step: int, rate: float, clock: Phases) -> dict[str, float]:
    """Train on the own rows x (rows, hidden) of the global batch number `step` (from 0); returns what the log shows.

    Raises UserError, on every process and before a weight has changed, if the gradient is not finite.
    """
    batch, hidden = member.recipe.trainer.batch_tokens, x.shape[1]
    x = x / member.scale
    choose = member.selecting(step, clock)
    output = member.forward(x, choose, splits=choose.splits, inner=lambda: choose.inner, clock=clock)
    clock.start()
    unit = batch * hidden * member.variance / member.scale**2
    loss = main = (x - output.x_hat).square().sum() / unit
    wider = aux = main.new_zeros(())
    if output.wider_hat is not None:
        wider = (x - output.wider_hat).square().sum() / unit
        loss = loss + MULTI * wider
    if output.aux_hat is not None:
        aux = _auxiliary(member, (x - output.x_hat).detach(), output.aux_hat) * (len(x) / batch)
        loss = loss + member.recipe.auxiliary.coefficient * aux
    clock.stop("loss")
    loss.backward()  # type: ignore[no-untyped-call]
    clock.stop("backward")

    fired = output.code.indices[output.code.values.detach() > FIRES]
    counts = torch.bincount(fired, minlength=output.code.features)
    sums = torch.stack([main, wider, aux, main.new_tensor(output.code.matches)]).detach()
    counts, demand, sums = _reduced(member, counts, choose.counts, sums)
    shown = _update(member, counts, sums, step=step, rate=rate)
    _observe(member, choose, demand)
    clock.stop("optimizer")
    return shown


def _auxiliary(member: TrainingSae, residual: Tensor, aux_hat: Tensor) -> Tensor:
    aux = member.recipe.auxiliary
    share = min(member.idle_total / aux.k_aux, 1.0) if aux.scale_by_count else None
    variance = residual_variance(residual, member.mesh)
    return residual_loss(
        residual, aux_hat, variance=variance, share=None if share is None else residual.new_tensor(share)
    )


def residual_variance(residual: Tensor, mesh: Mesh) -> Tensor:
    """`mean((e - mean_tokens(e))^2)` of the global batch, float64. One collective over data ranks."""
    wide = residual.double()
    sums = torch.cat([wide.sum(0), wide.square().sum().view(1), wide.new_tensor([len(wide)])])
    sums = mesh.sum_(sums, "data", "residual variance")
    tokens, hidden = sums[-1], residual.shape[1]
    return (sums[-2] / tokens - (sums[:-2] / tokens).square().sum()).clamp(min=0) / hidden


def _reduced(
    member: TrainingSae, counts: Tensor, demand: Tensor | None, sums: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients, firing counts, demand and sums, each summed over data ranks: one collective."""
    if member.mesh.sizes["data"] == 1:
        return counts, demand, sums
    parameters = member.parameters()
    gradients = [parameter.grad for parameter in parameters]
    parts: Sequence[Tensor] = [
        *(torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)),
        counts,
        *(() if demand is None else (demand,)),
        sums,
    ]
    flat = member.mesh.sum_(torch.cat([part.flatten().float() for part in parts]), "data", "gradients")
    pieces = [
        piece.view(part.shape) for piece, part in zip(torch.split(flat, [p.numel() for p in parts]), parts, strict=True)
    ]
    for parameter, gradient in zip(parameters, pieces, strict=False):
        parameter.grad = gradient
    rest = pieces[len(parameters) :]
    return rest[0].round().long(), None if demand is None else rest[1].round().long(), rest[-1]


def _update(member: TrainingSae, counts: Tensor, sums: Tensor, *, step: int, rate: float) -> dict[str, float]:
    trainer, aux = member.recipe.trainer, member.recipe.auxiliary
    member.firings = member.firings.add(counts, trainer.batch_tokens, window=aux.window)
    w_dec = member.weights["w_dec"]
    if w_dec.grad is not None:
        take_parallel_(w_dec.grad, w_dec.data)
    squares = [_square(member.weights[name].grad) for name in WEIGHTS]
    idle, _ = member.idle()
    totals = torch.stack(
        [sums[3].double(), idle.sum().double(), member.firings.dead(window=aux.window).sum().double(), sum(squares[:3])]  # type: ignore[list-item]
    )
    matches, idle_total, dead_total, square = member.mesh.sum_(totals, "features", "totals").tolist()
    norm = math.sqrt(square + float(squares[3])) if square + float(squares[3]) >= 0 else math.nan
    main, wider, auxiliary = sums[:3].tolist()
    if not (math.isfinite(norm) and math.isfinite(main)):
        raise UserError(
            f"{member.name} diverged at step {step + 1} (error {main}, gradient norm {norm}): lower "
            "autoencoders.learning_rate or set trainer.clip; earlier checkpoints are kept"
        )
    member.idle_total, member.dead_total = round(idle_total), round(dead_total)
    if trainer.clip is not None and norm > trainer.clip:
        for parameter in member.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(trainer.clip / norm)
    for group in member.adam.param_groups:
        group["lr"] = rate
    member.adam.step()
    member.adam.zero_grad()
    unit_rows_(w_dec.data)
    if member.average is not None:
        member.average = member.average.update(member.named())
    shown = {
        "nmse": main,
        "aux": auxiliary,
        "l0": matches / trainer.batch_tokens,
        "dead": dead_total / member.spec.features,
        "idle": idle_total / member.spec.features,
        "grad_norm": norm,
        "lr": rate,
    }
    return {**shown, "nmse_wider": wider} if member.spec.multi_topk else shown


def _observe(member: TrainingSae, choose: TrainingChoice, demand: Tensor | None) -> None:
    if choose.choice == "mutual" and choose.smallest is not None:
        member.last = float(choose.smallest)
    if choose.choice == member.spec.choice and choose.smallest is not None:
        member.threshold = member.threshold.toward(choose.smallest, rate=member.recipe.trainer.threshold_rate)
    if demand is not None:
        member.law.measure(demand)


def _square(gradient: Tensor | None) -> Tensor:
    return torch.zeros((), dtype=torch.float64) if gradient is None else gradient.norm().double().square()


def learning_rate(step: int, steps: int, *, warmup: int, decay: float) -> float:
    """The share of the peak rate at `step`, from 0: `(step + 1) / warmup` at first, 1, and a line to 0 over the last share."""
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    falling = decay * steps
    return rise * (min(1.0, (steps - step) / falling) if falling >= 1 else 1.0)
