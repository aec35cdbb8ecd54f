"""The harvesting stage: a model, a text and sites in, a cache of shuffled activations out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lm.errors import UserError
from lm.loading import load
from lm.run_folder import stage
from sae.activations.batch import parse_site
from sae.activations.cache.manifest import MANIFEST, ActivationCache
from sae.activations.cache.writing import write_cache
from sae.activations.config import HarvestConfig
from sae.activations.sources import TextSource


@stage
def run_harvest(config: HarvestConfig) -> ActivationCache:
    """Write the cache, or go on with it; the cache, opened.

    Raises:
        UserError: what is missing, does not go together, or a folder that holds another cache.
    """
    assert isinstance(config.source, TextSource)
    if not config.resume and (Path(config.out) / MANIFEST).exists():
        raise UserError(f"{config.out} already holds a cache: give another folder, or --resume true to go on with it")
    spec = replace(config.harvest, context=replace(config.harvest.context, epochs=1))
    sites = [parse_site(site) for site in config.sites]
    return write_cache(load(config.model), config.source, sites, config.out, cache=config.cache, harvest=spec)


def describe(config: HarvestConfig, cache: ActivationCache) -> str:
    """What the command prints at the end: where the cache is and what it holds."""
    short = (
        ""
        if cache.tokens >= config.cache.tokens
        else f" of the {config.cache.tokens:,} asked for: the text holds no more"
    )
    return f"wrote {config.out}: {cache.tokens:,} tokens at {', '.join(config.sites)}{short}"
