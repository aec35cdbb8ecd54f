"""One door to every stream: what a config names, as batches."""

from __future__ import annotations

from collections.abc import Sequence

from lm.anatomy import Site
from lm.errors import UserError
from lm.model import LanguageModel
from sae.activations.batch import ActivationStream
from sae.activations.cache.manifest import open_cache
from sae.activations.cache.reading import CachedActivations, ReadSpec
from sae.activations.harvesting import HarvestSpec
from sae.activations.live import BufferSpec, LiveActivations
from sae.activations.sources import ActivationFiles, MadeActivations, Source, TextSource


def open_activations(
    source: Source,
    sites: Sequence[Site],
    *,
    batch_tokens: int,
    model: LanguageModel | None = None,
    harvest: HarvestSpec | None = None,
    buffer: BufferSpec | None = None,
    reading: ReadSpec | None = None,
    rank: int = 0,
    world: int = 1,
    tokens: int | None = None,
) -> ActivationStream:
    """Batches of `batch_tokens` tokens (rows `rank::world` of them) at `sites`, from text by way of `model`, from files, or
    from a source that makes them.

    `harvest`, `buffer` and `tokens` are for text, `reading` for files. No site means all that the files hold.
    """
    if isinstance(source, ActivationFiles):
        device = model.device if model is not None else "cpu"
        return CachedActivations(
            open_cache(source),
            sites,
            batch_tokens=batch_tokens,
            reading=reading,
            rank=rank,
            world=world,
            device=device,
        )
    if isinstance(source, MadeActivations):
        device = model.device if model is not None else "cpu"
        return source.stream(sites, batch_tokens=batch_tokens, rank=rank, world=world, device=device)
    if not isinstance(source, TextSource):
        raise UserError(f"{type(source).__name__} is no source of activations: use one of sae.activations.sources")
    if model is None:
        raise UserError("activations of text need the language model that reads it: give a model, or files")
    return LiveActivations(
        model,
        source,
        sites,
        batch_tokens=batch_tokens,
        harvest=harvest,
        buffer=buffer,
        rank=rank,
        world=world,
        tokens=tokens,
    )
