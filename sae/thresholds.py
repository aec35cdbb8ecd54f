"""Thresholds for inference, so that what a token activates does not depend on which other tokens share its batch.

Mutual choice is a single threshold, feature choice one a feature: `by_threshold` applies them, and they are what a
JumpReLU file stores. Two ways to get them: a running average of the smallest chosen activations during training (as
published for BatchTopK) or a calibration on a sample of tokens, which meets the wanted L0 on that sample exactly. The rules
are here, on plain tensors; `sae.trainer.set_thresholds` is where a training sets those of its result.
Everything is float64: sums of many small steps. State is a value that is returned, never changed in place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lm.errors import UserError
from sae.allocate import feature_choice, mutual_choice
from sae.sparse_code import SparseCode


@dataclass(frozen=True, eq=False)
class RunningThreshold:
    """Exponential average of the smallest chosen activation: one for the batch, or one a feature.

    A threshold that has met no activation yet is infinite, so that a feature that never fired does not fire at
    inference; the first activation it meets starts it (the released code starts at 0 or -1 instead and so needs a
    warm-up). An average of smallest values lies a little above the quantile that is meant: with eight tokens a feature
    and batch, normal activations lose some 6 % of L0, a single threshold next to nothing. Calibrate where L0 matters.
    Badge: **faithful** to BatchTopK's rule but for the start; one a feature is a **reconstruction**.
    """

    value: Tensor
    """A float64 scalar, or (features,)."""

    @classmethod
    def start(cls, features: int | None = None) -> RunningThreshold:
        """No activation met yet; one threshold for the batch, or with `features` one for each of them."""
        return cls(torch.full(() if features is None else (features,), math.inf, dtype=torch.float64))

    def update(self, code: SparseCode, *, rate: float = 0.01) -> RunningThreshold:
        """`theta + rate (smallest - theta)`, where the code of this global batch has any positive activation."""
        return self.toward(smallest_chosen(code, per_feature=self.value.ndim == 1), rate=rate)

    def toward(self, smallest: Tensor, *, rate: float = 0.01) -> RunningThreshold:
        """The same from the smallest activation chosen in a global batch (each feature's), infinite where there is none."""
        if not 0 < rate <= 1:
            raise UserError(f"the threshold's rate {rate} is not a share: give a number above 0 and up to 1")
        old = self.value.to(smallest.device)
        if smallest.shape != old.shape:
            raise UserError(f"{old.numel()} thresholds met a code of {smallest.numel()} features: start them anew")
        moved = torch.where(old.isinf(), smallest, old + rate * (smallest - old))
        return RunningThreshold(torch.where(smallest.isinf(), old, moved))


def smallest_chosen(code: SparseCode, *, per_feature: bool) -> Tensor:
    """The smallest positive activation, a float64 scalar or (features,); infinite where there is none."""
    values = code.values.detach().double()
    values = torch.where(values > 0, values, math.inf)
    if per_feature:
        empty = values.new_full((code.features,), math.inf)
        return empty.scatter_reduce(0, code.indices, values, "amin")
    return values.min() if values.numel() else values.new_tensor(math.inf)


def calibrate_mutual(affinity: Tensor, *, k: int) -> Tensor:
    """The float64 scalar above which exactly `k * tokens` affinities of this sample lie, but for ties with it.

    `affinity` is (tokens, features), a sample of the same activations. The threshold stands midway between the last
    affinity that is in and the first that is out. Badge: **reconstruction**.
    """
    return _cut(affinity, mutual_choice(affinity, k * affinity.shape[0]), per_feature=False)


def calibrate_features(affinity: Tensor, budgets: Tensor | int) -> Tensor:
    """(features,) float64: above threshold i lie exactly `budgets[i]` affinities of this sample, but for ties with it.

    The budgets are those of a batch of as many tokens as the sample has. A feature without a positive affinity gets an
    infinite threshold. Badge: **reconstruction**; the paper's rule is not known.
    """
    return _cut(affinity, feature_choice(affinity, budgets), per_feature=True)


def _cut(affinity: Tensor, code: SparseCode, *, per_feature: bool) -> Tensor:
    """Midway between the smallest chosen and the largest left-out positive affinity, or 0 if none is left out."""
    if not affinity.numel():
        raise UserError("there is no token to calibrate thresholds on: give a sample of activations")
    chosen = smallest_chosen(code, per_feature=per_feature)
    rest = affinity.detach().clamp(min=0)
    rest[code.token_ids(), code.indices] = 0
    out = (rest.amax(0) if per_feature else rest.amax()).double()
    return torch.where(chosen.isinf() | (out > 0), (chosen + out) / 2, 0.0)
