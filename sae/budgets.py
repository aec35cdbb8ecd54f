"""How many tokens each feature may take: Zipf laws of firing density, their fit to measured densities, whole budgets.

Feature Choice gives feature i a budget m_i; the paper (arXiv 2411.02124) sets it by a Zipf distribution, whose
parameters and rounding are not known here. Badge of the module: **reconstruction**, but for `uniform_budgets`. The law
is fitted to measured densities, never assumed. Everything is float64 or integer arithmetic on the CPU, done seldom;
nothing here selects (`sae.allocate` does) or keeps running statistics.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from lm.errors import UserError

_SMALLEST = 1e-300
"""Density of a feature to which a law gives next to nothing."""
_LARGEST = 700.0
"""Of log C: densities that fall off exponentially fit ever larger shifts, and C must stay a float."""


@dataclass(frozen=True, kw_only=True)
class ZipfLaw:
    """Expected density of the feature of rank r = 1..F: `q_r = min(1, C (r + beta)^(-alpha))`, with `sum q_r = k`.

    C is found by water-filling. `beta = 0` is Zipf's law, `beta > 0` Mandelbrot's shift of it. Badge: **reconstruction**.
    """

    features: int
    """The width F of the dictionary."""
    k: int
    """Mean number of active features a token (L0)."""
    alpha: float = 1.0
    """The exponent; 0 is uniform."""
    beta: float = 0.0
    """Mandelbrot's shift of the rank."""

    def __post_init__(self) -> None:
        if not 1 <= self.k <= self.features:
            raise UserError(f"k = {self.k} active features of {self.features}: give k from 1 to the number of features")
        if not (0 <= self.alpha < math.inf and -1 < self.beta < math.inf):
            raise UserError(f"a Zipf law of alpha = {self.alpha} and beta = {self.beta}: give alpha >= 0 and beta > -1")

    def densities(self) -> Tensor:
        """(features,) float64, never rising; their sum is k. Unit: the share of tokens on which a feature fires."""
        ranks = torch.arange(1, self.features + 1, dtype=torch.float64)
        logs = -self.alpha * ((ranks + self.beta) / (1 + self.beta)).log()
        return _fill(logs, float(self.k), _SMALLEST, 1.0)

    def smallest_batch(self) -> int:
        """The smallest global batch, in tokens, in which the rarest feature is due a whole token."""
        return max(1, math.ceil(1 / float(self.densities()[-1]) - 1e-9))


@dataclass(frozen=True, kw_only=True)
class ZipfFit:
    """A Zipf-Mandelbrot law fitted to measured densities, and how well it fits where."""

    alpha: float
    beta: float
    scale: float
    """C: the fitted density of rank r is `scale * (r + beta) ** -alpha`."""
    features: int
    used: int
    """How many features, from the top, the fit rests on."""
    saturated: int
    """Features left out at the top because they fire on every token, where the law is capped."""
    low_end: int
    """Features left out at the bottom although they fire."""
    dead: int
    """Features that never fired, or not often enough to measure."""
    residual: float
    """Root mean square of log(measured / fitted) over the used features, in nats."""
    at_bound: bool
    """The shift is the largest allowed: densities fall off too late for such a law, and alpha means little."""
    r_squared: float
    """Share of the variance of log density over the used features that the law explains."""
    low_end_misfit: float
    """Mean of log(measured / fitted) over the left-out low end, in nats; below 0: rarer than the law. NaN if empty."""

    def law(self, k: int) -> ZipfLaw:
        """The law of this shape whose densities sum to k over all features, the dead ones too."""
        return ZipfLaw(features=self.features, k=k, alpha=self.alpha, beta=self.beta)


