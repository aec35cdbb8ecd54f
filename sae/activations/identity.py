"""Which model, tokenizer and text activations came from, as hashes: a name alone does not say."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from typing import Any

import torch

from lm.load import LanguageModel
from sae.activations.batch import site_name
from sae.activations.harvest import Harvester

_SAMPLE = 1024


@torch.no_grad()
def weights_hash(model: LanguageModel) -> str:
    """16 hex digits from names, shapes, types and 1024 evenly spaced elements of every parameter.

    Training changes all elements, so a sample tells checkpoints apart at no cost worth naming; an edit of single elements
    may go unseen.
    """
    digest = hashlib.sha256(model.anatomy.architecture.encode())
    for name, weight in model.model.state_dict().items():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        flat = weight.detach().reshape(-1)
        sample = flat[:: max(1, -(-flat.numel() // _SAMPLE))].cpu().contiguous()
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def tokenizer_hash(model: LanguageModel) -> str:
    """16 hex digits of everything the fast tokenizer does."""
    return hashlib.sha256(model.tokenizer.backend_tokenizer.to_str().encode()).hexdigest()[:16]


def settings(harvester: Harvester) -> dict[str, Any]:
    """All that the values and their order follow from, as plain data. Paths are not part of it: content is."""
    model = harvester.model
    return {
        "weights": weights_hash(model),
        "dtype": str(next(model.model.parameters()).dtype).removeprefix("torch."),
        "tokenizer": tokenizer_hash(model),
        "sites": [site_name(site) for site in harvester.sites],
        "content": harvester.documents.facts(),
        "harvest": asdict(harvester.spec),
    }


def provenance(harvester: Harvester) -> dict[str, Any]:
    """What a reader wants to know beside `settings`: names, revision, limits, the source as it was asked for."""
    model = harvester.model
    return {
        "model": model.name,
        "architecture": model.anatomy.architecture,
        "revision": getattr(model.model.config, "_commit_hash", None),
        "hidden": harvester.hidden,
        "source": harvester.source.described(),
        **harvester.facts(),
    }
