"""The oracle: encoding and decoding written as the equations stand, dense codes and plain autograd.

It keeps several (tokens, features) tensors for the backward pass and is fast only where those are tiny.
"""

from __future__ import annotations

from torch import Tensor

from sae.sparse_code import SparseCode


def dense(
    x: Tensor,
    w_enc: Tensor,
    b_enc: Tensor,
    w_dec: Tensor,
    b_dec: Tensor,
    main: SparseCode,
    aux: SparseCode | None,
    share: Tensor | None,
) -> tuple[SparseCode, Tensor, SparseCode | None, Tensor | None]:
    """The oracle: the equations as they stand, dense codes, plain autograd."""
    affinity = (x - b_dec).to(w_enc.dtype) @ w_enc.T + b_enc
    code = main.with_values(affinity[main.token_ids(), main.indices])
    x_hat = code.to_dense() @ w_dec
    if aux is None:
        return code, x_hat, None, None
    values = affinity[aux.token_ids(), aux.indices]
    if share is not None:
        values = values * share + (values * (1 - share)).detach()
    aux_code = aux.with_values(values)
    return code, x_hat, aux_code, aux_code.to_dense() @ w_dec