def fit_zipf(
    densities: Tensor, *, low_end: float = 0.2, least: float = 0.0, shift: bool = True, max_shift: float = 1e4
) -> ZipfFit:
    """Fit `log q_r = log C - alpha log(r + beta)` by least squares over ranks, on the live part without its low end.

    `densities` is (features,), shares of tokens in [0, 1], in any order. `low_end` is the share of live features left
    out at the bottom (the paper's reviewers report that the law breaks there); features at or below `least` count as
    dead (set it to a few firings over the tokens counted). `shift=False` keeps beta at 0. Badge: **reconstruction**.
    """
    measured = densities.detach().to("cpu", torch.float64).flatten().sort(descending=True).values
    if not bool(((measured >= 0) & (measured <= 1)).all()):
        raise UserError(
            f"densities from {float(measured.min()):g} to {float(measured.max()):g} are not between 0 and 1: divide the firing "
            "counts by the number of tokens"
        )
    if not 0 <= low_end < 1:
        raise UserError(
            f"low_end = {low_end} is not a share: give the part of the live features to leave out, 0 to below 1"
        )
    live = int((measured > max(least, 0.0)).sum())
    saturated = int((measured >= 1).sum())
    end = saturated + math.ceil((live - saturated) * (1 - low_end))
    if end - saturated < 3:
        raise UserError(f"{live} live features leave {end - saturated} to fit a law to: measure more tokens")
    ranks = torch.arange(1, live + 1, dtype=torch.float64)
    logs = measured[:live].log()
    used = slice(saturated, end)

    def line(beta: float) -> tuple[float, float, float]:
        """(squared error, alpha, log C) of the best line for this shift."""
        log_ranks = (ranks[used] + beta).log()
        centered = log_ranks - log_ranks.mean()
        slope = float((centered * logs[used]).sum() / centered.square().sum())
        alpha = max(0.0, -slope)
        log_scale = float((logs[used] + alpha * log_ranks).mean())
        error = float((logs[used] - log_scale + alpha * log_ranks).square().sum())
        return error + max(0.0, log_scale - _LARGEST), alpha, log_scale

    beta = _best_shift(lambda value: line(value)[0], max_shift) if shift else 0.0
    error, alpha, log_scale = line(beta)
    misfit = logs[end:live] - log_scale + alpha * (ranks[end:live] + beta).log()
    spread = float((logs[used] - logs[used].mean()).square().sum())
    return ZipfFit(
        alpha=alpha,
        beta=beta,
        scale=math.exp(log_scale),
        features=measured.numel(),
        used=end - saturated,
        saturated=saturated,
        low_end=live - end,
        dead=measured.numel() - live,
        residual=math.sqrt(error / (end - saturated)),
        at_bound=shift and beta >= 0.999 * max_shift,
        r_squared=1 - error / spread if spread else 1.0,
        low_end_misfit=float(misfit.mean()) if live > end else math.nan,
    )


