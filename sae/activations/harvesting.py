"""From contexts to rows of activations: one forward pass for all sites, cut at the deepest, and unfit tokens left out.

Padding, BOS and other special tokens and norm outliers (attention sinks) are masked by default and counted. The limit
of an outlier is fixed before the first token is served, from the start of the source, so that it is the same for every
process and after a resume. A token that is an outlier at one site is left out at all: rows stay aligned over sites.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lm.anatomy import Site
from lm.errors import UserError
from lm.model import LanguageModel, special_ids
from lm.prompts import check_ids, max_positions
from sae.activations.batch import ActivationBatch, site_name
from sae.activations.contexts import Context, Contexts, ContextSpec, tokenizer_facts
from sae.activations.documents import Documents
from sae.activations.early_exit import forward
from sae.activations.sources import TextSource

CALIBRATION = 4096
"""Tokens from which the median norm is taken (fewer if the source has fewer)."""


@dataclass(frozen=True, kw_only=True)
class MaskSpec:
    """Which tokens an autoencoder is not shown. Padding never is."""

    special: bool = True
    """Leave out BOS, EOS and every other special token."""
    first: int = 0
    """Leave out so many tokens at the start of each context (some models without BOS keep an attention sink there)."""
    outliers: float | None = 10.0
    """Leave out tokens whose norm is above this multiple of the median norm; null: keep them."""

    def __post_init__(self) -> None:
        if self.first < 0 or (self.outliers is not None and not self.outliers > 1):
            raise UserError(
                f"masks with first {self.first} and outliers {self.outliers} cannot be: give first 0 or more, and "
                "outliers above 1 (10 is usual) or null"
            )


@dataclass(frozen=True, kw_only=True)
class HarvestSpec:
    """How text becomes activations."""

    context: ContextSpec = field(default_factory=ContextSpec)
    """How documents become contexts."""
    masks: MaskSpec = field(default_factory=MaskSpec)
    """Which tokens are left out."""
    forward_contexts: int = 16
    """Contexts in one forward pass."""
    cut: bool = True
    """Stop the forward pass at the deepest site."""
    seed: int = 0
    """Of the order of documents and of everything that is shuffled."""

    def __post_init__(self) -> None:
        if self.forward_contexts < 1:
            raise UserError(f"forward_contexts {self.forward_contexts} is too small: give 1 or more")


class Harvester:
    """Runs the model on contexts and gives what is left after masking."""

    def __init__(self, model: LanguageModel, source: TextSource, sites: Sequence[Site], spec: HarvestSpec) -> None:
        self.model, self.spec, self.source = model, spec, source
        self.sites = tuple(dict.fromkeys(sites))
        if not self.sites:
            raise UserError("sites is empty: name at least one, such as resid.3")
        for site in self.sites:
            if site.layer >= 0 or site.kind != "resid":
                model.anatomy.module_path(site)
        longest = max_positions(model)
        if longest is not None and spec.context.length > longest:
            raise UserError(f"contexts of {spec.context.length} tokens are longer than the model's {longest}: cut them")
        self.documents: Documents = source.open(model.tokenizer)
        self.hidden = model.anatomy.hidden
        self._special = torch.tensor(special_ids(model.tokenizer), device=model.device)
        self._limits: dict[Site, float] | None = None
        self.forward_seconds = 0.0
        """Time in the model so far."""

    def contexts(self, state: dict[str, int] | None = None) -> Contexts:
        """A new walk over the source, from the start or from a walk's `state`."""
        return Contexts(self.documents, self.model.tokenizer, self.spec.context, seed=self.spec.seed, state=state)

    def rows(self, contexts: Sequence[Context]) -> tuple[ActivationBatch, Counter[str]]:
        """The kept tokens of one forward pass, in order, in the model's type and on its device, and what was masked."""
        return self._rows(contexts, self.limits if self.spec.masks.outliers is not None else {})

    @property
    def limits(self) -> dict[Site, float]:
        """The largest norm that is no outlier, by site; none where outliers are kept, or half of the norms are 0."""
        if self._limits is None:
            self._limits = self._calibrate() if self.spec.masks.outliers is not None else {}
        return self._limits

    @limits.setter
    def limits(self, limits: dict[Site, float]) -> None:
        self._limits = dict(limits)

    def _calibrate(self) -> dict[Site, float]:
        walk, norms = self.contexts(), []
        kept = 0
        while walk.epoch == 0 and kept < CALIBRATION:
            batch = list(islice(walk, self.spec.forward_contexts))
            if not batch:
                break
            rows, _ = self._rows(batch, {})
            norms.append(torch.stack([rows[site].float().norm(dim=1) for site in self.sites]))
            kept += len(rows)
        if not kept:
            return {}
        medians = torch.cat(norms, 1).median(1).values.tolist()
        multiple = self.spec.masks.outliers or 0.0
        return {site: multiple * median for site, median in zip(self.sites, medians, strict=True) if median}

    def _rows(self, contexts: Sequence[Context], limits: dict[Site, float]) -> tuple[ActivationBatch, Counter[str]]:
        device, masks = self.model.device, self.spec.masks
        check_ids(self.model, (context.ids.tolist() for context in contexts))
        width = max(len(context.ids) for context in contexts)
        lengths = torch.tensor([len(context.ids) for context in contexts], device=device)
        real = torch.arange(width, device=device) < lengths[:, None]
        pad = self.model.tokenizer.pad_token_id
        ids = padded([context.ids for context in contexts], 0 if pad is None else int(pad)).to(device)
        started = time.perf_counter()
        seen = forward(self.model, ids, real.long(), self.sites, cut=self.spec.cut)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # what follows reads counts from the device anyway
        self.forward_seconds += time.perf_counter() - started

        counts = Counter(seen=int(lengths.sum()), padding=int((~real).sum()))
        keep = real
        if masks.special:
            keep = _drop(keep, torch.isin(ids, self._special), "special", counts)
        if masks.first:
            keep = _drop(keep, torch.arange(width, device=device).expand_as(ids) < masks.first, "first", counts)
        norms = {site: value.float().norm(dim=-1) for site, value in seen.items()}
        for site, norm in norms.items():
            self._require_finite(site, norm, keep, contexts)
        for site, limit in limits.items():
            keep = _drop(keep, norms[site] > limit, f"outlier {site_name(site)}", counts)
        counts["kept"] = int(keep.sum())
        documents = padded([context.documents for context in contexts], -1).to(device)
        positions = padded([context.positions for context in contexts], -1).to(device)
        values = {site: value[keep] for site, value in seen.items()}
        return ActivationBatch(values, ids[keep], documents[keep], positions[keep]), counts

    def _require_finite(self, site: Site, norm: Tensor, keep: Tensor, contexts: Sequence[Context]) -> None:
        bad = keep & ~torch.isfinite(norm)
        if bool(bad.any()):
            row, column = bad.nonzero()[0].tolist()
            raise UserError(
                f"{site} is NaN or infinite on document {contexts[row].documents[column]} of {self.documents.name}: load "
                "the model with dtype bfloat16 or float32, or leave that document out"
            )

    def facts(self) -> dict[str, Any]:
        """What metadata record of the masks and contexts."""
        return {
            **tokenizer_facts(self.model.tokenizer, self.spec.context),
            "outlier_limits": {site_name(site): limit for site, limit in self.limits.items()},
        }


def harvest(
    model: LanguageModel, source: TextSource, sites: Sequence[Site], spec: HarvestSpec | None = None
) -> Iterator[ActivationBatch]:
    """Activations in the order of the contexts, float32, one batch a forward pass, unshuffled: for evaluation.

    Batches differ in size, since masked tokens are left out. Ends after `spec.context.epochs`, if that is a number.
    """
    spec = spec or HarvestSpec(context=ContextSpec(shuffle=False, epochs=1))
    harvester = Harvester(model, source, sites, spec)
    walk = harvester.contexts()
    while batch := list(islice(walk, spec.forward_contexts)):
        rows, _ = harvester.rows(batch)
        if len(rows):
            yield rows.to(dtype=torch.float32)


def _drop(keep: Tensor, unfit: Tensor, reason: str, counts: Counter[str]) -> Tensor:
    """`keep` without the unfit; each token is counted under the first reason that meets it."""
    counts[reason] = int((keep & unfit).sum())
    return keep & ~unfit


def padded(rows: Sequence[Any], fill: int) -> Tensor:
    """(rows, longest) int64, padded on the right."""
    tensors = [torch.from_numpy(np.asarray(row, np.int64)) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=fill)
