"""Rules that pick layers from their mean scores. One rule, one small class; how sure a pick is, is `tracing.plan.evidence`.

All of them work on many profiles at once, (..., layers), since each is also asked what it would pick on other facts. Equal
scores are ordered by layer, the lowest first. None is published for causal tracing (badge: *reconstruction*): the authors of the
joint method read their layers off a picture.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from lm.config import known_or_near
from lm.errors import UserError
from tracing.arrays import Array

RuleName = Literal["band", "top", "mass", "elbow", "permutation"]
"""`band`: neighboring layers, as many as asked, with the largest sum; `top`: the best ones wherever they stand; `mass`: the
fewest that hold a share of all positive effect; `elbow`: those before the bend of the sorted scores; `permutation`: those that
stand out from shuffled layers (`tracing.plan.permutation`)."""

Mask = npt.NDArray[np.bool_]


class Rule(ABC):
    """Picks layers, and says by how much a pick beats what was not picked."""

    measure = "mean effect"
    rivals = "other layers"
    again = "like layers win"
    """What is compared, with what, and what it means to come out alike, in words."""

    @abstractmethod
    def said(self, layers: int) -> str:
        """The rule in words, to be followed by what is scored."""

    @abstractmethod
    def pick(self, profiles: Array) -> Mask:
        """(..., layers) scores -> (..., layers), which layers are chosen: at least one."""

    def margin(self, profiles: Array, chosen: Mask) -> Array:
        """(...): the mean score of the chosen layers less that of the others; NaN where there are no others."""
        return _mean(profiles, chosen) - _mean(profiles, ~chosen)


@dataclass(frozen=True)
class Band(Rule):
    """The `size` neighboring layers with the largest sum; of equal bands the lowest."""

    size: int
    measure = "effect"
    rivals = "other bands"
    again = "a like band wins"

    def said(self, layers: int) -> str:
        return f"the contiguous band of {self.size} of {layers} layers with the largest summed"

    def sums(self, profiles: Array) -> Array:
        """Of every band: (..., layers) -> (..., layers - size + 1)."""
        bands: Array = np.lib.stride_tricks.sliding_window_view(profiles, self.size, axis=-1).sum(axis=-1)
        return bands

    def pick(self, profiles: Array) -> Mask:
        start = self.sums(profiles).argmax(axis=-1)[..., None]
        layer = np.arange(profiles.shape[-1])
        return np.asarray((layer >= start) & (layer < start + self.size))

    def margin(self, profiles: Array, chosen: Mask) -> Array:
        """(...): the sum of the chosen band less the mean of all other bands' sums."""
        bands = self.sums(profiles)
        own = np.take_along_axis(bands, np.broadcast_to(chosen.argmax(axis=-1)[..., None], (*bands.shape[:-1], 1)), -1)
        others = bands.shape[-1] - 1
        return np.asarray(own[..., 0] - (bands.sum(axis=-1) - own[..., 0]) / others if others else own[..., 0] * np.nan)


@dataclass(frozen=True)
class Top(Rule):
    """The `size` best layers, wherever they stand."""

    size: int

    def said(self, layers: int) -> str:
        return f"the {self.size} of {layers} layers with the highest"

    def pick(self, profiles: Array) -> Mask:
        return _first(_order(profiles), np.full(profiles.shape[:-1], self.size))


@dataclass(frozen=True)
class Mass(Rule):
    """The fewest layers that hold `share` of the sum of all positive scores; the best one where none is positive."""

    share: float

    def said(self, layers: int) -> str:
        return f"the fewest of {layers} layers that hold {self.share:.0%} of the summed positive"

    def pick(self, profiles: Array) -> Mask:
        order = _order(profiles)
        held = np.maximum(np.take_along_axis(profiles, order, axis=-1), 0).cumsum(axis=-1)
        asked = self.share * held[..., -1:] * (1 - 1e-12)  # a sum of the same numbers may be rounded otherwise
        return _first(order, 1 + (held < asked).sum(axis=-1))


@dataclass(frozen=True)
class Elbow(Rule):
    """The layers before the bend of the sorted scores: before the point that lies farthest under the line from the highest to the
    lowest score (the distance of Satopää et al. 2011's Kneedle, without its smoothing)."""

    def said(self, layers: int) -> str:
        return f"of {layers} layers those before the elbow of the sorted"

    def pick(self, profiles: Array) -> Mask:
        if profiles.shape[-1] == 1:
            return np.ones(profiles.shape, dtype=np.bool_)
        order = _order(profiles)
        ranked = np.take_along_axis(profiles, order, axis=-1)
        along = np.linspace(0, 1, profiles.shape[-1])
        under = ranked[..., :1] + (ranked[..., -1:] - ranked[..., :1]) * along - ranked
        return _first(order, 1 + under[..., 1:].argmax(axis=-1))


def usual_size(model_layers: int) -> int:
    """Three eighths of the layers, as the authors of the joint method take (6 of 16)."""
    return max(1, round(model_layers * 3 / 8))


def make_rule(name: str, *, size: int | None, share: float, layers: int) -> Rule | None:
    """The rule of that name for a model of so many layers; None for `permutation`, which picks by a test.

    Raises:
        UserError: an unknown name, a size that does not fit or is not wanted, a share that is none.
    """
    if name not in get_args(RuleName):
        known = get_args(RuleName)
        raise UserError(
            f"the plan's rule {name!r} is unknown{known_or_near(name, known)}: use one of {', '.join(known)}"
        )
    check_rule(name, size, share)
    if size is not None and size > layers:
        raise UserError(f"the plan's size is {size} but the model has {layers} layers: give 1 to {layers}")
    if name in ("band", "top"):
        size = usual_size(layers) if size is None else size
        return Band(size) if name == "band" else Top(size)
    return {"mass": Mass(share), "elbow": Elbow(), "permutation": None}[name]


def check_rule(name: str, size: int | None, share: float) -> None:
    """Raise UserError for settings that no model could satisfy."""
    if size is not None and size < 1:
        raise UserError(f"the plan's size is {size}: give at least 1")
    if size is not None and name not in ("band", "top"):
        raise UserError(f"the plan's rule {name} finds how many layers there are: leave size ({size}) out")
    if not 0 < share <= 1:
        raise UserError(f"the plan's share is {share}: give a share above 0 and up to 1 (0.5 is usual)")


def _order(profiles: Array) -> npt.NDArray[np.int64]:
    return np.argsort(-profiles, axis=-1, kind="stable")


def _first(order: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]) -> Mask:
    """The first so many of each order, as a mask over layers."""
    chosen = np.zeros(order.shape, dtype=np.bool_)
    np.put_along_axis(chosen, order, np.arange(order.shape[-1]) < np.asarray(counts)[..., None], axis=-1)
    return chosen


def _mean(profiles: Array, among: Mask) -> Array:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(among, profiles, 0.0).sum(axis=-1) / among.sum(axis=-1))
