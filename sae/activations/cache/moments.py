"""Mean and variance of activations over a stream, merged without loss: the same for any split into parts."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lm.errors import UserError

_PART = 8192


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, `(hidden,)` mean, and `(hidden,)` sum of squared differences from it; float64."""

    count: int
    mean: Tensor
    squares: Tensor

    @classmethod
    def of(cls, values: Tensor) -> Moments:
        """Of `(tokens, hidden)` with one token or more, a part at a time, so that no wide copy of all is made."""
        total: Moments | None = None
        for begin in range(0, len(values), _PART):
            wide = values[begin : begin + _PART].double()
            mean = wide.mean(0)
            moments = cls(len(wide), mean, (wide - mean).square().sum(0))
            total = moments if total is None else total.merge(moments)
        if total is None:
            raise UserError("no token has no mean: give one or more")
        return total

    def merge(self, other: Moments) -> Moments:
        """Of both together (Chan, Golub and LeVeque 1979)."""
        count = self.count + other.count
        apart = other.mean - self.mean
        return Moments(
            count,
            self.mean + apart * (other.count / count),
            self.squares + other.squares + apart.square() * (self.count * other.count / count),
        )

    @property
    def variance(self) -> Tensor:
        """`(hidden,)`: mean squared difference from the mean."""
        return self.squares / self.count
