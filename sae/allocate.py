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

import torch
from torch import Tensor

from lm.errors import UserError
from sae.sparse_code import SparseCode
from sae.topk import KEYS, best_of_each_row, cut, in_memory_order, kth_largest, near_the_top, refuse_nan, row_chunks

_CHUNK = 1 << 22
"""Affinities compared with thresholds together."""


def token_choice(affinity: Tensor, budget: int) -> SparseCode:
    """Each token takes at most `budget` = k features: `sum_i S[j, i] <= k`. This is TopK (Gao et al.).

    `affinity` is (tokens, features). Ties go to the lower feature. Badge: **faithful**.
    """
    values = _checked(affinity)
    budgets = torch.full((values.shape[0],), _whole(budget), device=values.device)
    tokens, features = best_of_each_row(values, budgets)
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
                f"feature choice with budgets of shape {tuple(budget.shape)} and type {budget.dtype}: "
                f"give {count} whole numbers, none negative (sae.budgets makes them)"
            )
        budgets = budget.to(values.device, torch.int64)
    else:
        budgets = torch.full((count,), _whole(budget), device=values.device)
    features, tokens = best_of_each_row(values.T, budgets)
    return _code(affinity, tokens, features)


def mutual_choice(affinity: Tensor, budget: int) -> SparseCode:
    """At most `budget` = M matches in the whole batch, shared freely: `sum_ij S[j, i] <= M`, usually M = k tokens.

    `affinity` is (tokens, features). Ties go to the lower flat index. The threshold comes from integer histograms of
    the numbers' bits, so it is exact and needs no sort. Badge: **faithful** to the constraint.
    """
    values = _checked(affinity)
    matches = _whole(budget)
    candidates = near_the_top(values, matches)
    if candidates is not None:
        return _code(affinity, *cut(*candidates, matches, width=values.shape[1]))
    refuse_nan(values)
    kth = kth_largest(in_memory_order(values), matches)
    threshold, ties = kth if kth is not None else (values.new_zeros(()), 0)
    chosen: list[tuple[Tensor, Tensor]] = []
    for start, chunk in row_chunks(values):
        tokens, features = torch.nonzero(chunk >= threshold if ties else chunk > threshold, as_tuple=True)
        if ties:
            tied = chunk[tokens, features] == threshold
            keep = ~tied | (tied.cumsum(0) <= ties)
            ties_here = int(tied.sum())
            tokens, features = tokens[keep], features[keep]
            ties = ties - ties_here if ties_here < ties else 0
        chosen.append((tokens + start, features))
    nothing = torch.zeros(0, dtype=torch.int64, device=values.device)
    tokens = torch.cat([nothing, *(pair[0] for pair in chosen)])
    features = torch.cat([nothing, *(pair[1] for pair in chosen)])
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
    refuse_nan(values)
    bound = threshold if isinstance(threshold, Tensor) else torch.tensor(threshold, dtype=torch.float64)
    bound = bound.detach().to(values.device).clamp(min=0)
    if bound.shape not in ((), (values.shape[1],)):
        raise UserError(
            f"thresholds of shape {tuple(bound.shape)}: give one number, or one for each of {values.shape[1]}"
        )
    wide = torch.promote_types(bound.dtype, values.dtype)
    rows = max(1, _CHUNK // max(values.shape[1], 1))
    matches = [torch.nonzero(part.to(wide) > bound.to(wide)) for part in torch.split(values, rows)]
    starts = torch.arange(len(matches), device=values.device) * rows
    tokens = torch.cat([part[:, 0] + start for part, start in zip(matches, starts, strict=True)])
    features = torch.cat([part[:, 1] for part in matches])
    return SparseCode.from_matches(tokens, features, affinity[tokens, features], shape=_shape(affinity))


def _shape(affinity: Tensor) -> tuple[int, int]:
    return affinity.shape[0], affinity.shape[1]


def _checked(affinity: Tensor) -> Tensor:
    """The affinities without their graph; refuses other shapes and other types."""
    if affinity.ndim != 2 or affinity.dtype not in KEYS:
        raise UserError(
            f"affinities of type {affinity.dtype} and shape {tuple(affinity.shape)}: give a floating-point (tokens, features) "
            "tensor, the batch and sequence axes flattened into one"
        )
    return affinity.detach()


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
