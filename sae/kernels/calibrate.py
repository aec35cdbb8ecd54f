"""Which backend is cheapest for a shape: measured once a process and shape class, kept, and logged.

The measurement is a few forward and backward passes of the node on at most 256 random tokens and 4096 features of the asked
width (what comes before it costs every backend the same): under a second or so, enough to order the backends. It is no
benchmark (`benchmarks/sae.py` is).
"""

from __future__ import annotations

import logging
import math
import time

import torch
from torch import Tensor

from sae.kernels.node import decode_matches
from sae.kernels.operations import Backend
from sae.sparse_code import SparseCode

_LOG = logging.getLogger(__name__)
_DENSE_BYTES = 1 << 24
"""Dense codes larger than this are never chosen: the promise is that none are kept."""
_TOKENS, _FEATURES = 256, 4096
_costs: dict[tuple[object, ...], dict[Backend, float]] = {}


def choose_backend(
    *, tokens: int, hidden: int, features: int, matches: int, dtype: torch.dtype, device: torch.device
) -> Backend:
    """The backend that "auto" takes for a batch of this shape on this device.

    Shapes whose sizes round to the same powers of two share one measurement. "dense" is a candidate only where a dense
    code takes at most 16 MiB.
    """
    costs = measured_costs(tokens=tokens, hidden=hidden, features=features, matches=matches, dtype=dtype, device=device)
    return min(costs, key=lambda name: costs[name])


def measured_costs(
    *, tokens: int, hidden: int, features: int, matches: int, dtype: torch.dtype, device: torch.device
) -> dict[Backend, float]:
    """Seconds a token of each candidate, forward and backward, measured now or remembered."""
    candidates: list[Backend] = ["torch"]
    if device.type == "cpu" and dtype in (torch.float32, torch.float64):
        candidates = ["cpu", "torch"]
    if tokens * features * dtype.itemsize <= _DENSE_BYTES:
        candidates.append("dense")
    if len(candidates) == 1 or not matches:
        return dict.fromkeys(candidates[:1], 0.0)
    kind = tuple(round(math.log2(max(size, 1))) for size in (tokens, hidden, features, matches))
    key = (*kind, dtype, device.type, torch.get_num_threads(), tuple(candidates))
    if key not in _costs:
        with torch.inference_mode(False), torch.enable_grad():  # whatever mode the first batch comes in
            _costs[key] = _measure(candidates, tokens, hidden, features, matches, dtype, device)
        shown = ", ".join(f"{name} {1e6 * cost:.2f}" for name, cost in _costs[key].items())
        _LOG.info("backends for (%d, %d, %d), microseconds a token: %s", tokens, hidden, features, shown)
    return _costs[key]


def _measure(
    candidates: list[Backend],
    tokens: int,
    hidden: int,
    features: int,
    matches: int,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[Backend, float]:
    k = max(1, min(round(matches / max(tokens, 1)), features, _FEATURES))
    tokens, features = min(tokens, _TOKENS), min(features, _FEATURES)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    x, g = random(tokens, hidden), random(tokens, hidden)
    weights = random(features, hidden), random(features), random(features, hidden), random(hidden)
    for weight in weights:
        weight.requires_grad_()
    w_enc, b_enc, w_dec, b_dec = weights
    indices = torch.stack([torch.randperm(features, generator=generator)[:k] for _ in range(tokens)])
    indices = indices.sort(1).values.flatten().to(device)
    offsets = torch.arange(0, k * tokens + 1, k, device=device)
    code = SparseCode(indices, random(len(indices)), offsets, features)

    def once(backend: Backend) -> float:
        _wait(device)
        start = time.perf_counter()
        decoded = decode_matches(x, w_enc, b_enc, w_dec, b_dec, code, backend=backend)
        torch.autograd.grad(decoded.x_hat, weights, g)
        _wait(device)
        return (time.perf_counter() - start) / tokens

    rounds = [{name: once(name) for name in candidates} for _ in range(4)]
    return {name: min(times[name] for times in rounds[1:]) for name in candidates}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
