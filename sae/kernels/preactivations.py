"""Pre-activations part by part within a memory budget, and the matches that a caller's choice takes from each part.

One buffer serves all parts, so that the dense numbers never take more than one part and stay in cache where that is
small. Only gathered values, indices and offsets leave this module. No gradient flows here: `sae.kernels.node` has it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lm.errors import UserError
from sae.sparse_code import SparseCode

Splits = Literal["tokens", "features"]
PART_BYTES = {"cpu": 1 << 26}
"""A part's size where the caller gives no budget; 1 GiB on devices that are not named."""


class Selection(NamedTuple):
    """What a choice returns: codes over the pre-activations it was shown. Their values are not used."""

    main: SparseCode
    """The matches that reconstruct x."""
    aux: SparseCode | None = None
    """The matches of an auxiliary loss; they may be among the main ones."""
    aux_share: Tensor | None = None
    """(aux matches,): what the gradient of each auxiliary activation is multiplied with on its way to the encoder
    (not to the decoder); None leaves it as it is. Needed by `aux_zipf_loss`'s weighting="gradient"."""


Choose = Callable[[Tensor], Selection] | Callable[[Tensor, int], Selection]
"""`choose(affinity)`, or where `splits` is given `choose(part, start)`."""


def pre_activations(
    centered: Tensor,
    w_enc: Tensor,
    b_enc: Tensor,
    *,
    splits: Splits | None,
    budget_bytes: int | None,
    features_first: bool,
) -> Iterator[tuple[int, Tensor]]:
    """(start, (tokens, features) pre-activations) of each part, in order; each overwrites the last."""
    tokens, features = centered.shape[0], w_enc.shape[0]
    budget = PART_BYTES.get(centered.device.type, 1 << 30) if budget_bytes is None else budget_bytes
    length, other = (features, tokens) if splits == "features" else (tokens, features)
    step = length if splits is None else max(1, min(length, budget // max(1, other * w_enc.element_size())))
    step = max(1, -(-length // max(1, -(-length // max(step, 1)))))  # parts of like size
    buffer = torch.empty(step * other, dtype=w_enc.dtype, device=centered.device)
    for start in range(0, max(length, 1), step):
        size = min(step, length - start)
        rows = centered[start : start + size] if splits != "features" else centered
        part = slice(start, start + size) if splits == "features" else slice(None)
        weights, bias = w_enc[part], b_enc[part]
        out = buffer[: size * other]
        if features_first:
            out = out.view(len(weights), len(rows))
            torch.addmm(bias.unsqueeze(1), weights, rows.T, out=out)
            yield start, out.T
        else:
            out = out.view(len(rows), len(weights))
            torch.addmm(bias, rows, weights.T, out=out)
            yield start, out


def chosen(
    parts: Iterator[tuple[int, Tensor]], choose: Choose, splits: Splits | None, *, shape: tuple[int, int]
) -> tuple[SparseCode, SparseCode | None, Tensor | None]:
    """Main code, auxiliary code and the latter's shares over the whole batch, the values read off each part."""
    mains: list[tuple[int, SparseCode]] = []
    auxes: list[tuple[int, SparseCode]] = []
    shares: list[Tensor] = []
    calls = 0
    with torch.no_grad():
        for start, affinity in parts:
            picked = choose(affinity) if splits is None else choose(affinity, start)  # type: ignore[call-arg]
            calls += 1
            mains.append((start, _read(picked.main, affinity)))
            if picked.aux is not None:
                auxes.append((start, _read(picked.aux, affinity)))
                if picked.aux_share is not None:
                    shares.append(_share(picked.aux_share, picked.aux, affinity))
        if len(auxes) not in (0, calls) or len(shares) not in (0, len(auxes)):
            raise UserError("the choice gave auxiliary matches, or their shares, for some parts only: give all or none")
        main, _ = _whole(mains, splits, shape)
        if not auxes:
            return main, None, None
        aux, order = _whole(auxes, splits, shape)
        share = torch.cat(shares) if shares else None
    return main, aux, share if share is None or order is None else share[order]


def _read(code: SparseCode, affinity: Tensor) -> SparseCode:
    if (code.tokens, code.features) != affinity.shape:
        raise UserError(
            f"the choice returned a code of {code.tokens} tokens and {code.features} features for pre-activations of "
            f"shape {tuple(affinity.shape)}: return one over exactly those"
        )
    return code.with_values(affinity[code.token_ids(), code.indices])


def _share(share: Tensor, code: SparseCode, affinity: Tensor) -> Tensor:
    if share.shape != code.indices.shape:
        raise UserError(f"aux_share has shape {tuple(share.shape)}: give one number for each of {code.matches} matches")
    return share.to(affinity.device, affinity.dtype)


def _whole(
    parts: list[tuple[int, SparseCode]], splits: Splits | None, shape: tuple[int, int]
) -> tuple[SparseCode, Tensor | None]:
    """The parts as one code, and how their matches were reordered (None: not at all)."""
    codes = [code for _, code in parts]
    if len(codes) == 1:
        return codes[0], None
    values = torch.cat([code.values for code in codes])
    if splits == "tokens":
        counts = torch.cat([code.token_counts() for code in codes])
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return SparseCode(torch.cat([code.indices for code in codes]), values, offsets, shape[1]), None
    flat = torch.cat([code.token_ids() * shape[1] + code.indices + start for start, code in parts])
    flat, order = flat.sort()
    width = max(shape[1], 1)
    return SparseCode.from_matches(flat // width, flat % width, values[order], shape=shape), order
