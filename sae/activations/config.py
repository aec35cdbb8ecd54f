"""One harvest as data: a model, a text, sites, and the cache they go to. What is done with it is `sae.activations.stage`."""

from __future__ import annotations

from dataclasses import dataclass, field

from lm.errors import UserError
from lm.model import ModelSpec
from sae.activations.batch import parse_site, require_different
from sae.activations.cache.staging import CacheSpec
from sae.activations.harvesting import HarvestSpec
from sae.activations.sources import Builtin, Source, TextSource

HELP = """Look inside, first half: harvest activations into a cache on disk, from which many autoencoders can be trained.

palimpsest harvest --config builtin --out runs/activations
palimpsest train-sae --config builtin --source ActivationFiles --source.path runs/activations
"""


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
    """The cache's folder."""
    resume: bool = False
    """Go on with the harvest in `out`; a finished one is opened as it is."""

    def __post_init__(self) -> None:
        if not isinstance(self.source, TextSource):
            raise UserError(f"source is {type(self.source).__name__}: a cache is harvested from text, name some")
        if not self.sites:
            raise UserError("sites is empty: name at least one, such as resid.3")
        require_different([parse_site(site) for site in self.sites])
