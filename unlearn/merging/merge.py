"""Unlearning by arithmetic on weights: task vectors, which are what learning something changed, are taken away or joined.

Checkpoints are read a tensor at a time, computed in float32 and rounded once; no model runs. Methods are pure functions
of tensors; files are `unlearn.merging.weight_files`, and the stage from files to files is `unlearn.merging.stage`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lm.errors import UserError
from unlearn.merging.weight_files import Checkpoint

_LOW = 16


@dataclass(frozen=True, kw_only=True)
class Merge:
    """How task vectors `theta_i - theta_0` become one change of the base `theta_0`.

    The axis "merge".
    """

    config_axis: ClassVar[bool] = True

    def check(self, models: int) -> None:
        """Raise UserError for a number of models that the settings do not fit."""

    def thresholds(self, base: Checkpoint, models: Sequence[Checkpoint]) -> tuple[float, ...]:
        """What must be known of whole task vectors before any tensor can be merged: a number a model, or nothing."""
        return ()

    def change(self, vectors: Tensor, thresholds: tuple[float, ...]) -> Tensor:
        """The change of one tensor, from its task vectors (models, ...) in float32."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class TaskArithmetic(Merge):
    """`theta_0 + sum_i weight_i * (theta_i - theta_0)`.

    Negation: one model that was trained further on the forget rows, with a negative weight, is subtracted. Averaging: weights
    that add up to 1. Source: Ilharco et al. 2023 (arXiv 2212.04089); as `tv` in MUSE (arXiv 2407.06460). Badge: **faithful**.
    """

    weights: tuple[float, ...] = (-1.0,)
    """One a model."""

    def check(self, models: int) -> None:
        """One weight a model."""
        if len(self.weights) != models:
            raise UserError(f"method.weights has {len(self.weights)} numbers for {models} models: give one a model")
        if not all(math.isfinite(weight) for weight in self.weights):
            raise UserError(f"method.weights is {self.weights}: give finite numbers")

    def change(self, vectors: Tensor, thresholds: tuple[float, ...]) -> Tensor:
        """The weighted sum."""
        total: Tensor = torch.tensordot(torch.tensor(self.weights), vectors, dims=1)
        return total


@dataclass(frozen=True, kw_only=True)
class Ties(Merge):
    """Trim, elect signs, take disjoint means: `theta_0 + scale * mean of the trimmed changes that have the elected sign`.

    Each task vector keeps its `density` largest changes, counted over the whole model (equals of the smallest of them stay
    too); of what is kept, a weight's sign is that of the sum over models, and 0 if they cancel out. Source: Yadav et al. 2023
    (arXiv 2306.01708). Badge: **faithful**. For two LoRA runs, as ZJUKLAB merged them (arXiv 2503.21088), a **variant**: the
    changes of the weights are merged, where peft merges the low-rank factors, each by itself.
    """

    density: float = 0.2
    """Share of each task vector that is kept."""
    scale: float = 1.0
    """What the merged change is multiplied by."""

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise UserError(f"method.density is {self.density}: give more than 0 and at most 1")
        if not math.isfinite(self.scale):
            raise UserError(f"method.scale is {self.scale}: give a finite number")

    def thresholds(self, base: Checkpoint, models: Sequence[Checkpoint]) -> tuple[float, ...]:
        """For each model the size of the smallest change that is kept."""
        return tuple(_smallest_kept(base, model, self.density) for model in models)

    def change(self, vectors: Tensor, thresholds: tuple[float, ...]) -> Tensor:
        """The scaled disjoint mean of the trimmed changes."""
        least = torch.tensor(thresholds).reshape(-1, *[1] * (vectors.ndim - 1))
        kept = vectors.where(vectors.abs() >= least, 0.0)
        sign = kept.sum(dim=0).sign()
        agrees = (kept.sign() == sign) & (kept != 0)
        return self.scale * kept.where(agrees, 0.0).sum(dim=0) / agrees.sum(dim=0).clamp(min=1)


def merged(
    base: Checkpoint,
    models: Sequence[Checkpoint],
    name: str,
    method: Merge,
    thresholds: tuple[float, ...],
    dtype: torch.dtype | None,
) -> Tensor:
    """One tensor of the result, rounded once: to `dtype`, or else to the base's type. What is no weight must be the same."""
    first = base.read(name)
    if first.is_floating_point():
        change = method.change(torch.stack([task_vector(base, one, name) for one in models]), thresholds)
        return (first.float() + change).to(dtype or first.dtype)
    for model in models:
        if not torch.equal(model.read(name), first):
            raise UserError(
                f"{name}, which is no weight, differs between {model.name} and {base.name}: cannot be merged"
            )
    return first


def task_vector(base: Checkpoint, model: Checkpoint, name: str) -> Tensor:
    """`theta - theta_0` of one tensor, in float32. Raises UserError for one that is not finite."""
    change = model.read(name).float() - base.read(name).float()
    if not bool(change.isfinite().all()):
        raise UserError(f"{name} of {model.name}, or of {base.name}, is not finite: merge checkpoints that work")
    return change


def _smallest_kept(base: Checkpoint, model: Checkpoint, density: float) -> float:
    """The size of the smallest of the `density` largest changes over all tensors, exactly, without holding them.

    Sizes of float32 numbers are in the order of their bits read as integers, so the number is found half by half: a count
    of the upper 16 bits, then one of the lower 16 among those that share the upper ones.
    """
    total = 0
    counts = torch.zeros(1 << _LOW, dtype=torch.long)
    for bits in _sizes(base, model):
        total += len(bits)
        counts += torch.bincount(bits >> _LOW, minlength=len(counts))
    upper, left = _from_above(counts, max(round(density * total), 1))
    counts.zero_()
    for bits in _sizes(base, model):
        counts += torch.bincount(bits[bits >> _LOW == upper] & (len(counts) - 1), minlength=len(counts))
    lower, _ = _from_above(counts, left)
    return float(torch.tensor([(upper << _LOW) + lower], dtype=torch.int32).view(torch.float32))


def _sizes(base: Checkpoint, model: Checkpoint) -> Iterator[Tensor]:
    """(n,) the bits of the sizes of each tensor's changes."""
    for name in base.files:
        if base.read(name).is_floating_point():
            yield task_vector(base, model, name).abs().flatten().view(torch.int32)


def _from_above(counts: Tensor, place: int) -> tuple[int, int]:
    """The bin that the `place`-th largest number falls into, and its place among those of the bin, both from the top."""
    above = counts.flip(0).cumsum(0)
    found = int(torch.searchsorted(above, place))
    return len(counts) - 1 - found, place - (int(above[found - 1]) if found else 0)
