"""The largest entries of rows and of whole matrices: exact, ties cut by index, without sorting everything.

What `sae.allocate` is built from: plain functions of numbers, without gradients. A budget is how many positive entries
are wanted at most; positive floats order like the integers that share their bits, which is what the counting uses.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from einops import rearrange, reduce
from torch import Tensor

from lm.errors import UserError

KEYS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
_CHUNK = 1 << 22
"""Elements looked at together on CPU, so that masks and keys stay small beside the affinities and in cache."""
_ROW_GROUP, _FLAT_GROUP = 16, 32
"""Affinities whose maximum is taken first: the largest n of all lie in the n groups with the largest maxima."""


def refuse_nan(values: Tensor) -> None:
    """NaN has no place in an order. The maxima of all groups serve as well as all numbers: NaN wins every maximum."""
    if values.numel() and bool(values.max().isnan()):
        raise UserError(
            "the affinities hold NaN, so training diverged or the input is not finite: lower the rate, or check it"
        )


def best_of_each_row(rows: Tensor, budgets: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column numbers of the `budgets[r]` largest positive entries of each row, ties to the lower column."""
    nothing = torch.zeros(0, dtype=torch.int64, device=rows.device)
    pairs = [(nothing, nothing)]
    budgets = budgets.clamp(max=rows.shape[1])
    for start, chunk in row_chunks(rows):
        part = chunk.contiguous()
        pairs += [(r + start, c) for r, c in _best_of_part(part, budgets[start : start + len(part)])]
    return torch.cat([pair[0] for pair in pairs]), torch.cat([pair[1] for pair in pairs])


