"""What activations came from: all that their values follow from, and what a reader wants to know beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from lm.config import as_of_today
from lm.model import fingerprint, tokenizer_fingerprint
from sae.activations.batch import site_name
from sae.activations.harvesting import Harvester, HarvestSpec


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


def settings_of_today(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that were stored some time ago, with the defaults of what a `HarvestSpec` holds only since."""
    return {name: as_of_today(value, HarvestSpec) if name == "harvest" else value for name, value in stored.items()}


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
