"""How well activations are reconstructed: pooled FVU and explained variance, MSE, and the input's own moments.

Sums of squares about the mean of the *whole* stream, in float64, by batches merged exactly (Chan, Golub and LeVeque 1983): no
split into batches or processes changes the result, and a mean far larger than the deviation costs no digits. Values are
returned anew by `update`, so looking at them changes nothing. Nothing here sees features or a language model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lm.errors import UserError
from sae.metrics.sums import sum_everywhere

_CHUNK = 1 << 22
"""Elements widened to float64 at a time."""


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean and sum of squared deviations of a stream of (tokens, hidden) activations."""

    tokens: int
    mean: Tensor
    """(hidden,) float64."""
    squares: Tensor
    """(hidden,) float64: `sum_tokens (x - mean)^2`."""

    @classmethod
    def start(cls, hidden: int) -> Moments:
        """Nothing seen."""
        return cls(0, torch.zeros(hidden, dtype=torch.float64), torch.zeros(hidden, dtype=torch.float64))

    def update(self, x: Tensor, *, mask: Tensor | None = None) -> Moments:
        """With x (tokens, hidden), or its rows where the (tokens,) boolean `mask` is true; other rows may hold anything."""
        return self._add(counted(x, mask, len(self.mean), "activations"))

    def merge(self, other: Moments) -> Moments:
        """Of both streams together."""
        if other.mean.shape != self.mean.shape:
            raise UserError(
                f"moments of width {len(self.mean)} met width {len(other.mean)}: they are of different sites"
            )
        if not other.tokens or not self.tokens:
            return self if self.tokens else other
        tokens = self.tokens + other.tokens
        gap = other.mean.to(self.mean.device) - self.mean
        return Moments(
            tokens,
            self.mean + gap * (other.tokens / tokens),
            self.squares + other.squares.to(self.mean.device) + gap.square() * (self.tokens * other.tokens / tokens),
        )

    def all_reduce(self) -> Moments:
        """Of all processes' streams together, the same on each. Two collectives."""
        sums = sum_everywhere(torch.cat([self.mean * self.tokens, self.mean.new_tensor([self.tokens])]))
        tokens = round(float(sums[-1]))
        mean = sums[:-1] / max(tokens, 1)
        return Moments(tokens, mean, sum_everywhere(self.squares + (self.mean - mean).square() * self.tokens))

    def variance(self) -> float:
        """Mean over dimensions of the variance over tokens: the MSE of predicting the mean."""
        self.require_tokens()
        return float(self.squares.mean()) / self.tokens

    def gamma(self) -> float:
        """`|mean| / |deviation|`, both norms over dimensions: 0 for centered data; a large one foretells dead features.

        Source: arXiv 2605.31518 as digested. Infinite if all tokens are equal. Badge: **reconstruction**.
        """
        self.require_tokens()
        deviation = math.sqrt(float(self.squares.sum()) / self.tokens)
        return float(self.mean.norm()) / deviation if deviation else math.inf

    def require_tokens(self) -> None:
        """Raise UserError if nothing was counted."""
        if not self.tokens:
            raise UserError("no token was counted: update with activations whose mask is true somewhere")

    def _add(self, rows: Tensor) -> Moments:
        moments = self
        for part in torch.split(rows, max(1, _CHUNK // max(rows.shape[1], 1))) if len(rows) else ():
            wide = part.double()
            mean = wide.mean(0)
            moments = Moments(len(part), mean, (wide - mean).square().sum(0)).merge(moments)
        return moments


@dataclass(frozen=True, kw_only=True)
class ReconstructionResult:
    """What `Reconstruction` found. Units: squared units of the activations before any scaling."""

    tokens: int
    mse: float
    """Mean over tokens and dimensions of the squared error."""
    fvu: float
    """Fraction of variance unexplained: squared error over squared distance from the mean of all tokens, each summed up."""
    normalized_mse: float
    """MSE over the fixed normalizer; over the stream's own variance, where it is the FVU, if none was given."""
    gamma: float
    """The input diagnostic of `Moments.gamma`."""

    @property
    def explained_variance(self) -> float:
        """`1 - fvu`: 0 for predicting the mean, 1 for a perfect reconstruction, below 0 for worse than the mean."""
        return 1 - self.fvu


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """Pooled reconstruction error of a stream; `scale` is what the activations were multiplied by before they came here."""

    inputs: Moments
    error: Tensor
    """Float64 scalar: the summed squared error."""
    scale: float = 1.0

    @classmethod
    def start(cls, hidden: int, *, scale: float = 1.0) -> Reconstruction:
        """Nothing seen. With `scale`, x and x_hat are divided by it, so that MSE is in the model's own units."""
        if not 0 < scale < math.inf:
            raise UserError(f"the scale {scale} of the activations must be above 0: give 1 if they were not scaled")
        return cls(Moments.start(hidden), torch.zeros((), dtype=torch.float64), scale)

    def update(self, x: Tensor, x_hat: Tensor, *, mask: Tensor | None = None) -> Reconstruction:
        """With x and x_hat (tokens, hidden), where the (tokens,) boolean `mask` is true."""
        if x.shape != x_hat.shape:
            raise UserError(f"activations {tuple(x.shape)} met reconstructions {tuple(x_hat.shape)}: give equal shapes")
        hidden = len(self.inputs.mean)
        rows, hats = counted(x, mask, hidden, "activations"), counted(x_hat, mask, hidden, "reconstructions")
        error = self.error.to(rows.device)
        chunk = max(1, _CHUNK // max(hidden, 1))
        for row, hat in zip(torch.split(rows, chunk), torch.split(hats, chunk), strict=True):
            error = error + (row.double() - hat.double()).square().sum()
        return replace(self, inputs=self.inputs._add(rows), error=error)

    def merge(self, other: Reconstruction) -> Reconstruction:
        """Of both streams together."""
        if other.scale != self.scale:
            raise UserError(f"scales {self.scale} and {other.scale} cannot be merged: give both streams the same")
        return replace(
            self, inputs=self.inputs.merge(other.inputs), error=self.error + other.error.to(self.error.device)
        )

    def all_reduce(self) -> Reconstruction:
        """Of all processes' streams together, the same on each. Three collectives."""
        return replace(self, inputs=self.inputs.all_reduce(), error=sum_everywhere(self.error))

    def result(self, *, variance: float | None = None) -> ReconstructionResult:
        """The figures; `variance` is the normalizer fixed before training (`SparseAutoencoder.variance`).

        Raises UserError if no token was counted, or if all tokens are equal, so that there is no variance to explain.
        """
        own = self.inputs.variance() / self.scale**2
        mse = float(self.error) / (self.inputs.tokens * len(self.inputs.mean)) / self.scale**2
        if not own:
            raise UserError(
                f"the {self.inputs.tokens} tokens counted do not differ: give more, to have variance to explain"
            )
        if variance is not None and not 0 < variance < math.inf:
            raise UserError(f"the normalizer {variance} is not a variance: give what start_from found, or leave it out")
        return ReconstructionResult(
            tokens=self.inputs.tokens,
            mse=mse,
            fvu=mse / own,
            normalized_mse=mse / (own if variance is None else variance),
            gamma=self.inputs.gamma(),
        )


def counted(x: Tensor, mask: Tensor | None, width: int, what: str) -> Tensor:
    """The rows of x (tokens, width) that count, detached; UserError for other shapes and what is not finite."""
    if x.ndim != 2 or x.shape[1] != width:
        raise UserError(f"{what} of shape {tuple(x.shape)}: give (tokens, {width}), the batch flattened")
    if mask is not None:
        if mask.shape != x.shape[:1] or mask.dtype != torch.bool:
            raise UserError(
                f"the mask is {mask.dtype} of shape {tuple(mask.shape)}: give one boolean for each of {len(x)} tokens"
            )
        x = x[mask.to(x.device)]
    rows = x.detach()
    bad = int((~rows.isfinite()).any(1).sum()) if rows.numel() else 0
    if bad:
        raise UserError(
            f"{bad} of {len(rows)} rows of the {what} hold NaN or infinity: mask them, or see what diverged"
        )
    return rows
