"""A filter on the forget gradient: its leading singular directions are collapsed, so that no few directions carry the forgetting.

What a few directions of the weights can hide, a few steps of training bring back. Badge: **reconstruction**, after RepSelect
(arXiv 2606.17168), which divides the leading directions of one summed forget gradient by their strength; here each step's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lm.errors import UserError
from lm.shards import scatter_into


@dataclass(frozen=True, kw_only=True)
class GradientFilter:
    """Which directions of a matrix's forget gradient are collapsed: to the strength of the strongest that is not."""

    share: float = 0.1
    """Of the smaller side of the matrix, rounded up: so many leading singular directions."""

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise UserError(f"trainer.gradient_filter.share is {self.share}: give a share between 0 and 1")

    @torch.no_grad()
    def apply(self, parameters: Iterable[nn.Parameter]) -> None:
        """Filter the `.grad` of every matrix in place; every process must call it. What is no matrix stays as it is."""
        for parameter in parameters:
            gradient = parameter.grad
            if gradient is None or gradient.ndim != 2 or min(gradient.shape) < 2:
                continue
            whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
            scatter_into(gradient, collapsed(whole, self.share))


def collapsed(matrix: Tensor, share: float) -> Tensor:
    """The matrix with its first `ceil(share * smaller side)` singular values lowered to the next one.

    Computed in float64: squares lose half the digits.
    """
    wide = matrix.double()
    turned = wide.shape[0] > wide.shape[1]
    wide = wide.T if turned else wide
    count = min(math.ceil(share * len(wide)), len(wide) - 1)
    strengths, directions = torch.linalg.eigh(wide @ wide.T)  # rising
    singular = strengths.clamp(min=0.0).sqrt()
    leading, next_one = singular[-count:], singular[-count - 1]
    taken = torch.where(leading > 0, 1.0 - next_one / leading.clamp(min=torch.finfo(wide.dtype).tiny), 0.0)
    basis = directions[:, -count:]
    filtered = wide - (basis * taken) @ (basis.T @ wide)
    result: Tensor = (filtered.T if turned else filtered).to(torch.promote_types(matrix.dtype, torch.float32))
    return result
