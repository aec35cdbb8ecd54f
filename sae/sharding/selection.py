"""Token, feature and mutual choice of the global batch, on the block of affinities that one process of a mesh holds.

The block is (own rows, own features). Each function gives the part of the global choice that lies in the block, exactly
as `sae.allocate` would choose it from all affinities, ties cut by the global index. What it costs, where the mesh has
more than one process on the axis:

| choice | over feature shards | over data shards |
|---|---|---|
| token | one gather of the largest k values a token | nothing |
| feature | nothing | one gather of each feature's largest m_i values with their tokens (8 bytes each) |
| mutual | one sum of a histogram; float32 takes a second one unless a guess was good | the same sums serve both axes |

Mutual choice adds one sum of a count for each row and shard if its cut falls inside a tie. Nothing here has gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from lm.errors import UserError
from sae import allocate
from sae.sharding.mesh import Mesh
from sae.sparse_code import SparseCode
from sae.thresholds import smallest_chosen

_INTEGERS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
_BINS = 1 << 16
_NEAR = 5
"""Bins of the upper 16 bits whose lower bits are counted along with them: 2 on each side of a guess, 0.4 to 0.8 % each."""
_CHUNK = 1 << 22
_NAN = "the affinities hold NaN, so training diverged or the input is not finite: lower the rate, or check it"


class Chosen(NamedTuple):
    """The block's part of a global choice."""

    code: SparseCode
    smallest: Tensor
    """Float64, of the whole batch: the smallest activation chosen, or (own features,) each feature's; infinite if none."""


class RowCuts:
    """Token choice over feature shards: each process brings its own best matches a token, one gather tells all cuts.

    `codes` are local token choices of at most `widths` a token (no two numbers of one code need be equal on all
    processes; the widths must). `keep(i, k)` says which matches of code i are among the k best of their token.
    """

    def __init__(
        self, mesh: Mesh, codes: Sequence[SparseCode], widths: Sequence[int], what: str = "token choice"
    ) -> None:
        self._mesh, self._codes = mesh, codes
        if mesh.sizes["features"] > 1:
            gathered = mesh.gather(
                torch.cat([_by_row(code, width) for code, width in zip(codes, widths, strict=True)], 1),
                "features",
                what,
            )
            self._values = torch.split(gathered, list(widths), dim=2)

    def keep(self, number: int, k: int) -> Tensor:
        """(matches of the code,) boolean."""
        code, values = self._codes[number], None
        if self._mesh.sizes["features"] > 1:
            values = self._values[number]  # (shards, tokens, width)
        else:
            values = _by_row(code, int(code.token_counts().max()) if code.tokens else 0).unsqueeze(0)
        best = rearrange(values, "shards tokens width -> tokens (shards width)")
        if bool(best.isnan().any()):
            raise UserError(_NAN)
        width = best.shape[1]
        bound = best.topk(k, dim=1).values[:, -1] if width >= k else best.new_zeros(len(best))
        room = k - (best > bound.unsqueeze(1)).sum(1)
        ties = ((values == bound.unsqueeze(1)) & (values > 0)).sum(2)
        room = room - (ties.cumsum(0) - ties)[self._mesh.places["features"]]
        rows, own = code.token_ids(), code.values.detach()
        tied = own == bound[rows]
        return (own > bound[rows]) | (tied & (_place_in_row(tied, code.offsets, rows) < room[rows]))

    def cut(self, number: int, k: int) -> SparseCode:
        """The code with only those matches."""
        return self._codes[number].keep(self.keep(number, k))


