"""What the language model loses when a site is replaced by its reconstruction: cross-entropy and KL recovered.

Three forward passes: as it is, with the reconstruction, with zero. Only the positions that training saw are replaced, and only
predictions made from them are counted. `Recovered` takes logits from anywhere; `recovered_on` runs the passes of one batch
through `lm.patch`, `recovered_over` those of a text. Source: "loss recovered" as in Gao et al. (2024) and SAEBench, with zero
ablation as the floor.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from itertools import islice

import torch
from torch import Tensor

from lm.anatomy import Site
from lm.errors import UserError
from lm.forward.hooks import Edit, patch
from lm.model import LanguageModel, special_ids
from sae.activations import Contexts, HarvestSpec, TextSource
from sae.activations.harvesting import padded
from sae.metrics.sums import sum_everywhere
from sae.model import SparseAutoencoder

_CHUNK = 1 << 22
"""Logits looked at together."""


@dataclass(frozen=True, kw_only=True)
class RecoveredResult:
    """Means over the tokens counted, in nats."""

    tokens: int
    ce_clean: float
    ce_patched: float
    """With the site replaced by its reconstruction."""
    ce_zero: float
    """With the site replaced by zero."""
    kl: float
    """KL(clean || patched)."""
    kl_zero: float
    """KL(clean || zero)."""

    @property
    def ce_recovered(self) -> float:
        """`(CE_zero - CE_patched) / (CE_zero - CE_clean)`; NaN if zero does no harm. 1 is perfect, 0 as bad as zero."""
        span = self.ce_zero - self.ce_clean
        return (self.ce_zero - self.ce_patched) / span if span else math.nan

    @property
    def kl_recovered(self) -> float:
        """`1 - KL / KL_zero`; NaN if zero does no harm."""
        return 1 - self.kl / self.kl_zero if self.kl_zero else math.nan


@dataclass(frozen=True)
class Recovered:
    """Sums over the tokens counted; returned anew by `update`. Float64."""

    tokens: int = 0
    ce_clean: float = 0.0
    ce_patched: float = 0.0
    ce_zero: float = 0.0
    kl: float = 0.0
    kl_zero: float = 0.0

    def update(
        self, clean: Tensor, patched: Tensor, zero: Tensor, targets: Tensor, *, mask: Tensor | None = None
    ) -> Recovered:
        """With logits (..., vocabulary) of the three passes and the next tokens (...), where the boolean mask (...) is true.

        Negative targets, such as the usual -100, are not counted.
        """
        if mask is not None:
            _require_boolean(mask)
        shapes = {tuple(logits.shape) for logits in (clean, patched, zero)}
        if len(shapes) != 1 or clean.shape[:-1] != targets.shape or (mask is not None and mask.shape != targets.shape):
            raise UserError(
                f"logits {sorted(shapes)}, targets {tuple(targets.shape)} and mask do not fit: give equal shapes"
            )
        chosen = torch.nonzero((targets >= 0) if mask is None else mask & (targets >= 0), as_tuple=True)
        sums = torch.zeros(5, dtype=torch.float64)
        width = max(1, _CHUNK // clean.shape[-1])
        for start in range(0, len(chosen[0]), width):
            place = tuple(axis[start : start + width] for axis in chosen)
            logs = [logits[place].detach().float().log_softmax(-1) for logits in (clean, patched, zero)]
            nexts = targets[place].unsqueeze(-1)
            entropies = [-log.gather(-1, nexts).double().sum() for log in logs]
            gaps = [(logs[0].exp() * (logs[0] - log)).sum(-1).double().sum() for log in logs[1:]]
            sums += torch.stack([*entropies, *gaps]).cpu()
        if not bool(sums.isfinite().all()):
            raise UserError(
                "the logits are not finite: see whether the reconstruction is, and mask the tokens that are not"
            )
        return Recovered(
            self.tokens + len(chosen[0]),
            *(old + new for old, new in zip(astuple(self)[1:], sums.tolist(), strict=True)),
        )

    def merge(self, other: Recovered) -> Recovered:
        """Of both streams together."""
        return Recovered(*(mine + yours for mine, yours in zip(astuple(self), astuple(other), strict=True)))

    def all_reduce(self) -> Recovered:
        """Of all processes' streams together, the same on each. One collective."""
        tokens, *sums = sum_everywhere(torch.tensor(astuple(self), dtype=torch.float64)).tolist()
        return Recovered(round(tokens), *sums)

    def result(self) -> RecoveredResult:
        """The means. Raises UserError if no token was counted."""
        if not self.tokens:
            raise UserError("no token was counted: give texts of two tokens or more, and a mask that is true somewhere")
        clean, patched, zero, kl, kl_zero = (value / self.tokens for value in astuple(self)[1:])
        return RecoveredResult(
            tokens=self.tokens, ce_clean=clean, ce_patched=patched, ce_zero=zero, kl=kl, kl_zero=kl_zero
        )


