"""The harvesting stage: a model, a text and sites in, a cache of shuffled activations out."""

from __future__ import annotations

from dataclasses import replace

from lm.loading import load
from sae.activations.batch import parse_site
from sae.activations.cache.manifest import ActivationCache
from sae.activations.cache.writing import write_cache
from sae.activations.config import HarvestConfig
from sae.activations.sources import TextSource


def run_harvest(config: HarvestConfig) -> ActivationCache:
    """Write the cache, or go on with it; the cache, opened.

    Raises:
        UserError: what is missing, does not go together, or a folder that holds another cache.
    """
    assert isinstance(config.source, TextSource)
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
