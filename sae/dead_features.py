"""Which features are dead: counted in training, in tokens of the global batch, from the codes of each step.

On held-out tokens `sae.metrics.feature_usage` counts them. What a loss does about them is in `auxiliary`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lm.errors import UserError
from sae.sparse_code import SparseCode


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
