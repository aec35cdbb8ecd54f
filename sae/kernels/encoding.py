"""`encode_decode`: pre-activations, an opaque choice of matches, the backend, and decoding as one autograd node.

The order is: check, pre-activations part by part (`preactivations`), the caller's choice, which backend "auto" means for so
many matches (`calibrate`), and the node (`node`), which has the equations and their backward pass.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lm.errors import UserError
from sae.kernels.calibrate import choose_backend
from sae.kernels.node import Encoded, decode_matches
from sae.kernels.operations import Backend
from sae.kernels.preactivations import Choose, Splits, chosen, pre_activations


def encode_decode(
    x: Tensor,
    w_enc: Tensor,
    b_enc: Tensor,
    w_dec: Tensor,
    b_dec: Tensor,
    choose: Choose,
    *,
    backend: Backend | Literal["auto"] = "auto",
    budget_bytes: int | None = None,
    features_first: bool = False,
    splits: Splits | None = None,
) -> Encoded:
    """Encode x, let `choose` pick the matches, decode them; see `sae.kernels.node` for the equations.

    `x` (tokens, hidden), of any strides and float type; `w_enc` and `w_dec` (features, hidden), `b_enc` (features,),
    `b_dec` (hidden,), all of one float type, which the pre-activations, activations and reconstructions have too:
    autocast is off inside.

    `choose(affinity)` is called under `no_grad` with the (tokens, features) pre-activations and returns a `Selection`
    of codes over them; the values in those codes are ignored and read off the pre-activations here. It may communicate
    with other processes, and must keep no reference to the tensor it is given: that memory is used again.
    `features_first` computes the pre-activations as (features, tokens) in memory (`affinity.T` is then contiguous), the
    layout in which feature choice is fast.

    Memory: `splits` says that the choice may be made part by part, and `choose` is then called as
    `choose(part, start)` for each part in order: `"tokens"` for rows `start:start + len(part)` (token choice: no token
    looks at another), `"features"` for columns (feature choice; budgets must be cut to the part; an auxiliary choice
    that compares features cannot be made so). Parts are as large as `budget_bytes` allows (64 MiB on CPU and 1 GiB
    elsewhere if it is None). Without `splits` (mutual choice, or anything that looks at the whole batch) the
    pre-activations are whole: tokens x features numbers. Rows gathered in the backward pass keep to `budget_bytes` too.

    `backend`: "cpu" (CSR and bags; other float types than float32 and float64 take the operations of "torch"), "torch"
    (any device), "dense" (plain autograd, the oracle: it does keep dense tensors), or "auto": the cheapest as measured
    once a process and shape class. Backends differ by rounding, so what must repeat bit for bit names one
    (`choose_backend` says which "auto" would take). Second derivatives are not defined but for "dense".
    """
    _check(x, w_enc, b_enc, w_dec, b_dec, budget_bytes)
    with torch.autocast(x.device.type, enabled=False):
        centered = (x.detach() - b_dec.detach()).to(w_enc.dtype).contiguous()
        parts = pre_activations(
            centered,
            w_enc.detach(),
            b_enc.detach(),
            splits=splits,
            budget_bytes=budget_bytes,
            features_first=features_first,
        )
        main, aux, share = chosen(parts, choose, splits, shape=(x.shape[0], w_enc.shape[0]))
        del centered, parts
        if backend == "auto":
            backend = choose_backend(
                tokens=x.shape[0],
                hidden=x.shape[1],
                features=w_enc.shape[0],
                matches=main.matches + (0 if aux is None else aux.matches),
                dtype=w_enc.dtype,
                device=x.device,
            )
    return decode_matches(
        x, w_enc, b_enc, w_dec, b_dec, main, aux, aux_share=share, backend=backend, budget_bytes=budget_bytes
    )


def _check(x: Tensor, w_enc: Tensor, b_enc: Tensor, w_dec: Tensor, b_dec: Tensor, budget_bytes: int | None) -> None:
    features = w_enc.shape[0] if w_enc.ndim == 2 else -1
    hidden = x.shape[1] if x.ndim == 2 else -1
    wanted = {
        "w_enc": (w_enc, (features, hidden)),
        "b_enc": (b_enc, (features,)),
        "w_dec": (w_dec, (features, hidden)),
        "b_dec": (b_dec, (hidden,)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor.shape != shape:
            raise UserError(
                f"{name} is {tuple(tensor.shape)} beside activations {tuple(x.shape)} and an encoder "
                f"{tuple(w_enc.shape)}: give x (tokens, hidden), weights (features, hidden), b_enc (features,), "
                f"b_dec (hidden,)"
            )
        if tensor.dtype != w_enc.dtype or not tensor.is_floating_point():
            raise UserError(f"{name} is {tensor.dtype} and w_enc {w_enc.dtype}: give all weights one float type")
    if not x.is_floating_point():
        raise UserError(f"activations of type {x.dtype}: give floating-point ones")
    if budget_bytes is not None and budget_bytes < 1:
        raise UserError(f"budget_bytes = {budget_bytes}: give a positive number of bytes, or None")
