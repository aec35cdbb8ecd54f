"""What the recipe of Gao et al. needs beside its auxiliary loss: start values, unit-norm decoder, fixed normalizer.

Source: arXiv 2406.04093 and its released code. Pure functions, so that a trainer, a sharded trainer and a test use the
same ones; nothing here owns parameters or steps an optimizer. Its counts of dead features are in `dead_features`, its
average of the weights in `moving_average`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lm.errors import UserError


def geometric_median(points: Tensor, *, tolerance: float = 1e-8, iterations: int = 1000) -> Tensor:
    """The (hidden,) point with the least sum of distances to `points` (tokens, hidden); float64.

    Weiszfeld's iteration from the mean, with the step of Vardi and Zhang (2000) where an iterate meets a data point, so
    that it cannot stick there; stops when a step is below `tolerance` times the mean distance. The start of the
    pre-bias, on up to 32,768 activations. Badge: **faithful** (the released code's aim, by another stopping rule).
    """
    if points.ndim != 2 or not points.shape[0]:
        raise UserError(f"a geometric median of {tuple(points.shape)}: give (tokens, hidden) with one token or more")
    data = points.detach().double()
    center = data.mean(0)
    for _ in range(iterations):
        offsets = data - center
        distances = offsets.norm(dim=1)
        scale = float(distances.mean())
        away = distances > 1e-12 * scale
        if not scale or not bool(away.any()):
            break
        weights = torch.where(away, distances, 1.0).reciprocal() * away
        pull = (offsets * weights.unsqueeze(1)).sum(0)
        here, strength = int((~away).sum()), float(pull.norm())
        step = pull / weights.sum() * (max(0.0, 1 - here / strength) if strength else 0.0)
        center = center + step
        if float(step.norm()) < tolerance * scale:
            break
    return center


def input_variance(sample: Tensor) -> float:
    """`mean((x - mean_tokens(x))^2)` over a (tokens, hidden) sample: the normalizer, computed once and then kept.

    Badge: **faithful** to Gao et al.'s released code.
    """
    data = sample.detach().double()
    variance = float((data - data.mean(0)).square().mean()) if data.numel() else 0.0
    if not (0 < variance < math.inf):
        raise UserError(f"the sample of activations has variance {variance}: give finite tokens that differ")
    return variance


def reconstruction_loss(x: Tensor, x_hat: Tensor, *, variance: float) -> Tensor:
    """`mean((x_hat - x)^2) / variance` over (tokens, hidden), in float32 or wider; a scalar. Badge: **faithful**."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x_hat.to(wide) - x.to(wide)).square().mean() / variance


def unit_rows(w_dec: Tensor) -> Tensor:
    """The decoder (features, hidden) with rows of length 1; a row of zeros stays. Applied after each optimizer step."""
    lengths = w_dec.norm(dim=1, keepdim=True)
    return w_dec / torch.where(lengths > 0, lengths, 1.0)


def without_parallel(gradient: Tensor, w_dec: Tensor) -> Tensor:
    """The gradient (features, hidden) without its part along each row of `w_dec`: `g - (g . w / |w|^2) w`.

    Applied before the optimizer's step, so that the step does not fight the unit norm. Badge: **faithful**.
    """
    squared = w_dec.square().sum(1, keepdim=True)
    along = (gradient * w_dec).sum(1, keepdim=True) / torch.where(squared > 0, squared, 1.0)
    return gradient - along * w_dec
