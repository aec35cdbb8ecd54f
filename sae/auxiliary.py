"""Auxiliary losses that bring unused features back: `aux_k_loss` as published, `aux_zipf_loss` for under-used ones too.

Both let idle features model what the autoencoder leaves over: `e_hat = W_dec . TopK_k_aux(Z' restricted to U)` should
come near `e = stopgrad(x - x_hat)`. They differ in U: dead features, or features that fire less than a Zipf law says.
Gradients reach the encoder (through the affinities) and the decoder, and neither through the residual. These are values
for one batch, without their coefficient (1/32 in Gao et al.); which features are dead is counted elsewhere, in tokens.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lm.errors import UserError
from sae.allocate import token_choice
from sae.budgets import by_density
from sae.sparse_code import SparseCode, decode

_CHUNK = 1 << 22
"""Affinities of idle features copied together."""


def aux_k_loss(
    residual: Tensor,
    affinity: Tensor,
    dead: Tensor,
    w_dec: Tensor,
    *,
    k_aux: int,
    pre_bias: Tensor | None = None,
    variance: Tensor | float | None = None,
    scale_by_count: bool = False,
) -> Tensor:
    """AuxK: `mean((e_hat - e)^2) / mean((e - mean_tokens(e))^2)`, a scalar; 0 where the quotient is undefined.

    `residual` (tokens, hidden) is `x - x_hat` and is detached here; `affinity` (tokens, features) the pre-activations,
    ReLU'd or not; `dead` (features,) boolean; `w_dec` (features, hidden). `k_aux` is 256 in the released code, 512 in
    digests of the paper, half the hidden size in others. With no dead feature the value is near 1 and moves nothing.
    `pre_bias` (hidden,): add `pre_bias - stopgrad(pre_bias)` to `e_hat`, the extra gradient of the released code.
    `variance` replaces the denominator: the residual's over the *global* batch, the input's (sparsify) or 1 (SAELens).
    `scale_by_count` multiplies by `min(dead / k_aux, 1)` (sparsify, SAELens). With both as SAELens has them its loss still
    differs where fewer than `k_aux` dead features are positive: it takes negative pre-activations as they are.

    Source: Gao et al. 2024 (arXiv 2406.04093), released code. Badge: **faithful** with the last three at their defaults,
    but for a single token, whose variance is 0: the released code gives the largest float there, this gives 0.
    """
    code = idle_choice(affinity, dead, k_aux=k_aux)
    share = _share(dead, k_aux) if scale_by_count else None
    return residual_loss(residual, decode(code, w_dec), pre_bias=pre_bias, variance=variance, share=share)


def aux_zipf_loss(
    residual: Tensor,
    affinity: Tensor,
    density: Tensor,
    expected: Tensor,
    w_dec: Tensor,
    *,
    k_aux: int,
    tau: float = 0.1,
    weighting: Literal["set", "gradient"] = "set",
    pre_bias: Tensor | None = None,
    variance: Tensor | float | None = None,
    scale_by_count: bool = False,
) -> Tensor:
    """AuxK for under-used features: U = the features whose density lies below `tau` times what a Zipf law expects.

    `density` (features,) is measured over a window of tokens; `expected` (features,) is the law's, already dealt out to
    features (`expected_densities`). `weighting="set"` treats all of U alike; `"gradient"` scales the gradient of feature
    i through its activations by `under_use` u_i, leaving the value as it is. The default tau is ours. The rest is as in
    `aux_k_loss`.

    In the limit tau -> 0 it *is* `aux_k_loss` with `dead = (density == 0)`, value and gradients, for either weighting;
    `tau=0` gives that limit. Source: the abstract of arXiv 2411.02124 says only that it "generalizes" AuxK to
    underutilized features; its formula is not known here. Badge: **reconstruction**.
    """
    use = under_use(density, expected, tau=tau).to(affinity.device)
    idle = use > 0
    code = idle_choice(affinity, idle, k_aux=k_aux)
    if weighting == "gradient":
        share = use.to(code.values.dtype)[code.indices]
        code = code.with_values(code.values * share + code.values.detach() * (1 - share))
    elif weighting != "set":
        raise UserError(f"the weighting {weighting!r} is unknown: use 'set' or 'gradient'")
    scale = _share(idle, k_aux) if scale_by_count else None
    return residual_loss(residual, decode(code, w_dec), pre_bias=pre_bias, variance=variance, share=scale)


def under_use(density: Tensor, expected: Tensor, *, tau: float) -> Tensor:
    """(features,) float64: `u_i = clip(1 - p_i / (tau q_i), 0, 1)`; 1 for a feature that never fires, 0 for one that
    reaches `tau` times its expected density. `tau = 0` is the limit: 1 where `p_i = 0`, else 0.

    The share of features with u > 0 is the under-used share; at tau = 0 it is the dead share. Badge: **reconstruction**.
    """
    if not 0 <= tau <= 1:
        raise UserError(f"tau = {tau} is not a share of the expected density: give a number from 0 to 1")
    if density.shape != expected.shape or density.ndim != 1:
        raise UserError(f"densities of shapes {tuple(density.shape)} and {tuple(expected.shape)}: give one a feature")
    measured, due = density.detach().double(), expected.detach().double().to(density.device)
    if not bool(((due > 0) & (measured >= 0)).all()):
        raise UserError("expected densities must be above 0 and measured ones not below 0: take them from a ZipfLaw")
    if tau == 0:
        return (measured == 0).double()
    return (1 - measured / (tau * due)).clamp(0, 1)


def expected_densities(law: Tensor, density: Tensor) -> Tensor:
    """(features,): the density that a law, (features,) by rank, expects of each feature, ranked by measured density."""
    return by_density(law, density)


def residual_variance(residual: Tensor) -> Tensor:
    """`mean((e - mean_tokens(e))^2)` over (tokens, hidden), detached: AuxK's denominator, for a whole global batch.

    Badge: **faithful** to Gao et al.'s released code.
    """
    e = residual.detach()
    return (e - e.mean(0)).square().mean()


def idle_choice(affinity: Tensor, members: Tensor, *, k_aux: int) -> SparseCode:
    """Token choice among the (features,) boolean `members` only: at most `k_aux` positive ones a token, ties by index.

    `affinity` is (tokens, features); gradients flow through the values. A few rows are looked at together. Badge: **faithful** to
    AuxK's choice among the dead.
    """
    if members.shape != affinity.shape[1:] or members.dtype != torch.bool:
        raise UserError(
            f"the mask of features is {members.dtype} of shape {tuple(members.shape)}: "
            f"give one boolean for each of the {affinity.shape[-1]} features"
        )
    if k_aux < 1:
        raise UserError(f"k_aux = {k_aux}: give at least one auxiliary feature a token, or leave the loss out")
    numbers = torch.nonzero(members.to(affinity.device)).squeeze(1)
    rows = max(1, _CHUNK // max(len(numbers), 1))
    pieces = torch.split(affinity.detach(), rows)
    parts = [token_choice(piece[:, numbers], k_aux) for piece in pieces]
    indices = numbers[torch.cat([part.indices for part in parts])]
    counts = torch.cat([part.token_counts() for part in parts])
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    code = SparseCode(indices, indices.new_zeros(indices.shape, dtype=affinity.dtype), offsets, affinity.shape[1])
    return code.with_values(affinity[code.token_ids(), indices])


def residual_loss(
    residual: Tensor,
    aux_hat: Tensor,
    *,
    pre_bias: Tensor | None = None,
    variance: Tensor | float | None = None,
    share: Tensor | None = None,
) -> Tensor:
    """What `aux_k_loss` and `aux_zipf_loss` take of an auxiliary reconstruction that was decoded elsewhere.

    `mean((aux_hat - e)^2) / variance` with `e` the detached `residual`, both (tokens, hidden), in float32 or wider;
    `share` multiplies it. With `idle_choice` inside `sae.kernels.encode_decode` this is the sparse form of both losses.
    """
    target = residual.detach().to(torch.promote_types(residual.dtype, torch.float32))
    modeled = aux_hat.to(target.dtype)
    if pre_bias is not None:
        modeled = modeled + (pre_bias - pre_bias.detach())
    spread = residual_variance(target) if variance is None else torch.as_tensor(variance, device=target.device).detach()
    error = (modeled - target).square().sum() / max(target.numel(), 1)
    # Dividing where the variance is 0 would leave NaN in the gradients even if the value were set to 0 afterwards.
    defined = spread > 0
    loss = torch.where(defined, error, torch.zeros_like(error)) / torch.where(defined, spread, torch.ones_like(spread))
    loss = torch.where(loss.isnan(), torch.zeros_like(loss), loss)
    return loss if share is None else loss * share


def _share(members: Tensor, k_aux: int) -> Tensor:
    return (members.sum() / k_aux).clamp(max=1)
