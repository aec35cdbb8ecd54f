"""What the recipe of Gao et al. needs beside its losses: start values, unit-norm decoder, fixed normalizer, counts, EMA.

Source: arXiv 2406.04093 and its released code. Pure functions and values, so that a trainer, a sharded trainer and a
test use the same ones; nothing here owns parameters or steps an optimizer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lm.errors import UserError
from sae.sparse_code import SparseCode


def geometric_median(points: Tensor, *, tolerance: float = 1e-8, iterations: int = 1000) -> Tensor:
    """The (hidden,) point with the least sum of distances to `points` (tokens, hidden); float64.

    Weiszfeld's iteration from the mean, with the step of Vardi and Zhang (2000) where an iterate meets a data point, so
    that it cannot stick there; stops when a step is below `tolerance` times the mean distance. The start of the
    pre-bias, on up to 32,768 activations. Badge: **faithful** (the released code's aim, by another stopping rule).
    """
    if points.ndim != 2 or not points.shape[0]:
        raise UserError(f"a geometric median needs (tokens, hidden) with a token, not {tuple(points.shape)}")
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


@dataclass(frozen=True, eq=False)
class Firings:
    """Which features are alive, counted in *tokens* of the global batch, and how often each fires in a moving window.

    A feature fires on a token if its activation exceeds `least` (1e-3 in the released code). Dead: not one firing in
    the last `window` tokens (10 million there). Density is the firing rate over an exponential window of the same
    number of tokens, corrected for its start. Returned anew by `update`: looking at it changes nothing.
    """

    silent: Tensor
    """(features,) int64: tokens since the last batch in which the feature fired."""
    rate: Tensor
    """(features,) float64: the uncorrected moving average of firings a token."""
    tokens: int
    """Tokens seen."""
    weight: float
    """What the average's weights sum up to so far: the correction of its start."""

    @classmethod
    def start(cls, features: int) -> Firings:
        """Nothing seen: nothing is dead."""
        return cls(torch.zeros(features, dtype=torch.int64), torch.zeros(features, dtype=torch.float64), 0, 0.0)

    def update(self, code: SparseCode, *, window: int = 10_000_000, least: float = 1e-3) -> Firings:
        """After one global batch. `least` compares with the activations, in units of the autoencoder's input."""
        if window < 1:
            raise UserError(f"a window of {window} tokens: give 1 or more")
        fired = code.indices[code.values.detach() > least]
        counts = torch.bincount(fired, minlength=code.features).to(self.silent.device)
        return self.add(counts, code.tokens, window=window)

    def add(self, counts: Tensor, tokens: int, *, window: int) -> Firings:
        """The same from (features,) firing counts, as a sum over processes gives them, and their number of tokens."""
        if counts.shape != self.silent.shape:
            raise UserError(f"{len(counts)} firing counts met {len(self.silent)} features: start the counts anew")
        if tokens == 0:
            return self
        kept = math.exp(-tokens / window)
        return Firings(
            silent=torch.where(counts > 0, 0, self.silent + tokens),
            rate=self.rate * kept + (1 - kept) * counts.double() / tokens,
            tokens=self.tokens + tokens,
            weight=self.weight * kept + (1 - kept),
        )

    def dead(self, *, window: int = 10_000_000) -> Tensor:
        """(features,) boolean: silent for more than `window` tokens."""
        return self.silent > window

    def density(self) -> Tensor:
        """(features,) float64: the share of tokens on which each feature fires; 0 before the first batch."""
        return self.rate / self.weight if self.weight else self.rate


@dataclass(frozen=True, eq=False)
class MovingAverage:
    """An exponential average of weights, corrected for its start: `m <- d m + (1 - d) w`, read as `m / (1 - d^t)`.

    Badge: **faithful** but for its place: it is updated after the optimizer's step (the released loop does it before).
    """

    total: dict[str, Tensor]
    """The uncorrected averages, by name."""
    steps: int
    decay: float

    @classmethod
    def start(cls, weights: dict[str, Tensor], *, decay: float = 0.999) -> MovingAverage:
        """All zero; `value` needs one update first."""
        if not 0 <= decay < 1:
            raise UserError(f"the decay {decay} of the weight average must be from 0 to below 1: 0.999 is usual")
        return cls({name: torch.zeros_like(w.detach()) for name, w in weights.items()}, 0, decay)

    def update(self, weights: dict[str, Tensor]) -> MovingAverage:
        """One step further; the weights are read, not kept."""
        if weights.keys() != self.total.keys():
            raise UserError(f"the average holds {sorted(self.total)}, not {sorted(weights)}: start it anew")
        with torch.no_grad():
            total = {name: old.lerp(weights[name].detach(), 1 - self.decay) for name, old in self.total.items()}
        return MovingAverage(total, self.steps + 1, self.decay)

    def value(self) -> dict[str, Tensor]:
        """The averaged weights; a decoder among them is no longer of unit norm."""
        if not self.steps:
            raise UserError("the weight average is empty: update it once before reading it")
        return {name: total / (1 - self.decay**self.steps) for name, total in self.total.items()}