def feature_choice(mesh: Mesh, affinity: Tensor, budgets: Tensor, *, batch: int) -> Chosen:
    """Each own feature takes its `budgets` (own features,) best tokens of the global batch of `batch` tokens.

    `affinity` is (own rows, own features). No collective for features that are only dealt out, one gather where the batch is
    dealt out too. The same matches as `sae.allocate.feature_choice` of the whole batch. Badge: **faithful**.
    """
    code = allocate.feature_choice(affinity, budgets.clamp(max=max(len(affinity), 1)))
    ways, place = mesh.sizes["data"], mesh.places["data"]
    if ways == 1:
        return Chosen(code, smallest_chosen(code, per_feature=True))
    view = code.by_feature()
    caps = budgets.to(affinity.device).clamp(max=-(-batch // ways))
    starts = torch.cat([caps.new_zeros(1), caps.cumsum(0)])
    owners = torch.repeat_interleave(torch.arange(len(caps), device=caps.device), view.offsets.diff())
    slots = starts[owners] + torch.arange(len(owners), device=caps.device) - view.offsets[owners]
    keys = torch.zeros(int(starts[-1]), dtype=torch.int64, device=caps.device)
    keys[slots] = _keys(view.values.detach(), view.tokens * ways + place)
    everyone = mesh.gather(keys, "data", "feature choice").flatten()
    features = torch.repeat_interleave(torch.arange(len(caps), device=caps.device), caps).repeat(ways)
    order = everyone.argsort(descending=True)
    order = order[features[order].argsort(stable=True)]
    ranks = torch.arange(len(order), device=caps.device) - ways * starts[features[order]]
    kept = torch.zeros(len(order), dtype=torch.bool, device=caps.device)
    kept[order] = (ranks < budgets.to(caps.device)[features[order]]) & (everyone[order] > 0)
    values = (everyone >> 32).int().view(torch.float32).double()
    smallest = torch.full((len(caps),), torch.inf, dtype=torch.float64, device=caps.device)
    smallest.scatter_reduce_(0, features[kept], values[kept], "amin")
    mine = torch.empty(code.matches, dtype=torch.bool, device=caps.device)
    mine[view.order] = rearrange(kept, "(ways slots) -> ways slots", ways=ways)[place][slots]
    return Chosen(code.keep(mine), smallest)


def mutual_choice(mesh: Mesh, affinity: Tensor, budget: int, *, batch: int, guess: float | None = None) -> Chosen:
    """The `budget` best matches of the global batch of `batch` tokens, ties to the lower flat index.

    `affinity` is (own rows, own features). `guess`, the same on every process, is a number near the smallest activation that
    will be chosen (the last batch's, say): within about 1 % of it one sum of a histogram is enough, else there are two. It
    changes nothing else. The same matches as `sae.allocate.mutual_choice` of the whole batch. Badge: **faithful**.
    """
    if mesh.sizes["all"] == 1:
        code = allocate.mutual_choice(affinity, budget)
        return Chosen(code, smallest_chosen(code, per_feature=False))
    kth = kth_largest(
        lambda: _pieces(affinity), budget, lambda counts: mesh.sum_(counts, "all", "mutual choice"), guess=guess
    )
    nothing = torch.zeros(0, dtype=torch.int64, device=affinity.device)
    if kth is None:
        code = SparseCode.from_matches(
            nothing, nothing, affinity.new_zeros(0), shape=(len(affinity), affinity.shape[1])
        )
        return Chosen(code, torch.tensor(torch.inf, dtype=torch.float64, device=affinity.device))
    pairs = [torch.nonzero(part >= kth.value, as_tuple=True) for _, part in _row_pieces(affinity)]
    starts = [start for start, _ in _row_pieces(affinity)]
    tokens = torch.cat([nothing, *(pair[0] + start for start, pair in zip(starts, pairs, strict=True))])
    features = torch.cat([nothing, *(pair[1] for pair in pairs)])
    code = SparseCode.from_matches(
        tokens, features, affinity[tokens, features], shape=(len(affinity), affinity.shape[1])
    )
    if kth.ties > kth.wanted:
        code = code.keep(_first_ties(mesh, code, kth, batch))
    return Chosen(code, kth.value.double())


class Kth(NamedTuple):
    """The smallest of the chosen values, how many equal it, and how many of those are chosen."""

    value: Tensor
    ties: int
    wanted: int


def kth_largest(
    pieces: Callable[[], Iterator[Tensor]],
    budget: int,
    add: Callable[[Tensor], Tensor] = lambda counts: counts,
    *,
    guess: float | None = None,
) -> Kth | None:
    """The `budget`-th largest positive number in all pieces, or the smallest positive one if there are fewer; None if none.

    Exact: positive floats order like the integers that share their bits, counted 16 bits at a time. `add` sums the counts
    over processes; it is called once for 16-bit floats and twice for float32, but once there too if `guess`, the same on
    every process, is within about 1 % of the answer: the lower bits near it are counted along. `pieces` is gone through as
    often. Raises UserError on every process if any number anywhere is NaN.
    """
    near = -1
    if guess is not None and 0 < guess < 3e38:
        near = max((int(torch.tensor(guess, dtype=torch.float32).view(torch.int32)) >> 16) - _NEAR // 2, 0)
    counts, kind = None, torch.float32
    for piece in pieces():
        if counts is None:
            kind = piece.dtype
            if kind not in _INTEGERS:
                raise UserError(f"affinities of type {kind} cannot be shared out: use float32 or bfloat16")
            near = near if kind == torch.float32 else -1
            size = 1 + _BINS + (_NEAR * _BINS if near >= 0 else 0)
            counts = torch.zeros(size, dtype=torch.int64, device=piece.device)
        keys = _positive_keys(piece)
        counts[0] += piece.isnan().sum()
        counts[1 : 1 + _BINS] += torch.bincount(keys >> (8 * kind.itemsize - 16), minlength=_BINS)
        counts[1] -= (keys == 0).sum()
        if near >= 0:
            low = keys - (near << 16)
            counts[1 + _BINS :] += torch.bincount(low[(low >= 0) & (low < _NEAR << 16)], minlength=_NEAR * _BINS)
    if counts is None:
        raise UserError("there are no affinities to choose from: give a batch with tokens")
    counts = add(counts)
    if int(counts[0]):
        raise UserError(_NAN)
    wanted = min(budget, int(counts[1 : 1 + _BINS].sum()))
    if wanted < 1:
        return None
    digit, wanted, ties = _digit(counts[1 : 1 + _BINS], wanted)
    if kind == torch.float32:
        if 0 <= near <= digit < near + _NEAR:
            lower = counts[1 + _BINS :].view(_NEAR, _BINS)[digit - near]
        else:
            lower = torch.zeros(_BINS, dtype=torch.int64, device=counts.device)
            for piece in pieces():
                keys = _positive_keys(piece)
                lower += torch.bincount(keys[(keys >> 16) == digit] & 0xFFFF, minlength=_BINS)
            lower = add(lower)
        last, wanted, ties = _digit(lower, wanted)
        digit = (digit << 16) | last
    value = torch.tensor(digit, dtype=_INTEGERS[kind], device=counts.device).view(kind)
    return Kth(value, ties, wanted)


def _positive_keys(values: Tensor) -> Tensor:
    """Integers that order like the positive numbers among (numbers,), 0 for the others."""
    return values.contiguous().view(_INTEGERS[values.dtype]).clamp(min=0).flatten()


def _digit(counts: Tensor, wanted: int) -> tuple[int, int, int]:
    """The bin that holds the `wanted`-th number from the top, how many are wanted of that bin, and how many it holds."""
    from_top = counts.flip(0).cumsum(0)
    place = int((from_top < wanted).sum())
    held = int(counts[_BINS - 1 - place])
    return _BINS - 1 - place, wanted - (int(from_top[place]) - held), held


def _first_ties(mesh: Mesh, code: SparseCode, kth: Kth, batch: int) -> Tensor:
    """(matches,) boolean: above the cut, or among the first `kth.wanted` that equal it, in the global order."""
    shards, place = mesh.sizes["features"], mesh.places["features"]
    tied = code.values.detach() == kth.value
    rows = code.token_ids()
    counts = torch.zeros(batch, shards, dtype=torch.int64, device=rows.device)
    where = mesh.global_rows(batch, rows.device)
    counts[where, place] = torch.bincount(rows[tied], minlength=code.tokens)
    counts = mesh.sum_(counts, "all", "ties").flatten()
    before = rearrange(counts.cumsum(0) - counts, "(tokens shards) -> tokens shards", shards=shards)[where, place]
    room = kth.wanted - before
    return ~tied | (_place_in_row(tied, code.offsets, rows) < room[rows])


def _place_in_row(marked: Tensor, offsets: Tensor, rows: Tensor) -> Tensor:
    """(matches,) int64: how many marked matches of the same row come before each."""
    before = marked.cumsum(0) - marked.long()
    start = torch.cat([before.new_zeros(1), marked.cumsum(0)])[offsets[:-1]]
    return before - start[rows]


def _by_row(code: SparseCode, width: int) -> Tensor:
    """(tokens, width): each token's values from the left, zeros behind."""
    rows = code.token_ids()
    out = code.values.new_zeros(code.tokens, width)
    out[rows, torch.arange(code.matches, device=rows.device) - code.offsets[rows]] = code.values.detach()
    return out


def _keys(values: Tensor, tokens: Tensor) -> Tensor:
    """int64 that order by value and then by falling token: the bits of the positive float32 above the token's complement."""
    if values.dtype not in _INTEGERS:
        raise UserError(f"affinities of type {values.dtype} cannot be shared out: use float32 or bfloat16")
    return (values.float().contiguous().view(torch.int32).long() << 32) | (0xFFFFFFFF - tokens)


def _pieces(values: Tensor) -> Iterator[Tensor]:
    flat = (values.T if not values.is_contiguous() and values.T.is_contiguous() else values).flatten()
    yield from torch.split(flat, _CHUNK)


def _row_pieces(values: Tensor) -> Iterator[tuple[int, Tensor]]:
    step = max(1, _CHUNK // max(values.shape[1], 1))
    for start in range(0, len(values), step):
        yield start, values[start : start + step]