@torch.no_grad()
def recovered_on(
    model: LanguageModel,
    site: Site,
    reconstruct: Callable[[Tensor], Tensor],
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    mask: Tensor | None = None,
    largest_norm: float | None = None,
) -> Recovered:
    """The three passes over one batch of `input_ids` (batch, tokens), padded on the right if at all.

    `reconstruct` maps the (tokens, hidden) float32 activations of the replaced positions to as many: an autoencoder in
    evaluation mode. `mask` (batch, tokens), boolean, are the positions that training saw (no BOS, no special tokens), those
    not padded if None: they are replaced, and the predictions made from them of a token that is no padding are counted.
    Activations whose norm exceeds `largest_norm` (what training left out as outliers) stay as they are, but are counted.
    """
    if mask is not None:
        _require_boolean(mask)
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    seen = real if mask is None else mask & real
    if seen.shape != input_ids.shape or not bool(seen.any()):
        raise UserError(
            f"the mask {tuple(seen.shape)} names no position of the batch {tuple(input_ids.shape)}: nothing to replace"
        )
    seen, real = seen.to(model.device), real.to(model.device)
    ids = input_ids.to(model.device)

    def replaced(by: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def edit(hidden: Tensor) -> Tensor:
            fit = seen if largest_norm is None else seen & (hidden.float().norm(dim=-1) <= largest_norm)
            rows = hidden[fit]
            new = by(rows.float())
            if new.shape != rows.shape or not bool(new.isfinite().all()):
                raise UserError(
                    f"the reconstruction of {site} has shape {tuple(new.shape)} or is not finite: give finite values of "
                    f"shape {tuple(rows.shape)}"
                )
            hidden[fit] = new.to(hidden.dtype)
            return hidden

        return edit

    def logits(by: Callable[[Tensor], Tensor] | None) -> Tensor:
        edits = [] if by is None else [Edit(site=site, value=replaced(by))]
        with patch(model, edits, allow_unchanged=True):
            out: Tensor = model.model(input_ids=ids, attention_mask=real.long(), use_cache=False).logits
        return out[:, :-1]

    return Recovered().update(
        logits(None),
        logits(reconstruct),
        logits(torch.zeros_like),
        ids[:, 1:],
        mask=seen[:, :-1] & real[:, 1:],
    )


@torch.no_grad()
def recovered_over(
    model: LanguageModel,
    source: TextSource,
    site: Site,
    autoencoder: SparseAutoencoder,
    harvest: HarvestSpec,
    *,
    contexts: int,
    largest_norm: float | None = None,
) -> RecoveredResult:
    """Over the first `contexts` contexts of a source, unshuffled; tokens that training masks are neither replaced nor counted,
    and activations beyond `largest_norm`, training's limit of outliers, are not replaced."""
    spec = replace(harvest.context, shuffle=False, epochs=1)
    walk = islice(Contexts(source.open(model.tokenizer), model.tokenizer, spec), contexts)
    reader = copy.deepcopy(autoencoder).to(model.device).eval()
    special = torch.tensor(special_ids(model.tokenizer))
    recovered = Recovered()
    while batch := list(islice(walk, harvest.forward_contexts)):
        ids = padded([context.ids for context in batch], int(model.tokenizer.pad_token_id or 0))
        real = torch.arange(ids.shape[1]) < torch.tensor([len(context.ids) for context in batch])[:, None]
        seen = real & ~(torch.isin(ids, special) if harvest.masks.special else torch.zeros_like(real))
        seen[:, : harvest.masks.first] = False
        if bool(seen.any()):
            recovered = recovered.merge(
                recovered_on(model, site, reader, ids, attention_mask=real, mask=seen, largest_norm=largest_norm)
            )
    return recovered.result()


def _require_boolean(mask: Tensor) -> None:
    if mask.dtype != torch.bool:
        raise UserError(f"the mask is {mask.dtype}: give booleans (mask.bool()), numbers would be read as positions")
