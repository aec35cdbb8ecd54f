"""How alike the decoder's directions are: statistics of the cosines between all pairs of features, block by block.

The (features, features) table is never whole, so 32,768 features fit anywhere. Badge of the module: **faithful** to `c_dec`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lm.errors import UserError

_CHUNK = 1 << 24
"""Cosines looked at together."""


@dataclass(frozen=True, kw_only=True)
class DecoderCosines:
    """Of `cos(W_dec,i, W_dec,j)` over all pairs i < j. A row of zeros has cosine 0 with everything."""

    c_dec: float
    """Mean of the absolute cosine: 0 for an orthonormal decoder."""
    mean: float
    """Mean of the signed cosine."""
    largest: float
    """The largest absolute cosine of any pair: 1 if a feature is there twice."""
    mean_nearest: float
    """Mean over features of their largest absolute cosine with another."""
    near_duplicates: float
    """Share of features with an absolute cosine above `near` with another."""


@torch.no_grad()
def decoder_cosines(w_dec: Tensor, *, near: float = 0.9) -> DecoderCosines:
    """Of a decoder (features, hidden); rows need not be of unit length. In float32, summed up in float64."""
    if w_dec.ndim != 2 or len(w_dec) < 2 or not bool(w_dec.isfinite().all()):
        raise UserError(
            f"the decoder {tuple(w_dec.shape)} needs two rows or more, all of them finite: check its training"
        )
    wide = w_dec.detach().float()
    lengths = wide.norm(dim=1, keepdim=True)
    rows = wide / torch.where(lengths > 0, lengths, 1.0)
    features = len(rows)
    absolute = signed = 0.0
    nearest = torch.zeros(features, device=rows.device)
    block = max(1, _CHUNK // features)
    for start in range(0, features, block):
        end = min(start + block, features)
        cosines = rows[start:end] @ rows[start:].T
        cosines[:, : end - start].triu_(1)  # every pair once, and no feature with itself
        signed += float(cosines.sum(dtype=torch.float64))
        cosines.abs_()
        absolute += float(cosines.sum(dtype=torch.float64))
        nearest[start:end] = torch.maximum(nearest[start:end], cosines.amax(1))
        nearest[start:] = torch.maximum(nearest[start:], cosines.amax(0))
    pairs = features * (features - 1) / 2
    return DecoderCosines(
        c_dec=absolute / pairs,
        mean=signed / pairs,
        largest=float(nearest.max()),
        mean_nearest=float(nearest.double().mean()),
        near_duplicates=float((nearest > near).double().mean()),
    )
