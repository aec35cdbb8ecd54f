"""The two products that a sparse code needs, on lists of matches: weighted sums of rows, and sampled dot products.

`bags` turns matches into rows (decoding, and with the matches sorted by feature both weight gradients), `products`
turns rows into one number a match (the gradient of the activations). Neither makes a (tokens, features) tensor, nor a
(matches, hidden) one beyond a budget. Everything is plain torch without autograd; `sae.kernels.node` is the only caller.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Backend = Literal["dense", "cpu", "torch"]
GATHER_BYTES = 1 << 26
"""What gathered rows may take together where the caller gives no budget."""


@dataclass(frozen=True, eq=False)
class Stack:
    """Main and auxiliary matches as one list: rows 0 to tokens - 1 are the main code, the next ones the auxiliary."""

    indices: Tensor
    """(matches,) int64: the feature of each match."""
    offsets: Tensor
    """(rows + 1,) int64: where each row's matches start."""
    tokens: int
    """How many tokens there are: rows, or half of the rows if there is an auxiliary code."""
    features: int
    """The width of the dictionary."""

    @property
    def rows(self) -> int:
        """Tokens, counted twice if there is an auxiliary code."""
        return self.offsets.numel() - 1

    def row_ids(self) -> Tensor:
        """(matches,) int64: the row of each match."""
        numbers = torch.arange(self.rows, device=self.offsets.device)
        return torch.repeat_interleave(numbers, self.offsets.diff(), output_size=self.indices.numel())

    def by_feature(self) -> tuple[Tensor, Tensor, Tensor]:
        """One stable sort serves both weight gradients: (order, row of each match in it, (features + 1,) offsets)."""
        keys = self.indices.int() if self.features < 1 << 31 else self.indices
        order = torch.sort(keys, stable=True).indices
        sizes = torch.bincount(self.indices, minlength=self.features)
        return order, self.row_ids()[order], torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])


def bags(numbers: Tensor, offsets: Tensor, weights: Tensor, table: Tensor) -> Tensor:
    """`out[b] = sum_m weights[m] table[numbers[m]]` over bag b's matches: (bags, hidden), in the type of `table`.

    Each bag is summed in the order of its matches, so the result is the same in every run, on CUDA too.
    """
    if not numbers.numel():
        return table.new_zeros(offsets.numel() - 1, table.shape[1])
    if table.device.type not in ("cpu", "cuda"):
        return bags_by_adding(numbers, offsets, weights, table)
    return functional.embedding_bag(
        numbers,
        table.contiguous(),
        offsets,
        mode="sum",
        per_sample_weights=weights.to(table.dtype),
        include_last_offset=True,
    )


def bags_by_adding(
    numbers: Tensor, offsets: Tensor, weights: Tensor, table: Tensor, *, budget_bytes: int | None = None
) -> Tensor:
    """The same by `index_add_` of gathered rows, piece by piece, in float32 or wider: for devices without bags."""
    wide = torch.promote_types(table.dtype, torch.float32)
    out = torch.zeros(offsets.numel() - 1, table.shape[1], dtype=wide, device=table.device)
    owners = torch.repeat_interleave(
        torch.arange(offsets.numel() - 1, device=offsets.device), offsets.diff(), output_size=numbers.numel()
    )
    for piece in _pieces(numbers.numel(), table.shape[1] * out.element_size(), budget_bytes):
        out.index_add_(0, owners[piece], table[numbers[piece]].to(wide) * weights[piece].to(wide).unsqueeze(1))
    return out.to(table.dtype)


def products(stack: Stack, left: Tensor, table: Tensor, *, backend: Backend, budget_bytes: int | None) -> Tensor:
    """`out[m] = left[row of m] . table[feature of m]`, (matches,): `left` (rows, hidden), `table` (features, hidden)."""
    if backend == "cpu" and left.device.type == "cpu" and table.dtype in (torch.float32, torch.float64):
        return _sampled(stack, left, table)
    return _gathered(stack, left, table, budget_bytes)


def _sampled(stack: Stack, left: Tensor, table: Tensor) -> Tensor:
    """A sampled dense-dense product on the code's own CSR pattern; no row is gathered."""
    if not stack.indices.numel():
        return left.new_zeros(0)
    _silence_beta_warning()
    nothing = torch.zeros(stack.indices.numel(), dtype=table.dtype)
    shape = (stack.rows, stack.features)
    pattern = torch.sparse_csr_tensor(stack.offsets, stack.indices, nothing, size=shape, check_invariants=False)
    out: Tensor = torch.sparse.sampled_addmm(pattern, left.contiguous(), table.contiguous().T, beta=0.0)
    return out.values()


def _gathered(stack: Stack, left: Tensor, table: Tensor, budget_bytes: int | None) -> Tensor:
    """Rows gathered for as many matches at a time as the budget holds, multiplied in float32 or wider."""
    wide = torch.promote_types(table.dtype, torch.float32)
    out = torch.empty(stack.indices.numel(), dtype=wide, device=left.device)
    rows = stack.row_ids()
    for piece in _pieces(out.numel(), 2 * table.shape[1] * out.element_size(), budget_bytes):
        one, other = left[rows[piece]].to(wide), table[stack.indices[piece]].to(wide)
        torch.bmm(one.unsqueeze(1), other.unsqueeze(2), out=out[piece].view(-1, 1, 1))
    return out.to(table.dtype)


def _pieces(matches: int, bytes_each: int, budget_bytes: int | None) -> list[slice]:
    size = max(1, (GATHER_BYTES if budget_bytes is None else budget_bytes) // max(bytes_each, 1))
    return [slice(start, start + size) for start in range(0, matches, size)]


@functools.cache
def _silence_beta_warning() -> None:
    """Torch says once a process that its CSR tensors are in beta; the tests here compare every number they give."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.tensor([0, 0]), torch.zeros(0, dtype=torch.int64), torch.zeros(0), size=(1, 1))