def _best_of_part(part: Tensor, budgets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The same for a few rows, in pieces.

    Rows whose budgets lie between the same powers of two share one `topk`, so a few rows with large budgets do not
    make all of them pay. `topk` is trusted for values, and for places only where the cut is not inside a tie.
    """
    width = part.shape[1]
    groups = width // _ROW_GROUP
    whole = part[:, : groups * _ROW_GROUP]
    maxima = reduce(whole, "rows (inside group) -> rows group", "max", inside=_ROW_GROUP) if groups else whole
    refuse_nan(maxima)
    refuse_nan(part[:, groups * _ROW_GROUP :])
    sizes = torch.where(budgets > 0, (2 * budgets.double() - 1).clamp(min=1).log2().floor().long() + 1, 0)
    for size in torch.unique(sizes).tolist():
        if not size:
            continue
        members = torch.nonzero(sizes == size).squeeze(1)
        quota = budgets[members].unsqueeze(1)
        take = min(int(quota.max()) + 1, width)
        best, columns = _largest(part, maxima, members, take)
        ranks = torch.arange(take, device=part.device)
        last = best.gather(1, quota - 1)
        following = best.gather(1, quota.clamp(max=take - 1))
        cut = ((quota < width) & (following == last) & (last > 0)).squeeze(1)
        row, rank = torch.nonzero((ranks < quota) & (best > 0) & ~cut.unsqueeze(1), as_tuple=True)
        yield members[row], columns[row, rank]
        tied = torch.nonzero(cut).squeeze(1)
        if len(tied):
            entries, bound = part[members[tied]], last[tied]
            above = entries > bound
            equal = entries == bound
            room = quota[tied] - above.sum(1, keepdim=True)
            row, column = torch.nonzero(above | (equal & (equal.cumsum(1, dtype=torch.int32) <= room)), as_tuple=True)
            yield members[tied[row]], column


def _largest(part: Tensor, maxima: Tensor, members: Tensor, take: int) -> tuple[Tensor, Tensor]:
    """The `take` largest values of the rows `members`, falling, and columns that hold them; ties fall anywhere.

    `maxima` are those of `_ROW_GROUP` columns each, group g holding columns g, g + groups, ... The values sought lie in the
    `take` groups of the largest maxima (and in what is left over at the end), which is all that is looked at.
    """
    groups = maxima.shape[1]
    everyone = len(members) == len(part)
    if groups < 4 * take:
        top = (part if everyone else part[members]).topk(take, dim=1, sorted=True)
        return top.values, top.indices
    chosen = (maxima if everyone else maxima[members]).topk(take, dim=1, sorted=False).indices
    steps = groups * torch.arange(_ROW_GROUP, device=part.device)
    columns = rearrange(chosen.unsqueeze(2) + steps, "rows group inside -> rows (group inside)")
    rest = torch.arange(groups * _ROW_GROUP, part.shape[1], device=part.device)
    if len(rest):
        columns = torch.cat([columns, rest.expand(len(columns), -1)], dim=1)
    entries = part.gather(1, columns) if everyone else part.take(members.unsqueeze(1) * part.shape[1] + columns)
    top = entries.topk(take, dim=1, sorted=True)
    return top.values, columns.gather(1, top.indices)


def near_the_top(values: Tensor, budget: int) -> tuple[Tensor, Tensor] | None:
    """Flat indices and values of all entries that may be among the `budget` largest; None if that saves nothing.

    The `budget`-th largest maximum of groups of entries bounds the `budget`-th largest entry from below, because each
    of those groups holds an entry as large: so one pass for the maxima replaces several over all entries.
    """
    flat = in_memory_order(values)
    groups = flat.numel() // _FLAT_GROUP
    if groups < 4 * max(budget, 1):
        return None
    maxima = reduce(flat[: groups * _FLAT_GROUP], "(inside group) -> group", "max", inside=_FLAT_GROUP)
    refuse_nan(maxima)
    refuse_nan(flat[groups * _FLAT_GROUP :])
    kth = kth_largest(maxima, budget)
    if kth is None or not budget:
        return None
    chosen = torch.nonzero(maxima >= kth[0]).squeeze(1)
    if len(chosen) > groups // 2:
        return None
    steps = groups * torch.arange(_FLAT_GROUP, device=values.device).unsqueeze(1)
    rest = torch.arange(groups * _FLAT_GROUP, flat.numel(), device=values.device)
    places = torch.cat([(chosen + steps).flatten(), rest])
    entries = flat[places]
    keep = entries >= kth[0]
    places, entries = places[keep], entries[keep]
    if not values.is_contiguous() and values.T.is_contiguous():
        places = places % values.shape[0] * values.shape[1] + places // values.shape[0]
    return places, entries


def cut(places: Tensor, entries: Tensor, budget: int, *, width: int) -> tuple[Tensor, Tensor]:
    """Token and feature numbers of the `budget` largest of these positive entries, ties to the lower flat index."""
    if len(places) > budget:
        places, order = places.sort()
        entries = entries[order]
        kth = kth_largest(entries, budget)
        assert kth is not None
        tied = entries == kth[0]
        places = places[(entries > kth[0]) | (tied & (tied.cumsum(0) <= kth[1]))]
    return places // width, places % width


def in_memory_order(values: Tensor) -> Tensor:
    """All entries in one dimension, without a copy where rows or columns are contiguous."""
    return (values.T if not values.is_contiguous() and values.T.is_contiguous() else values).flatten()


def row_chunks(values: Tensor) -> Iterator[tuple[int, Tensor]]:
    size = _CHUNK if values.device.type == "cpu" else _CHUNK << 6
    rows = max(1, size // max(values.shape[1], 1))
    for start in range(0, values.shape[0], rows):
        yield start, values[start : start + rows]


def kth_largest(values: Tensor, budget: int) -> tuple[Tensor, int] | None:
    """The `budget`-th largest positive value of (numbers,) and how many entries equal to it belong to the largest.

    None if there are no more positive values than the budget. Positive floats order like the integers that share their
    bits, so counting 16 bits at a time (one pass for 16-bit floats, two for float32) finds the value exactly. What is
    not positive has, by its sign bit or as zero, a key of at most 0.
    """
    bits = 8 * values.element_size()
    prefix, wanted = 0, budget
    for shift in range(bits - 16, -1, -16):
        counts = torch.zeros(1 << 16, dtype=torch.int64, device=values.device)
        for chunk in torch.split(values, _CHUNK if values.device.type == "cpu" else _CHUNK << 6):
            keys = chunk.contiguous().view(KEYS[values.dtype]).clamp(min=0)
            if shift == bits - 16:
                counts += torch.bincount(keys >> shift, minlength=1 << 16)
                counts[0] -= (keys == 0).sum()
            else:
                keys = keys[(keys >> (shift + 16)) == prefix].long()
                counts += torch.bincount((keys >> shift) & 0xFFFF, minlength=1 << 16)
        from_top = counts.flip(0).cumsum(0)
        if shift == bits - 16 and int(from_top[-1]) <= wanted:
            return None
        place = int((from_top < max(wanted, 1)).sum())
        digit = (1 << 16) - 1 - place
        wanted -= int(from_top[place] - counts[digit])
        prefix = (prefix << 16) | digit
    key = torch.tensor(prefix, dtype=KEYS[values.dtype], device=values.device)
    return key.view(values.dtype), wanted
