"""One allocation problem, three constraints: which token-feature matches may be active, given how much each wants to be.

Every scheme takes the affinities (pre-activations) Z' of shape (tokens, features) and a budget, and returns the matches
of the largest *positive* affinities that the constraint allows, exactly: ties are cut by index (the lower feature, the
earlier token, or the lower flat index is kept), whatever the float type and whatever the order in which a kernel meets
them. Where there are fewer positive affinities than the budget allows, all of them are chosen and the rest of the budget
is unused. "Tokens" are those of the *global* batch: for mutual and feature choice a part of it gives another answer.

Source: arXiv 2411.02124 (Feature Choice, Mutual Choice), 2406.04093 (TopK), 2412.06410 (BatchTopK). Nothing here has
parameters, and nothing of size (tokens, features) is kept for the backward pass but the affinities' own gradient.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lm.errors import UserError
from sae.code import SparseCode

_KEYS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
_CHUNK = 1 << 22
"""Elements looked at together on CPU, so that masks and keys stay small beside the affinities and in cache."""
_ROW_GROUP, _FLAT_GROUP = 16, 32
"""Affinities whose maximum is taken first: the largest n of all lie in the n groups with the largest maxima."""


def token_choice(affinity: Tensor, budget: int) -> SparseCode:
    """Each token takes at most `budget` = k features: `sum_i S[j, i] <= k`. This is TopK (Gao et al.).

    `affinity` is (tokens, features). Ties go to the lower feature. Badge: **faithful**.
    """
    values = _checked(affinity)
    budgets = torch.full((values.shape[0],), _whole(budget), device=values.device)
    tokens, features = _best_of_each_row(values, budgets)
    return _code(affinity, tokens, features)


def feature_choice(affinity: Tensor, budget: int | Tensor) -> SparseCode:
    """Each feature takes at most `budget` = m tokens, or m_i of them: `sum_j S[j, i] <= m_i`.

    `affinity` is (tokens, features); a tensor budget is (features,), whole numbers, 0 allowed (`sae.budgets` makes it).
    Ties go to the earlier token. Fastest where `affinity.T` is contiguous. Badge: **faithful** to the constraint.
    """
    values = _checked(affinity)
    count = values.shape[1]
    if isinstance(budget, Tensor):
        if budget.shape != (count,) or budget.is_floating_point() or budget.is_complex() or bool((budget < 0).any()):
            raise UserError(
                f"feature choice was given budgets of shape {tuple(budget.shape)} and type {budget.dtype}: "
                f"give {count} whole numbers, none negative (sae.budgets makes them)"
            )
        budgets = budget.to(values.device, torch.int64)
    else:
        budgets = torch.full((count,), _whole(budget), device=values.device)
    features, tokens = _best_of_each_row(values.T, budgets)
    return _code(affinity, tokens, features)


def mutual_choice(affinity: Tensor, budget: int) -> SparseCode:
    """At most `budget` = M matches in the whole batch, shared freely: `sum_ij S[j, i] <= M`, usually M = k tokens.

    `affinity` is (tokens, features). Ties go to the lower flat index. The threshold comes from integer histograms of
    the numbers' bits, so it is exact and needs no sort. Badge: **faithful** to the constraint.
    """
    values = _checked(affinity)
    whole = _whole(budget)
    near = _near_the_top(values, whole)
    if near is not None:
        return _code(affinity, *_cut(*near, whole, width=values.shape[1]))
    _refuse_nan(values)
    found = _kth_largest(_in_memory_order(values), whole)
    threshold, ties = found if found is not None else (values.new_zeros(()), 0)
    picked: list[tuple[Tensor, Tensor]] = []
    for start, chunk in _row_chunks(values):
        tokens, features = torch.nonzero(chunk >= threshold if ties else chunk > threshold, as_tuple=True)
        if ties:
            tied = chunk[tokens, features] == threshold
            keep = ~tied | (tied.cumsum(0) <= ties)
            ties_here = int(tied.sum())
            tokens, features = tokens[keep], features[keep]
            ties = ties - ties_here if ties_here < ties else 0
        picked.append((tokens + start, features))
    nothing = torch.zeros(0, dtype=torch.int64, device=values.device)
    tokens = torch.cat([nothing, *(pair[0] for pair in picked)])
    features = torch.cat([nothing, *(pair[1] for pair in picked)])
    return SparseCode.from_matches(tokens, features, affinity[tokens, features], shape=_shape(affinity))


def batch_topk(affinity: Tensor, k: int) -> SparseCode:
    """BatchTopK (Bussmann et al. 2024): the largest k x tokens affinities of the flattened batch, ReLU'd.

    The same allocation as `mutual_choice(affinity, k * tokens)`; a test compares it with the published form.
    Badge: **faithful**.
    """
    return mutual_choice(affinity, _whole(k) * affinity.shape[0])


def by_threshold(affinity: Tensor, threshold: Tensor | float) -> SparseCode:
    """Every affinity above `threshold` (a number, or one a feature) and above zero: inference that no batch can change.

    `affinity` is (tokens, features), `threshold` a scalar or (features,). This is a JumpReLU with fixed thresholds.
    Compared in the wider of the two types. Badge: **faithful** to BatchTopK's inference; for feature choice a
    **reconstruction** (the paper's rule is not known).
    """
    values = _checked(affinity)
    _refuse_nan(values)
    bound = threshold if isinstance(threshold, Tensor) else torch.tensor(threshold, dtype=torch.float64)
    bound = bound.detach().to(values.device).clamp(min=0)
    if bound.shape not in ((), (values.shape[1],)):
        raise UserError(
            f"thresholds of shape {tuple(bound.shape)}: give one number, or one for each of {values.shape[1]}"
        )
    wide = torch.promote_types(bound.dtype, values.dtype)
    tokens, features = torch.nonzero(values.to(wide) > bound.to(wide), as_tuple=True)
    return SparseCode.from_matches(tokens, features, affinity[tokens, features], shape=_shape(affinity))


def _shape(affinity: Tensor) -> tuple[int, int]:
    return affinity.shape[0], affinity.shape[1]


def _checked(affinity: Tensor) -> Tensor:
    """The affinities without their graph; refuses other shapes and other types."""
    if affinity.ndim != 2 or affinity.dtype not in _KEYS:
        raise UserError(
            f"affinities must be a floating-point (tokens, features) tensor, not {affinity.dtype} of shape "
            f"{tuple(affinity.shape)}: flatten the batch and sequence axes into one"
        )
    return affinity.detach()


def _refuse_nan(values: Tensor) -> None:
    """NaN has no place in an order. The maxima of all groups serve as well as all numbers: NaN wins every maximum."""
    if values.numel() and bool(values.max().isnan()):
        raise UserError("the affinities hold NaN: training has diverged or the input is not finite; lower the rate")


def _whole(budget: int) -> int:
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 0:
        raise UserError(f"the budget {budget!r} is not a whole number of matches: give 0 or more")
    return budget


def _code(affinity: Tensor, tokens: Tensor, features: Tensor) -> SparseCode:
    """Sort the matches by token and feature and read their values off the affinities, through the graph."""
    width = affinity.shape[1]
    flat = (tokens * width + features).sort().values
    tokens, features = flat // max(width, 1), flat % max(width, 1)
    return SparseCode.from_matches(tokens, features, affinity[tokens, features], shape=_shape(affinity))


def _best_of_each_row(rows: Tensor, budgets: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column numbers of the `budgets[r]` largest positive entries of each row, ties to the lower column."""
    nothing = torch.zeros(0, dtype=torch.int64, device=rows.device)
    found = [(nothing, nothing)]
    budgets = budgets.clamp(max=rows.shape[1])
    for start, chunk in _row_chunks(rows):
        part = chunk.contiguous()
        found += [(r + start, c) for r, c in _best_of_part(part, budgets[start : start + len(part)])]
    return torch.cat([pair[0] for pair in found]), torch.cat([pair[1] for pair in found])


def _best_of_part(part: Tensor, budgets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The same for a few rows, in pieces.

    Rows whose budgets lie between the same powers of two share one `topk`, so a few rows with large budgets do not
    make all of them pay. `topk` is trusted for values, and for places only where the cut is not inside a tie.
    """
    width = part.shape[1]
    groups = width // _ROW_GROUP
    maxima = part[:, : groups * _ROW_GROUP].view(len(part), _ROW_GROUP, groups).amax(1) if groups else part[:, :0]
    _refuse_nan(maxima)
    _refuse_nan(part[:, groups * _ROW_GROUP :])
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
    columns = (chosen.unsqueeze(2) + steps).flatten(1)
    rest = torch.arange(groups * _ROW_GROUP, part.shape[1], device=part.device)
    if len(rest):
        columns = torch.cat([columns, rest.expand(len(columns), -1)], dim=1)
    entries = part.gather(1, columns) if everyone else part.take(members.unsqueeze(1) * part.shape[1] + columns)
    top = entries.topk(take, dim=1, sorted=True)
    return top.values, columns.gather(1, top.indices)


def _near_the_top(values: Tensor, budget: int) -> tuple[Tensor, Tensor] | None:
    """Flat indices and values of all entries that may be among the `budget` largest; None if that saves nothing.

    The `budget`-th largest maximum of groups of entries bounds the `budget`-th largest entry from below, because each
    of those groups holds an entry as large: so one pass for the maxima replaces several over all entries.
    """
    flat = _in_memory_order(values)
    groups = flat.numel() // _FLAT_GROUP
    if groups < 4 * max(budget, 1):
        return None
    maxima = flat[: groups * _FLAT_GROUP].view(_FLAT_GROUP, groups).amax(0)
    _refuse_nan(maxima)
    _refuse_nan(flat[groups * _FLAT_GROUP :])
    found = _kth_largest(maxima, budget)
    if found is None or not budget:
        return None
    chosen = torch.nonzero(maxima >= found[0]).squeeze(1)
    if len(chosen) > groups // 2:
        return None
    steps = groups * torch.arange(_FLAT_GROUP, device=values.device).unsqueeze(1)
    rest = torch.arange(groups * _FLAT_GROUP, flat.numel(), device=values.device)
    places = torch.cat([(chosen + steps).flatten(), rest])
    entries = flat[places]
    keep = entries >= found[0]
    places, entries = places[keep], entries[keep]
    if not values.is_contiguous() and values.T.is_contiguous():
        places = places % values.shape[0] * values.shape[1] + places // values.shape[0]
    return places, entries


def _cut(places: Tensor, entries: Tensor, budget: int, *, width: int) -> tuple[Tensor, Tensor]:
    """Token and feature numbers of the `budget` largest of these positive entries, ties to the lower flat index."""
    if len(places) > budget:
        places, order = places.sort()
        entries = entries[order]
        found = _kth_largest(entries, budget)
        assert found is not None
        tied = entries == found[0]
        places = places[(entries > found[0]) | (tied & (tied.cumsum(0) <= found[1]))]
    return places // width, places % width


def _in_memory_order(values: Tensor) -> Tensor:
    """All entries in one dimension, without a copy where rows or columns are contiguous."""
    return (values.T if not values.is_contiguous() and values.T.is_contiguous() else values).flatten()


def _row_chunks(values: Tensor) -> Iterator[tuple[int, Tensor]]:
    size = _CHUNK if values.device.type == "cpu" else _CHUNK << 6
    rows = max(1, size // max(values.shape[1], 1))
    for start in range(0, values.shape[0], rows):
        yield start, values[start : start + rows]


def _kth_largest(values: Tensor, budget: int) -> tuple[Tensor, int] | None:
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
            keys = chunk.contiguous().view(_KEYS[values.dtype]).clamp(min=0)
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
    key = torch.tensor(prefix, dtype=_KEYS[values.dtype], device=values.device)
    return key.view(values.dtype), wanted
