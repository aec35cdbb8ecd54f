"""What the language model loses with a trained autoencoder in its place: `sae.metrics.Recovered` over held-out contexts."""

from __future__ import annotations

import copy
import dataclasses
from itertools import islice

import torch

from lm.anatomy import Site
from lm.model import LanguageModel
from sae.activations import Contexts, HarvestSpec, TextSource
from sae.metrics import Recovered, RecoveredResult, recovered_on
from sae.model import SparseAutoencoder


@torch.no_grad()
def recovered(
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
    spec = dataclasses.replace(harvest.context, shuffle=False, epochs=1)
    walk = islice(Contexts(source.open(model.tokenizer), model.tokenizer, spec), contexts)
    reader = copy.deepcopy(autoencoder).to(model.device).eval()
    special = torch.tensor(sorted({int(one) for one in model.tokenizer.all_special_ids}))
    found = Recovered()
    while batch := list(islice(walk, harvest.forward_contexts)):
        width = max(len(context.ids) for context in batch)
        ids = torch.full((len(batch), width), int(model.tokenizer.pad_token_id or 0))
        real = torch.zeros(len(batch), width, dtype=torch.bool)
        for row, context in enumerate(batch):
            ids[row, : len(context.ids)] = torch.from_numpy(context.ids)
            real[row, : len(context.ids)] = True
        seen = real & ~(torch.isin(ids, special) if harvest.masks.special else torch.zeros_like(real))
        seen[:, : harvest.masks.first] = False
        if bool(seen.any()):
            found = found.merge(
                recovered_on(model, site, reader, ids, attention_mask=real, mask=seen, largest_norm=largest_norm)
            )
    return found.result()
