"""Which true features a decoder found: the best one-to-one matching by cosine, and whether matched features fire alike.

The mean absolute cosine of the matching is the MCC of SynthSAEBench (mean correlation coefficient of arXiv 2411.13117 and
2505.20254). Badge: **faithful**: the assignment is optimal (Hungarian method of SciPy), never greedy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from lm.errors import UserError
from sae.gao_recipe import unit_rows
from sae.sparse_code import SparseCode


@dataclass(frozen=True, eq=False)
class Matching:
    """Pairs of a learned and a true feature, each in one pair at most, of the largest possible sum of |cosine|."""

    learned: Tensor
    """(pairs,) int64, rising."""
    true: Tensor
    """(pairs,) int64."""
    cosines: Tensor
    """(pairs,) float64: signed, of each pair."""
    truths: int
    """How many true features there are."""

    @property
    def mcc(self) -> float:
        """Mean |cosine| over the pairs, of which there are as many as the smaller side has features: 1 is all found."""
        return float(self.cosines.abs().mean())

    def found(self, least: float = 0.9) -> float:
        """Share of the true features that are in a pair of |cosine| `least` or more."""
        return int((self.cosines.abs() >= least).sum()) / self.truths

    def of_common(self, count: int) -> float:
        """Mean |cosine| of the pairs of true features 0 to `count` - 1, those without a pair counted as 0."""
        return float(self.cosines.abs()[self.true < count].sum()) / min(count, self.truths)


@torch.no_grad()
def match_features(w_dec: Tensor, directions: Tensor) -> Matching:
    """Match a decoder (features, hidden) with true directions (truths, hidden); rows of any length, of 0 match nothing.

    The sign of a direction does not count. Takes (features x truths) float32 of memory, and up to cubic time.
    """
    for name, rows in (("decoder", w_dec), ("directions", directions)):
        if rows.ndim != 2 or not len(rows) or rows.shape[1] != directions.shape[1] or not bool(rows.isfinite().all()):
            raise UserError(
                f"the {name} {tuple(rows.shape)} cannot be matched: give finite rows, all of one width, at least one"
            )
    cosines = unit_rows(w_dec.detach().float().cpu()) @ unit_rows(directions.float().cpu()).T
    learned, true = (torch.from_numpy(side) for side in linear_sum_assignment(cosines.abs().numpy(), maximize=True))
    return Matching(learned, true, cosines[learned, true].double(), len(directions))


def chance_cosine(hidden: int) -> float:
    """Mean |cosine| of two random directions: `Gamma(d/2) / (sqrt(pi) Gamma((d+1)/2))`, about `sqrt(2 / (pi d))`.

    A matching chooses among many, so random features reach more than this, and the more the more there are.
    """
    return math.exp(math.lgamma(hidden / 2) - math.lgamma((hidden + 1) / 2)) / math.sqrt(math.pi)


@dataclass(frozen=True, kw_only=True)
class DetectionResult:
    """Means over the pairs whose true feature was there at least once."""

    precision: float
    """Of the tokens on which the learned feature fires, the share with the true one; 0 if it never fires."""
    recall: float
    """Of the tokens with the true feature, the share on which the learned one fires."""
    f1: float
    """Mean over pairs of the harmonic mean of both."""
    pairs: int


@dataclass(frozen=True, eq=False)
class Detection:
    """Counts for each pair of a matching; returned anew by `update`."""

    matching: Matching
    both: Tensor
    """(pairs,) int64: tokens on which both fire."""
    fired: Tensor
    """(pairs,) int64: tokens on which the learned feature fires."""
    present: Tensor
    """(pairs,) int64: tokens on which the true one does."""

    @classmethod
    def start(cls, matching: Matching) -> Detection:
        """Nothing seen."""
        return cls(matching, *(torch.zeros(len(matching.true), dtype=torch.int64) for _ in range(3)))

    def update(self, code: SparseCode, truth: SparseCode) -> Detection:
        """With the learned and the true code of the same tokens."""
        if code.tokens != truth.tokens:
            raise UserError(f"codes of {code.tokens} and {truth.tokens} tokens: give two codes of the same tokens")
        pairs = len(self.matching.true)
        fired = _as_pairs(code, self.matching.learned)
        present = _as_pairs(truth, self.matching.true)
        both = fired[torch.isin(fired, present, assume_unique=True)]
        counts = (torch.bincount(keys % pairs, minlength=pairs) for keys in (both, fired, present))
        old = (self.both, self.fired, self.present)
        return Detection(self.matching, *(was + new for was, new in zip(old, counts, strict=True)))

    def result(self) -> DetectionResult:
        """The means. Raises UserError if no true feature of a pair was ever there."""
        seen = self.present > 0
        if not bool(seen.any()):
            raise UserError("none of the matched true features was there: count more tokens")
        both, fired, present = (counts[seen].double() for counts in (self.both, self.fired, self.present))
        return DetectionResult(
            precision=float((both / fired.clamp(min=1)).mean()),
            recall=float((both / present).mean()),
            f1=float((2 * both / (fired + present)).mean()),
            pairs=int(seen.sum()),
        )


def _as_pairs(code: SparseCode, members: Tensor) -> Tensor:
    """(matches of a pair's feature,) int64: token times the number of pairs, plus the pair."""
    number = torch.full((code.features,), -1)
    number[members] = torch.arange(len(members))
    pair = number[code.indices.cpu()]
    fires = (pair >= 0) & (code.values.detach().cpu() > 0)
    return code.token_ids().cpu()[fires] * len(members) + pair[fires]
