"""The harvesting stage: a model, a text and sites in, a cache of shuffled activations out."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from lm.errors import UserError
from lm.loading import load
from lm.model import ModelSpec
from sae.activations.batch import parse_site
from sae.activations.cache.staging import CacheSpec
from sae.activations.cache.writing import write_cache
from sae.activations.harvesting import HarvestSpec
from sae.activations.sources import Builtin, Source, TextSource


@dataclass(frozen=True, kw_only=True)
class HarvestConfig:
    """Which activations are kept, and where."""

    model: ModelSpec = field(default_factory=ModelSpec)
    """The language model."""
    source: Source = field(default_factory=Builtin)
    """The text."""
    sites: tuple[str, ...] = ("resid.3",)
    """Sites of the model, such as resid.3, mlp.3 or attn.3; a trainer may read some of them."""
    harvest: HarvestSpec = field(default_factory=HarvestSpec)
    """How text becomes activations. Each text is read once, whatever `harvest.context.epochs` says: readers repeat it."""
    cache: CacheSpec = field(default_factory=lambda: CacheSpec(tokens=1_000_000))
    """How many tokens, and how they are kept."""
    out: str = "runs/activations"
    """The cache's folder; an interrupted harvest goes on there."""

    def __post_init__(self) -> None:
        if not isinstance(self.source, TextSource):
            raise UserError(f"source is {type(self.source).__name__}: a cache is harvested from text, name some")
        if not self.sites:
            raise UserError("sites is empty: name at least one, such as resid.3")


def run_harvest(config: HarvestConfig) -> None:
    """Write the cache, or go on with it, and say what it holds."""
    assert isinstance(config.source, TextSource)
    spec = replace(config.harvest, context=replace(config.harvest.context, epochs=1))
    sites = [parse_site(site) for site in config.sites]
    cache = write_cache(load(config.model), config.source, sites, config.out, cache=config.cache, harvest=spec)
    print(f"wrote {config.out}: {cache.tokens:,} tokens at {', '.join(config.sites)}")
