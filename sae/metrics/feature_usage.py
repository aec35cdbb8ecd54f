"""How features are used: L0 with the training selection and with exported thresholds, densities, dead and under-used share.

Counted in tokens from `SparseCode`s, as whole numbers, so that no split into batches or processes changes anything and no
(tokens, features) tensor exists. A moving window in training is `sae.Firings`; here the window is what was counted.
L0, densities and dead features as in Gao et al. (2024); under-used against a fitted law is a **reconstruction**.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lm.errors import UserError
from sae.auxiliary import expected_densities, under_use
from sae.budgets import ZipfFit, fit_zipf
from sae.metrics.sums import sum_everywhere
from sae.sparse_code import SparseCode


@dataclass(frozen=True, kw_only=True)
class UsageResult:
    """What `Usage` found."""

    tokens: int
    """How many tokens were counted: the window that `dead_share` is about."""
    l0: float
    """Mean number of features a token that are not zero, by the codes given first: the training selection."""
    l0_exported: float | None
    """The same by the exported thresholds, or None if no such code was given."""
    dead_share: float
    """Share of features that fired on no token counted."""
    under_used_share: float | None
    """Share of features whose density lies below tau times the expected one, the dead among them; None without a law."""

    @property
    def l0_gap(self) -> float | None:
        """`l0_exported - l0`."""
        return None if self.l0_exported is None else self.l0_exported - self.l0


@dataclass(frozen=True, eq=False)
class Usage:
    """Counts of matches and firings a feature. A feature *fires* if its activation exceeds `least`, in the input's units."""

    tokens: int
    counts: Tensor
    """(features,) int64: tokens on which each feature is not zero."""
    firings: Tensor
    """(features,) int64: tokens on which it exceeds `least`."""
    exported_tokens: int = 0
    exported_matches: int = 0
    least: float = 1e-3

    @classmethod
    def start(cls, features: int, *, least: float = 1e-3) -> Usage:
        """Nothing seen. `least` 1e-3 is that of Gao et al.'s released code."""
        return cls(0, torch.zeros(features, dtype=torch.int64), torch.zeros(features, dtype=torch.int64), least=least)

    def update(self, code: SparseCode, *, exported: SparseCode | None = None, mask: Tensor | None = None) -> Usage:
        """With the code of some tokens, and that of the same tokens by exported thresholds; where the mask is true."""
        if exported is not None and exported.tokens != code.tokens:
            raise UserError(f"codes of {code.tokens} and {exported.tokens} tokens: give two codes of the same tokens")
        if self.tokens and (exported is not None) != bool(self.exported_tokens):
            raise UserError(
                "codes by exported thresholds are given for some tokens and not for others: give all or none"
            )
        counts, firings, tokens = self._counts(code, mask)
        updated = replace(
            self,
            tokens=self.tokens + tokens,
            counts=self.counts.to(counts.device) + counts,
            firings=self.firings.to(firings.device) + firings,
        )
        if exported is None:
            return updated
        return replace(
            updated,
            exported_tokens=self.exported_tokens + tokens,
            exported_matches=self.exported_matches + int(self._counts(exported, mask)[0].sum()),
        )

    def merge(self, other: Usage) -> Usage:
        """Of both streams together."""
        if other.counts.shape != self.counts.shape or other.least != self.least:
            raise UserError(
                "counts of other features, or with another least activation, cannot be merged: start them alike"
            )
        return replace(
            self,
            tokens=self.tokens + other.tokens,
            counts=self.counts + other.counts.to(self.counts.device),
            firings=self.firings + other.firings.to(self.firings.device),
            exported_tokens=self.exported_tokens + other.exported_tokens,
            exported_matches=self.exported_matches + other.exported_matches,
        )

    def all_reduce(self) -> Usage:
        """Of all processes' streams together, the same on each. One collective; exact up to 2^53."""
        few = self.counts.new_tensor([self.tokens, self.exported_tokens, self.exported_matches])
        sums = sum_everywhere(torch.cat([few, self.counts, self.firings])).round().long()
        tokens, exported_tokens, exported_matches = sums[:3].tolist()
        counts, firings = sums[3:].chunk(2)
        return Usage(tokens, counts, firings, exported_tokens, exported_matches, self.least)

    def density(self) -> Tensor:
        """(features,) float64: the share of tokens on which each feature is not zero. Their sum is L0."""
        self._require_tokens()
        return self.counts.double() / self.tokens

    def zipf(self, *, least_firings: int = 10, low_end: float = 0.2) -> ZipfFit:
        """The Zipf-Mandelbrot law fitted to the densities of the features with more than `least_firings` firings."""
        return fit_zipf(self.density(), least=least_firings / self.tokens, low_end=low_end)

    def result(
        self, *, expected: Tensor | None = None, tau: float = 0.1, least_tokens: int | None = None
    ) -> UsageResult:
        """The figures. `expected` is (features,) by *rank*: `ZipfLaw.densities()`, or `fitted_densities` of a fit.

        With `tau = 0` the under-used share is that of the features never counted. `least_tokens` refuses a window that is
        shorter than the one meant (10 million tokens is usual): in too few tokens every rare feature looks dead.
        """
        self._require_tokens()
        if least_tokens is not None and self.tokens < least_tokens:
            raise UserError(
                f"{self.tokens} tokens were counted and the dead share is asked for {least_tokens}: count more"
            )
        under = None
        if expected is not None:
            density = self.density()
            due = expected_densities(expected.to(density.device), density)
            under = float((under_use(density, due, tau=tau) > 0).double().mean())
        exported = self.exported_matches / self.exported_tokens if self.exported_tokens else None
        return UsageResult(
            tokens=self.tokens,
            l0=int(self.counts.sum()) / self.tokens,
            l0_exported=exported,
            dead_share=float((self.firings == 0).double().mean()),
            under_used_share=under,
        )

    def _counts(self, code: SparseCode, mask: Tensor | None) -> tuple[Tensor, Tensor, int]:
        if code.features != len(self.counts):
            raise UserError(
                f"a code of {code.features} features met counts of {len(self.counts)}: start the counts anew"
            )
        values, tokens = code.values.detach(), code.tokens
        indices = code.indices
        if mask is not None:
            if mask.shape != (code.tokens,) or mask.dtype != torch.bool:
                raise UserError(
                    f"the mask is {mask.dtype} of shape {tuple(mask.shape)}: give one boolean for each of {tokens} tokens"
                )
            kept = mask.to(indices.device)[code.token_ids()]
            values, indices, tokens = values[kept], indices[kept], int(mask.sum())
        if bool(values.isnan().any()):
            raise UserError("the code holds NaN: training has diverged, or the input is not finite")
        width = code.features
        return (
            torch.bincount(indices[values != 0], minlength=width),
            torch.bincount(indices[values > self.least], minlength=width),
            tokens,
        )

    def _require_tokens(self) -> None:
        if not self.tokens:
            raise UserError("no token was counted: update with codes whose mask is true somewhere")


