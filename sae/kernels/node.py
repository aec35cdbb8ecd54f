"""The autograd node: chosen matches are decoded, and one sparse backward pass serves encoder, decoder and input.

    affinity = (x - b_dec) W_enc^T + b_enc        x_hat   = Z W_dec        (without b_dec: add it outside)
    Z, A = affinity at the chosen matches         aux_hat = A W_dec

Gradients of any loss of the activations and of both reconstructions reach `w_enc`, `b_enc`, `w_dec`, `b_dec` (through
the centring) and `x`, main and auxiliary matches in one backward pass. Source of the idea, one node with dense forward
and sparse backward that auxiliary losses go through too: the released code of Gao et al. 2024 (arXiv 2406.04093).
Badge: **faithful** to dense autograd; every backend is tested against it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lm.errors import UserError
from sae.kernels.dense import dense
from sae.kernels.operations import Backend, Stack, bags, products
from sae.sparse_code import SparseCode


class Encoded(NamedTuple):
    """What the node gives. The reconstructions are without `b_dec`, so that parts over feature shards can be summed."""

    code: SparseCode
    """The main code; gradients flow through its values."""
    x_hat: Tensor
    """(tokens, hidden): `Z W_dec`."""
    aux_code: SparseCode | None
    """The auxiliary code, if one was chosen."""
    aux_hat: Tensor | None
    """(tokens, hidden): the auxiliary code decoded."""


def decode_matches(
    x: Tensor,
    w_enc: Tensor,
    b_enc: Tensor,
    w_dec: Tensor,
    b_dec: Tensor,
    main: SparseCode,
    aux: SparseCode | None = None,
    *,
    aux_share: Tensor | None = None,
    backend: Backend,
    budget_bytes: int | None = None,
) -> Encoded:
    """The node, for matches that are chosen already; their values are the pre-activations there. Shapes as in `encode_decode`.

    Raises UserError if the backend does not run where x is.
    """
    with torch.autocast(x.device.type, enabled=False):
        if backend == "dense":
            return Encoded(*dense(x, w_enc, b_enc, w_dec, b_dec, main, aux, aux_share))
        if backend not in ("cpu", "torch") or (backend == "cpu" and x.device.type != "cpu"):
            raise UserError(f"the backend {backend!r} does not run on {x.device}: use 'auto', 'torch' or 'dense'")
        stack, values = _stacked(main, aux)
        outputs = _Node.apply(  # type: ignore[no-untyped-call]
            x,
            w_enc,
            b_enc,
            w_dec,
            b_dec,
            stack,
            values,
            main.matches,
            aux is not None,
            aux_share,
            backend,
            budget_bytes,
        )
    z, x_hat = main.with_values(outputs[0]), outputs[1]
    return Encoded(z, x_hat, None, None) if aux is None else Encoded(z, x_hat, aux.with_values(outputs[2]), outputs[3])


class _Node(torch.autograd.Function):
    """Forward: decode. Backward: d(activations) as sampled products, one sort, one sum of rows a weight matrix."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w_enc: Tensor,
        b_enc: Tensor,
        w_dec: Tensor,
        b_dec: Tensor,
        stack: Stack,
        values: Tensor,
        main: int,
        both: bool,
        share: Tensor | None,
        backend: Backend,
        budget_bytes: int | None,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, w_enc, w_dec, b_dec, stack.indices, stack.offsets, values, share)
        ctx.sizes = stack.tokens, stack.features, main
        ctx.both = both
        ctx.backend, ctx.budget_bytes = backend, budget_bytes
        ctx.set_materialize_grads(False)
        starts = stack.offsets[: stack.tokens + 1]
        x_hat = bags(stack.indices[:main], starts, values[:main], w_dec)
        if not both:
            return values.clone(), x_hat
        starts = stack.offsets[stack.tokens :] - main
        aux_hat = bags(stack.indices[main:], starts, values[main:], w_dec)
        return values[:main].clone(), x_hat, values[main:].clone(), aux_hat

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x, w_enc, w_dec, b_dec, indices, offsets, values, share = ctx.saved_tensors
        tokens, features, main = ctx.sizes
        with torch.autocast(x.device.type, enabled=False):
            stack = Stack(indices, offsets, tokens, features)
            return _gradients(ctx, x, w_enc, w_dec, b_dec, stack, values, share, main, gradients) + (None,) * 7


def _gradients(
    ctx: Any,
    x: Tensor,
    w_enc: Tensor,
    w_dec: Tensor,
    b_dec: Tensor,
    stack: Stack,
    values: Tensor,
    share: Tensor | None,
    main: int,
    gradients: tuple[Tensor | None, ...],
) -> tuple[Tensor | None, ...]:
    """The gradients of x, w_enc, b_enc, w_dec, b_dec, as far as they are wanted."""
    need_x, need_w_enc, need_b_enc, need_w_dec, need_b_dec = ctx.needs_input_grad[:5]
    both = ctx.both
    sizes = (stack.tokens, stack.tokens) if both else (stack.tokens,)
    hats = _joined(gradients[1::2], sizes, values.new_zeros(0, x.shape[1]))
    direct = _joined(gradients[0::2], (main, len(values) - main) if both else (main,), values[:0])
    d_values = values.new_zeros(values.shape) if direct is None else direct
    if hats is not None and (need_x or need_w_enc or need_b_enc or need_b_dec):
        d_values = d_values + products(stack, hats, w_dec, backend=ctx.backend, budget_bytes=ctx.budget_bytes)
    if share is not None:
        d_values = torch.cat([d_values[:main], d_values[main:] * share])

    order, rows, starts = stack.by_feature()
    d_w_dec = bags(rows, starts, values[order], hats) if need_w_dec and hats is not None else None
    d_sorted = d_values[order]
    d_w_enc = d_b_enc = d_b_dec = d_x = None
    if need_w_enc:
        centered = (x - b_dec).to(w_enc.dtype).contiguous()
        d_w_enc = bags(torch.where(rows < stack.tokens, rows, rows - stack.tokens), starts, d_sorted, centered)
        del centered
    if need_b_enc or need_b_dec:
        d_b_enc = bags(torch.zeros_like(rows), starts, d_sorted, d_values.new_ones(1, 1)).squeeze(1)
    if need_b_dec:
        assert d_b_enc is not None
        d_b_dec = -(d_b_enc @ w_enc)
    if need_x:
        d_x = bags(stack.indices, stack.offsets, d_values, w_enc)
        d_x = (d_x[: stack.tokens] + d_x[stack.tokens :] if both else d_x).to(x.dtype)
    return d_x, d_w_enc, d_b_enc if need_b_enc else None, d_w_dec, d_b_dec


def _joined(parts: Sequence[Tensor | None], sizes: Sequence[int], like: Tensor) -> Tensor | None:
    """The parts one below the other, as many zero rows for those that got no gradient; None if none did."""
    if all(part is None for part in parts):
        return None
    whole = [
        like.new_zeros(size, *like.shape[1:]) if part is None else part.to(like.dtype)
        for part, size in zip(parts, sizes, strict=True)
    ]
    return whole[0].contiguous() if len(whole) == 1 else torch.cat(whole)


def _stacked(main: SparseCode, aux: SparseCode | None) -> tuple[Stack, Tensor]:
    if aux is None:
        return Stack(main.indices, main.offsets, main.tokens, main.features), main.values
    offsets = torch.cat([main.offsets, aux.offsets[1:] + main.matches])
    indices = torch.cat([main.indices, aux.indices])
    return Stack(indices, offsets, main.tokens, main.features), torch.cat([main.values, aux.values])
