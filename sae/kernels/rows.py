"""The decoder's unit norm without temporaries: the in-place forms of `without_parallel` and `unit_rows` in `sae.gao_recipe`.

Same numbers up to rounding; each reads and writes a weight-sized tensor once. A row of zeros stays. Not for tensors
that autograd is watching.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 1 << 16
"""Numbers looked at together on CPU, so that a product of two rows stays in cache."""


@torch.no_grad()
def take_parallel_(gradient: Tensor, w_dec: Tensor) -> Tensor:
    """`g -= (g . w / |w|^2) w` for each row of (features, hidden), in place; returns `gradient`."""
    step = max(1, _CHUNK // max(w_dec.shape[1], 1)) if w_dec.device.type == "cpu" else max(1, len(w_dec))
    for g, w in zip(torch.split(gradient, step), torch.split(w_dec, step), strict=True):
        squared = torch.linalg.vector_norm(w, dim=1, keepdim=True).square_()
        along = (g * w).sum(1, keepdim=True) / torch.where(squared > 0, squared, 1.0)
        g.addcmul_(along, w, value=-1)
    return gradient


@torch.no_grad()
def unit_rows_(w_dec: Tensor) -> Tensor:
    """Rows of (features, hidden) to length 1, in place; returns `w_dec`."""
    lengths = torch.linalg.vector_norm(w_dec, dim=1, keepdim=True)
    return w_dec.div_(torch.where(lengths > 0, lengths, 1.0))