@dataclass(frozen=True, eq=False, kw_only=True)
class DensityHistogram:
    """How many features have which density, measured and by the fitted law, in equal bins of log10 density."""

    edges: Tensor
    """(bins + 1,) float64: log10 of the bins' edges; the last is 0, every token."""
    measured: Tensor
    """(bins,) int64."""
    expected: Tensor
    """(bins,) int64: the same of the fitted law's densities, over all features."""
    silent: int
    """Features that never fired, in no bin."""
    below: int
    """Features to which the law gives a density below the first edge."""
    fit: ZipfFit


def density_histogram(usage: Usage, *, bins: int = 40, least_firings: int = 10) -> DensityHistogram:
    """The densities beside the Zipf law fitted to them; the first edge is one firing in all the tokens counted."""
    density, fit = usage.density().cpu(), usage.zipf(least_firings=least_firings)
    if bins < 1:
        raise UserError(f"a histogram of {bins} bins: give 1 or more")
    low = float(torch.tensor(1 / (usage.tokens + 1), dtype=torch.float64).log10())
    edges = torch.linspace(low, 0, bins + 1, dtype=torch.float64)
    law = fitted_densities(fit).log10()
    return DensityHistogram(
        edges=edges,
        measured=_fall(density[density > 0].log10(), edges),
        expected=_fall(law[law >= low], edges),
        silent=int((density == 0).sum()),
        below=int((law < low).sum()),
        fit=fit,
    )


def fitted_densities(fit: ZipfFit) -> Tensor:
    """(features,) float64 by rank: `min(1, scale (r + beta)^-alpha)`, the law as fitted, whatever it sums to."""
    ranks = torch.arange(1, fit.features + 1, dtype=torch.float64)
    return (fit.scale * (ranks + fit.beta) ** -fit.alpha).clamp(max=1)


def _fall(values: Tensor, edges: Tensor) -> Tensor:
    bins = len(edges) - 1
    return torch.bincount(torch.bucketize(values, edges, right=True).sub(1).clamp(0, bins - 1), minlength=bins)
