"""The first tokens of a source, whole, as an evaluation reads them: the same on every process."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lm.anatomy import Site
from lm.errors import UserError
from lm.model import LanguageModel
from sae.activations.batch import ActivationStream
from sae.activations.cache.reading import ReadSpec
from sae.activations.harvesting import HarvestSpec, harvest
from sae.activations.open import open_activations
from sae.activations.sources import ActivationFiles, MadeActivations, Source, TextSource


def held_out_tokens(
    source: Source | ActivationStream | Mapping[Site, Tensor] | None,
    sites: Sequence[Site],
    count: int,
    model: LanguageModel | None,
    spec: HarvestSpec,
) -> dict[Site, Tensor]:
    """(tokens, hidden) of each site on the CPU, `count` at most, the same on every process; text in an order by `spec.seed`."""
    if source is None:
        return {}
    if isinstance(source, Mapping):
        return {site: values.float().cpu() for site, values in source.items()}
    if isinstance(source, ActivationFiles):
        reading = ReadSpec(shuffle=False, epochs=1, keep_last=True)
        batches = iter(open_activations(source, sites, batch_tokens=min(count, 4096), reading=reading))
    elif isinstance(source, MadeActivations):
        batches = iter(open_activations(source, sites, batch_tokens=min(count, 4096)))
    elif model is None or not isinstance(source, TextSource):
        raise UserError(f"held_out is {type(source).__name__}: give text, tensors, activation files, or NoSource")
    else:
        context = dataclasses.replace(spec.context, shuffle=True, epochs=1)
        batches = harvest(model, source, sites, dataclasses.replace(spec, context=context))
    parts: dict[Site, list[Tensor]] = {site: [] for site in sites}
    seen = 0
    for batch in batches:
        for site in sites:
            parts[site].append(batch[site][: count - seen].float().cpu())
        seen += min(len(batch), count - seen)
        if seen >= count:
            break
    if seen < 2:
        raise UserError("held_out holds less than two tokens that are not masked: give more text, or NoSource")
    return {site: torch.cat(own) for site, own in parts.items()}
