"""What activations came from: all that their values follow from, and what a reader wants to know beside it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from lm.model import fingerprint, tokenizer_fingerprint
from sae.activations.batch import site_name
from sae.activations.harvesting import Harvester


def settings(harvester: Harvester) -> dict[str, Any]:
    """All that the values and their order follow from, as plain data: content too (`Documents.facts`), paths not."""
    model = harvester.model
    return {
        "weights": fingerprint(model),
        "dtype": str(next(model.model.parameters()).dtype).removeprefix("torch."),
        "tokenizer": tokenizer_fingerprint(model.tokenizer),
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
