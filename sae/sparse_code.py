"""The sparse code: which features each token uses, and how strongly. The one value that every part of `sae` exchanges.

It holds matches only, in the layout of `torch.nn.functional.embedding_bag` (flat feature numbers, flat values, offsets
per token), so that nothing of shape (tokens, features) has to exist. This module chooses nothing (`sae.allocate` does)
and is not a fast kernel: `decode` is the plain torch form that faster ones are compared with.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from lm.errors import UserError


@dataclass(frozen=True, eq=False)
class FeatureView:
    """The same matches, feature by feature: feature i owns the slice `offsets[i]:offsets[i + 1]`, tokens rising in it."""

    tokens: Tensor
    """(matches,) int64: the token of each match."""
    values: Tensor
    """(matches,): the activation of each match."""
    offsets: Tensor
    """(features + 1,) int64."""
    order: Tensor
    """(matches,) int64: match number j here is match number `order[j]` of the code."""


@dataclass(frozen=True, eq=False)
class SparseCode:
    """Token-feature matches of `tokens` tokens over `features` features, sorted by token and then by feature.

    Token j owns the slice `offsets[j]:offsets[j + 1]`. A match is there once; its value may be any number, zero too.
    Gradients flow through `values`. Badge: none, a data structure of this project.
    """

    indices: Tensor
    """(matches,) int64: the feature of each match, rising within a token."""
    values: Tensor
    """(matches,) floating point: the activation of each match."""
    offsets: Tensor
    """(tokens + 1,) int64: from 0 to matches, never falling."""
    features: int
    """The width of the dictionary."""

    def __post_init__(self) -> None:
        """Check what costs nothing: ranks, lengths and types. `check` looks at the contents too."""
        shapes = {name: getattr(self, name).shape for name in ("indices", "values", "offsets")}
        if any(len(shape) != 1 for shape in shapes.values()) or shapes["indices"] != shapes["values"]:
            raise UserError(f"a sparse code of {shapes}: give flat indices and values of one length, and flat offsets")
        if self.indices.dtype != torch.int64 or self.offsets.dtype != torch.int64:
            raise UserError(f"indices of {self.indices.dtype} and offsets of {self.offsets.dtype}: give int64")
        if not self.offsets.numel():
            raise UserError("offsets are empty: give one number more than there are tokens, the first of them 0")

    @classmethod
    def from_matches(cls, tokens: Tensor, indices: Tensor, values: Tensor, *, shape: tuple[int, int]) -> SparseCode:
        """From (matches,) token numbers, feature numbers and values, sorted by token and then by feature."""
        return cls(indices, values, _offsets(tokens, shape[0]), shape[1])

    @classmethod
    def from_dense(cls, dense: Tensor) -> SparseCode:
        """From (tokens, features): every non-zero entry is a match."""
        if dense.ndim != 2:
            raise UserError(f"a dense code is (tokens, features), not {tuple(dense.shape)}: flatten the batch first")
        tokens, indices = torch.nonzero(dense.detach(), as_tuple=True)
        return cls.from_matches(tokens, indices, dense[tokens, indices], shape=(dense.shape[0], dense.shape[1]))

    @property
    def tokens(self) -> int:
        """How many tokens the code describes."""
        return self.offsets.numel() - 1

    @property
    def matches(self) -> int:
        """How many token-feature matches there are in all."""
        return self.indices.numel()

    def check(self) -> SparseCode:
        """The code itself, after looking at every number (for codes that come from a file); raises `UserError`."""
        steps = self.offsets.diff()
        if int(self.offsets[0]) != 0 or int(self.offsets[-1]) != self.matches or bool((steps < 0).any()):
            raise UserError(f"offsets must rise from 0 to the number of matches, {self.matches}: the code is damaged")
        if self.matches and not 0 <= int(self.indices.min()) <= int(self.indices.max()) < self.features:
            raise UserError(f"a feature number lies outside 0 to {self.features - 1}: the code is damaged")
        if bool(((self.token_ids() * self.features + self.indices).diff() <= 0).any()):
            raise UserError("the features of a token must rise and be there once: build the code with from_dense")
        return self

    def token_ids(self) -> Tensor:
        """(matches,) int64: the token of each match."""
        numbers = torch.arange(self.tokens, device=self.offsets.device)
        return torch.repeat_interleave(numbers, self.offsets.diff(), output_size=self.matches)

    def token_counts(self) -> Tensor:
        """(tokens,) int64: how many features each token uses. Their mean is L0."""
        return self.offsets.diff()

    def feature_counts(self) -> Tensor:
        """(features,) int64: how many tokens use each feature. Divided by `tokens`, the densities."""
        return torch.bincount(self.indices, minlength=self.features)

    def token(self, number: int) -> tuple[Tensor, Tensor]:
        """The feature numbers and values of one token."""
        start, end = self.offsets[number : number + 2].tolist()
        return self.indices[start:end], self.values[start:end]

    def by_feature(self) -> FeatureView:
        """The matches sorted by feature and then by token; gradients still flow through the values."""
        order = torch.argsort(self.indices, stable=True)
        offsets = _offsets(self.indices, self.features)
        return FeatureView(self.token_ids()[order], self.values[order], offsets, order)

    def keep(self, mask: Tensor) -> SparseCode:
        """Only the matches where the (matches,) boolean `mask` is true; tokens and features stay as many."""
        shape = (self.tokens, self.features)
        return self.from_matches(self.token_ids()[mask], self.indices[mask], self.values[mask], shape=shape)

    def prefix(self, width: int) -> SparseCode:
        """Only the matches of features 0 to `width` - 1, as Matryoshka's nested dictionaries need."""
        return self.keep(self.indices < width)

    def with_values(self, values: Tensor) -> SparseCode:
        """The same matches with other (matches,) values."""
        return replace(self, values=values)

    def to_dense(self) -> Tensor:
        """(tokens, features), zero where there is no match; gradients flow back to the values."""
        flat = self.token_ids() * self.features + self.indices
        empty = self.values.new_zeros(self.tokens * self.features)
        return empty.scatter(0, flat, self.values).view(self.tokens, self.features)


def decode(code: SparseCode, w_dec: Tensor, b_dec: Tensor | None = None) -> Tensor:
    """`x_hat = Z W_dec + b_dec`, (tokens, hidden), for `w_dec` (features, hidden) and `b_dec` (hidden,).

    The values are cast to the type of `w_dec`; gradients reach values, `w_dec` and `b_dec`. Plain torch
    (`embedding_bag`); the gradient of `w_dec` is dense.
    """
    if w_dec.ndim != 2 or w_dec.shape[0] != code.features:
        raise UserError(f"the decoder is {tuple(w_dec.shape)} but the code has {code.features} features: give its rows")
    out = functional.embedding_bag(
        code.indices,
        w_dec,
        code.offsets,
        mode="sum",
        per_sample_weights=code.values.to(w_dec.dtype),
        include_last_offset=True,
    )
    return out if b_dec is None else out + b_dec


def _offsets(owners: Tensor, count: int) -> Tensor:
    """(count + 1,): where each owner's run of matches starts, and where the last one ends."""
    sizes = torch.bincount(owners, minlength=count)
    return torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
