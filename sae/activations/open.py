"""One door to every stream: what a config names, as batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from lm.anatomy import Site
from lm.errors import UserError
from lm.model import LanguageModel, fingerprint, tokenizer_fingerprint
from sae.activations.batch import ActivationStream
from sae.activations.cache.manifest import open_cache
from sae.activations.cache.reading import CachedActivations, ReadSpec
from sae.activations.harvesting import HarvestSpec
from sae.activations.live import BufferSpec, LiveActivations
from sae.activations.provenance import settings_of_today
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


def check_alike(sources: Mapping[str, object], model: LanguageModel | None, harvest: HarvestSpec) -> None:
    """Raise UserError if a cache among the `sources` (by the name of their setting) was made by another model than `model`, or
    if two of them do not read text alike: by other contexts or masks, of another model. Plain files say nothing, and pass.
    """
    if not any(isinstance(source, ActivationFiles) for source in sources.values()):
        return
    own = {} if model is None else _identity(model)
    made: list[tuple[str, dict[str, Any]]] = []
    for name, source in sources.items():
        if isinstance(source, ActivationFiles):
            if (origin := _origin(source)) is None:
                continue
            made.append((f"{name} (the cache {source.path}, made by {origin.pop('model')})", origin))
            if model is not None:
                _require(made[-1], (f"model {model.name}", own), "give the model that made it, in its type")
        elif isinstance(source, TextSource) and model is not None:
            made.append((name, {**own, **_reading(asdict(harvest))}))
    for other in made[1:]:
        _require(made[0], other, "set harvest as the cache was made, or make it again")


def _origin(source: ActivationFiles) -> dict[str, Any] | None:
    """What the values in a cache follow from beside the text; None of plain files."""
    facts = open_cache(source).facts
    if "settings" not in facts:
        return None
    settings = settings_of_today(facts["settings"])
    identity = {name: settings.get(name) for name in ("weights", "dtype", "tokenizer")}
    return {"model": facts.get("model"), **identity, **_reading(settings["harvest"])}


def _identity(model: LanguageModel) -> dict[str, Any]:
    dtype = str(next(model.model.parameters()).dtype).removeprefix("torch.")
    return {"weights": fingerprint(model), "dtype": dtype, "tokenizer": tokenizer_fingerprint(model.tokenizer)}


def _reading(harvest: Mapping[str, Any]) -> dict[str, Any]:
    """How text is read, without the order and the number of rounds."""
    context = {f"harvest.context.{name}": harvest["context"][name] for name in ("length", "pack", "separator", "bos")}
    return context | {f"harvest.masks.{name}": value for name, value in harvest["masks"].items()}


def _require(one: tuple[str, dict[str, Any]], other: tuple[str, dict[str, Any]], remedy: str) -> None:
    """UserError naming the first thing that differs, of those that both know."""
    for key, value in one[1].items():
        if key in other[1] and other[1][key] != value:
            raise UserError(f"{one[0]} has {key} {value} and {other[0]} has {other[1][key]}: {remedy}")