def uniform_budgets(*, features: int, k: int, batch: int) -> Tensor:
    """(features,) int64 with sum `k * batch`: equal, but for a remainder given to the first ones. Badge: **faithful**.

    `batch` is the global batch in tokens.
    """
    if k > features:
        raise UserError(f"k = {k} active features of {features}: give k no larger than the number of features")
    if k * batch < features:
        raise _too_small(batch, -(-features // k), features)
    each, extra = divmod(k * batch, features)
    return torch.full((features,), each).add_((torch.arange(features) < extra).long())


def zipf_budgets(law: ZipfLaw, *, batch: int, rare: Literal["refuse", "floor"] = "refuse") -> Tensor:
    """(features,) int64 by *rank*: `m_r ~ batch * q_r`, from 1 to `batch`, with sum exactly `k * batch`.

    Rounded by largest remainder, ties to the lower rank. A batch in which the rarest feature is due less than one token
    is refused, with the size that is needed; `rare="floor"` gives such features one token and takes that from the
    others in proportion, a departure from the law. `by_density` turns ranks into features. Badge: **reconstruction**.
    """
    total = law.k * batch
    if rare == "floor":
        if total < law.features:
            raise _too_small(batch, -(-law.features // law.k), law.features)
    elif batch < law.smallest_batch():
        raise _too_small(batch, law.smallest_batch(), law.features)
    shares = law.densities()
    real = _fill(shares.log(), float(total), 1.0, float(batch)) if rare == "floor" else shares * batch
    return _whole(real, total, least=1, most=batch)


def rescaled(budgets: Tensor, *, batch: int, to: int) -> Tensor:
    """(features,) int64: the mean of (cycle, features) `budgets` of a `batch`, for a batch of `to` tokens, with L0 unchanged.

    The sum is that of the mean times `to / batch`, rounded; one token at least for each feature where that is enough for
    all, which the others then pay in proportion. Badge: **reconstruction**.
    """
    due = budgets.double().mean(0).cpu() * to / batch
    total = round(float(due.sum()))
    least = 1 if total >= len(due) else 0
    if least:
        due = _fill(due.clamp(min=_SMALLEST).log(), float(total), 1.0, float(to))
    return _whole(due, total, least=least, most=to)


def _whole(real: Tensor, total: int, *, least: int, most: int) -> Tensor:
    """Whole numbers from `least` to `most` with this sum, by largest remainder, ties to the first."""
    low = (real + 1e-9).floor().clamp(least, most)
    order = torch.sort(real - low, descending=True, stable=True).indices
    budgets = low.long()
    budgets[order[: max(total - int(low.sum()), 0)]] += 1
    return budgets


def carried_budgets(law: ZipfLaw, *, batch: int, micro_batches: int) -> Tensor:
    """(micro_batches, features) int64 by rank: the budgets of a batch `micro_batches` times as large, dealt out evenly.

    Row t is for the t-th batch of a cycle. Every row sums to `k * batch`; every column sums to that rank's budget in
    the large batch (so at least 1), and a column's entries differ by at most one. With cumulative budgets Q_r and n
    rows, `m[t, r] = (Q_r + t) // n - (Q_(r-1) + t) // n`: no running state, so resuming needs only the step number.
    The tokens chosen are still the best of each micro-batch, not of the large batch. Badge: **reconstruction**.
    """
    if micro_batches < 1:
        raise UserError(f"budgets carried over {micro_batches} micro-batches: give 1 or more")
    needed = -(-law.smallest_batch() // batch)
    if micro_batches < needed:
        raise UserError(
            f"{micro_batches} micro-batches of {batch} tokens are too few for the rarest of {law.features} features: "
            f"carry the budgets over {needed}"
        )
    ends = zipf_budgets(law, batch=batch * micro_batches).cumsum(0)
    steps = torch.arange(micro_batches).unsqueeze(1)
    cumulative = (torch.cat([ends.new_zeros(1), ends]) + steps) // micro_batches
    return cumulative.diff(dim=1)


def ranks_of(densities: Tensor) -> Tensor:
    """(features,) int64: the rank, from 0, of each feature by falling density; ties to the lower feature."""
    order = torch.sort(densities.detach(), descending=True, stable=True).indices
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def by_density(ranked: Tensor, densities: Tensor) -> Tensor:
    """`ranked` (..., features), in order of rank, dealt out to features by their measured (features,) densities.

    Serves budgets (`zipf_budgets`, `carried_budgets`) and expected densities (`ZipfLaw.densities`) alike.
    """
    return ranked[..., ranks_of(densities).to(ranked.device)]


def _too_small(batch: int, needed: int, features: int) -> UserError:
    return UserError(
        f"a batch of {batch} tokens is too small for {features} features: the rarest is due less than one token; "
        f"use at least {needed} tokens, or carry the budgets over {-(-needed // max(batch, 1))} micro-batches"
    )


def _fill(logs: Tensor, total: float, low: float, high: float) -> Tensor:
    """`clip(c * exp(logs), low, high)` with c such that the sum is `total`; float64. In logarithms, so that laws that fall
    over hundreds of orders of magnitude are filled too."""

    def at(shift: float) -> Tensor:
        return (logs + shift).clamp(math.log(low), math.log(high)).exp()

    floor, ceiling = math.log(low) - float(logs.max()), math.log(high) - float(logs.min())
    for _ in range(100):
        middle = (floor + ceiling) / 2
        if float(at(middle).sum()) < total:
            floor = middle
        else:
            ceiling = middle
    filled = at(ceiling)
    free = (filled > low) & (filled < high)
    if bool(free.any()):
        filled[free] *= (total - float(filled[~free].sum())) / float(filled[free].sum())
    return filled.clamp(low, high)


def _best_shift(error: Callable[[float], float], max_shift: float) -> float:
    """The shift in [0, max_shift] of least error: a coarse search over log(1 + shift), then a fine one about its best."""
    grid = torch.linspace(0, math.log1p(max_shift), 65, dtype=torch.float64).tolist()
    best = min(range(len(grid)), key=lambda index: error(math.expm1(grid[index])))
    bounds = (grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)])
    fine = minimize_scalar(
        lambda value: error(math.expm1(value)), bounds=bounds, method="bounded", options={"xatol": 1e-9}
    )
    least = min((grid[best], float(fine.x)), key=lambda value: error(math.expm1(value)))
    return math.expm1(least)
