"""Mean and variance of activations over a stream, merged without loss: the same for any split into parts."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, `(hidden,)` mean, and `(hidden,)` sum of squared differences from it; float64."""

    count: int
    mean: Tensor
    squares: Tensor

    @classmethod
    def of(cls, values: Tensor) -> Moments:
        """Of `(tokens, hidden)` with one token or more."""
        wide = values.double()
        mean = wide.mean(0)
        return cls(len(wide), mean, (wide - mean).square().sum(0))

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
