"""What synthetic activations are made of: directions, how often each fires, with what and how strongly.

After SynthSAEBench (arXiv 2602.14687 and the documentation of SAELens): Zipfian firing between two given densities, a
low-rank Gaussian copula, a forest in which a child fires only with its parent and siblings exclude each other,
magnitudes that follow the parent's. Badge: **variant**: the forest fills the ranks level by level, so that a parent is at
least as common as its children; directions are independent, without a step that spreads them; the default is a quarter
of the benchmark's size. `sae.synthetic.stream` deals it out in batches: the source that a config names, and its stream.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property, lru_cache

import torch
from einops import rearrange
from torch import Tensor

from lm.errors import UserError
from sae.activations.batch import generator
from sae.gao_recipe import unit_rows
from sae.sparse_code import SparseCode, decode

_CHUNK = 1 << 22
"""Possible matches drawn together. Part of what a seed means: another value, other draws."""


@dataclass(frozen=True, kw_only=True)
class World:
    """What the activations `x = bias + sum_i a_i d_i + noise` are made of: known unit directions d_i and how each fires."""

    features: int = 4096
    """True features; more than `hidden` is superposition."""
    hidden: int = 256
    """Width of the activations."""
    exponent: float = 0.5
    """Of Zipf's law of firing."""
    most: float = 0.4
    """Density of the commonest feature."""
    least: float = 5e-4
    """Density of the rarest. The law is stretched to meet both."""
    roots: int = 32
    """Trees of the hierarchy: the commonest features. 0 for none."""
    branching: int = 4
    """Children of a feature."""
    depth: int = 3
    """Levels below the roots. Features that no tree holds are on their own."""
    exclusive: bool = True
    """Of the children of a feature, at most one fires: if more would, one is drawn. Their densities fall below the law."""
    follow: bool = True
    """A child's magnitude is multiplied with its parent's, over the parent's mean."""
    rank: int = 25
    """Of the copula by which features correlate; 0: they are independent but for the hierarchy."""
    correlation: float = 0.1
    """Deviation of the copula's factors: correlations of about `correlation**2 * sqrt(rank)`."""
    strongest: float = 5.0
    """Mean magnitude of the commonest feature."""
    weakest: float = 4.0
    """Mean magnitude of the rarest; linear in rank between."""
    spread: float = 0.5
    """A feature's magnitude has the deviation |n|, n normal with this mean and deviation."""
    noise: float = 0.0
    """Deviation of normal noise in each dimension."""
    bias: float = 0.5
    """Length of the constant that is added."""
    seed: int = 0
    """Of the world: directions, magnitudes, correlations."""

    def __post_init__(self) -> None:
        if self.features < 1 or self.hidden < 1 or min(self.roots, self.depth, self.rank) < 0 or self.branching < 1:
            raise UserError(
                f"a world of {self.features} features in {self.hidden} dimensions, {self.roots} trees of {self.depth} levels "
                f"and branching {self.branching}, rank {self.rank} cannot be: give sizes from 1, the rest from 0"
            )
        if not 0 < self.least <= self.most <= 1 or self.exponent < 0:
            raise UserError(
                f"densities from {self.least} to {self.most} with exponent {self.exponent}: give 0 < least <= most <= 1 and "
                "an exponent from 0"
            )
        if min(self.strongest, self.weakest) <= 0 or min(self.spread, self.noise, self.bias, self.correlation) < 0:
            raise UserError("magnitudes must be above 0; spread, noise, bias and correlation not below it: check them")
        if (held := sum(self.levels)) > self.features:
            raise UserError(
                f"the hierarchy holds {held} features and there are {self.features}: give fewer roots, levels or children"
            )

    @property
    def levels(self) -> tuple[int, ...]:
        """How many features each level of the hierarchy holds, the roots first; they stand in this order, by rank."""
        return tuple(self.roots * self.branching**level for level in range(self.depth + 1)) if self.roots else ()


def firing_law(features: int, *, exponent: float, most: float, least: float) -> Tensor:
    """(features,) float64, never rising, from `most` to `least`: `r ** -exponent` for rank r, shifted and stretched to that.

    Source: SAELens' Zipfian firing probabilities. Badge: **faithful**.
    """
    law = torch.arange(1, features + 1, dtype=torch.float64) ** -exponent
    span = float(law[0] - law[-1])
    return least + (most - least) * (law - law[-1]) / span if span else torch.full_like(law, most)


def truth_of(world: World) -> Truth:
    """The parts of a world, or of the world that a source (`Synthetic`) draws from, whatever its `draw` and `site`."""
    return _truth(World(**{field.name: getattr(world, field.name) for field in fields(World)}))


@lru_cache(maxsize=4)
def _truth(world: World) -> Truth:
    return Truth(world)


class Truth:
    """The parts of a world, on the CPU."""

    def __init__(self, spec: World) -> None:
        self.spec = spec
        count = spec.features
        make = generator("synthetic", "world", spec.seed)
        self.directions = unit_rows(torch.randn(count, spec.hidden, generator=make))
        """(features, hidden) float32, rows of length 1, the commonest feature first."""
        self.deviations = (spec.spread * (1 + torch.randn(count, generator=make))).abs()
        """(features,): deviation of each magnitude."""
        bias = torch.randn(spec.hidden, generator=make)
        self.bias = spec.bias * bias / bias.norm()
        """(hidden,): the mean if nothing fires."""
        factors = spec.correlation * torch.randn(count, spec.rank, generator=make)
        lengths = factors.norm(dim=1, keepdim=True)
        self.factors = torch.where(lengths > 0.99, 0.99 * factors / lengths.clamp(min=1e-9), factors)
        """(features, rank): of the copula; the rest of each feature's unit variance is its own."""
        self.means = torch.linspace(spec.strongest, spec.weakest, count)
        """(features,): mean magnitude."""
        self.law = firing_law(count, exponent=spec.exponent, most=spec.most, least=spec.least)
        """(features,) float64: density of each feature, if siblings did not exclude each other."""
        self.parents = _parents(spec)
        """(features,) int64: -1 for none."""

    @cached_property
    def chances(self) -> Tensor:
        """(features,) float64: how likely each feature fires, given its parent does."""
        above = torch.where(self.parents >= 0, self.law[self.parents.clamp(min=0)], 1.0)
        return (self.law / above).clamp(max=1)

    def codes(self, tokens: int, *parts: int | str) -> SparseCode:
        """What fires in `tokens` tokens, and how strongly: the same for the same `parts`."""
        draw = generator("synthetic", "tokens", self.spec.seed, *parts)
        step = max(1, _CHUNK // self.spec.features)
        parts_of_batch = [self._values(min(step, tokens - start), draw) for start in range(0, tokens, step)]
        rows, columns = (
            torch.cat(
                [index[axis] + (start * step if axis == 0 else 0) for start, (index, _) in enumerate(parts_of_batch)]
            )
            for axis in range(2)
        )
        values = torch.cat([value for _, value in parts_of_batch])
        return SparseCode.from_matches(rows, columns, values, shape=(tokens, self.spec.features))

    def activations(self, code: SparseCode) -> Tensor:
        """(tokens, hidden) float32, without noise."""
        return decode(code, self.directions, self.bias)

    def _values(self, tokens: int, draw: torch.Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        fires = self._fires(tokens, draw)
        where = torch.nonzero(fires, as_tuple=True)
        sizes = self.means[where[1]] + self.deviations[where[1]] * torch.randn(len(where[1]), generator=draw)
        values = torch.zeros(tokens, self.spec.features)
        values[where] = sizes.clamp(min=0)
        for upper, lower in _families(self.spec):
            held = values[:, upper] / self.means[upper] if self.spec.follow else (values[:, upper] > 0).float()
            values[:, lower] *= held.repeat_interleave(self.spec.branching, 1)
        strengths = values[where]
        positive = strengths > 0
        return (where[0][positive], where[1][positive]), strengths[positive]

    def _fires(self, tokens: int, draw: torch.Generator) -> Tensor:
        """(tokens, features) boolean."""
        shape = (tokens, self.spec.features)
        if self.spec.rank:
            own = (1 - self.factors.square().sum(1)).sqrt()
            shared = torch.randn(tokens, self.spec.rank, generator=draw)
            scores = torch.addmm(torch.randn(shape, generator=draw).mul_(own), shared, self.factors.T)
            fires: Tensor = scores < torch.special.ndtri(self.chances).float()
        else:
            fires = torch.rand(shape, generator=draw) < self.chances.float()
        for upper, lower in _families(self.spec):
            children = rearrange(
                fires[:, lower], "tokens (parents children) -> tokens parents children", children=self.spec.branching
            )
            family = children & fires[:, upper].unsqueeze(2)
            if self.spec.exclusive:
                drawn = (torch.rand(family.shape, generator=draw) + 1).mul_(family).argmax(2, keepdim=True)
                family &= torch.zeros_like(family).scatter_(2, drawn, True)
            fires[:, lower] = rearrange(family, "tokens parents children -> tokens (parents children)")
        return fires


def _families(spec: World) -> list[tuple[slice, slice]]:
    """Each level but the last, and the one below it."""
    starts = [0]
    for size in spec.levels:
        starts.append(starts[-1] + size)
    return [(slice(a, b), slice(b, c)) for a, b, c in zip(starts, starts[1:], starts[2:], strict=False)]


def _parents(spec: World) -> Tensor:
    parents = torch.full((spec.features,), -1)
    for upper, lower in _families(spec):
        parents[lower] = torch.arange(upper.start, upper.stop).repeat_interleave(spec.branching)
    return parents
