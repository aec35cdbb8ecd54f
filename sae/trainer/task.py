"""Activations and autoencoders made ready, and trained: what `sae.train` and the stage have in common."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from lm.anatomy import Site
from lm.config import as_dict
from lm.errors import UserError
from lm.model import LanguageModel
from lm.run_folder import RunFolder
from sae.activations import (
    Activations,
    ActivationsInMemory,
    ActivationStream,
    BufferSpec,
    HarvestSpec,
    NoSource,
    ReadSpec,
    Source,
    TextSource,
    as_source,
    check_alike,
    held_out_tokens,
    open_activations,
    parse_site,
    site_name,
)
from sae.formats import Provenance
from sae.metrics import recovered_over
from sae.sharding import Mesh
from sae.trainer.config import AutoencoderSpec, TrainerConfig, named
from sae.trainer.evaluation import check_held_out
from sae.trainer.loop import Log, train_on_stream
from sae.trainer.results import Trained
from sae.trainer.set_thresholds import needs_calibration
from sae.trainer.training_sae import Recipe


@dataclass(frozen=True, kw_only=True)
class Task:
    """Activations and autoencoders made ready on this process: what `train` and the stage have in common."""

    stream: ActivationStream
    members: Mapping[str, tuple[Site, AutoencoderSpec]]
    recipe: Recipe
    held_out: Mapping[Site, Tensor]
    """(tokens, hidden) of each site, the same on every process; empty where nothing is held out."""
    mesh: Mesh
    device: torch.device
    model: LanguageModel | None
    source: Source | None
    """What the stream was opened from; None for what was at hand."""
    held_out_text: TextSource | None
    harvest: HarvestSpec

    @classmethod
    def of(
        cls,
        activations: Activations,
        autoencoders: Sequence[AutoencoderSpec],
        recipe: Recipe,
        *,
        model: LanguageModel | None,
        sites: Sequence[str | Site],
        held_out: Activations | None,
        harvest: HarvestSpec,
        buffer: BufferSpec,
        reading: ReadSpec,
        device: torch.device | str | None = None,
        mesh: Mesh | None = None,
    ) -> Task:
        """Open the stream and read the held-out tokens."""
        trainer = recipe.trainer
        mesh = mesh or Mesh(features=trainer.feature_shards)
        chosen = tuple(parse_site(site) if isinstance(site, str) else site for site in sites)
        source = as_source(activations, chosen, model)
        if isinstance(source, Source):
            stream = _stream(source, chosen, model, trainer, mesh, harvest=harvest, buffer=buffer, reading=reading)
        elif isinstance(source, Mapping):
            stream = ActivationsInMemory(
                source,
                batch_tokens=trainer.batch_tokens,
                rank=mesh.stream_rank,
                world=mesh.sizes["all"],
                seed=harvest.seed,
            )
        else:
            stream = source
        _check_length(stream, trainer)
        members = named(autoencoders, chosen or stream.sites)
        if not members:
            raise UserError("autoencoders is empty: give at least one AutoencoderSpec")
        scored = None
        if held_out is not None and not isinstance(held_out, NoSource):
            scored = as_source(held_out, chosen or stream.sites, model)
        check_alike({"source": source, "held_out": scored}, model, harvest)
        text = scored if isinstance(scored, TextSource) else None
        if trainer.recovered_contexts and (text is None or model is None):
            raise UserError(
                f"trainer.recovered_contexts is {trainer.recovered_contexts} and no text is held out: give held_out text and "
                "the model, or set it to 0"
            )
        if trainer.evaluate_every is not None and scored is None:
            raise UserError(
                f"trainer.evaluate_every is {trainer.evaluate_every} and nothing is held out: give held_out"
            )
        count = trainer.held_out_tokens
        if trainer.calibrate_on == "held_out" and needs_calibration(trainer, autoencoders):
            count += trainer.calibrate_tokens
        tokens = held_out_tokens(
            scored, tuple(dict.fromkeys(site for site, _ in members.values())), count, model, harvest
        )
        check_held_out(tokens, members, trainer, hidden=stream.hidden)
        return cls(
            stream=stream,
            members=members,
            recipe=recipe,
            held_out=tokens,
            mesh=mesh,
            device=torch.device(device) if device is not None else _device(model, source),
            model=model,
            source=source if isinstance(source, Source) else None,
            held_out_text=text,
            harvest=harvest,
        )

    def settings(self) -> dict[str, Any]:
        """What the activations and their order follow from, as JSON holds it: the same in a run that goes on."""
        settings: dict[str, Any] = json.loads(json.dumps(self.stream.state_dict()["facts"].get("settings", {})))
        return settings

    def train(
        self, *, run: RunFolder | None = None, resume: bool = False, show: bool = True, log: Log | None = None
    ) -> list[Trained] | None:
        """The results; None if `trainer.max_seconds` stopped it. Every process must call it."""
        return train_on_stream(
            self.stream,
            self.members,
            self.recipe,
            mesh=self.mesh,
            device=self.device,
            run=run,
            held_out=self.held_out,
            resume=resume,
            show=show,
            log=log,
        )

    def facts(self) -> dict[str, Any]:
        """What the stream says of itself, with the counts of masked tokens of all processes. Every process must call it."""
        facts = self.stream.facts()
        if "masked" not in facts or self.mesh.sizes["all"] == 1:
            return facts
        total: Counter[str] = Counter()
        for masked in gather_object([facts["masked"]]):
            total.update(masked)
        return {**facts, "masked": dict(total)}

    def with_loss_recovered(self, result: Trained, facts: Mapping[str, Any]) -> Trained:
        """With the cross-entropy and KL recovered among the measures, if they are asked for. No collective."""
        contexts = self.recipe.trainer.recovered_contexts
        if not contexts or self.model is None or self.held_out_text is None:
            return result
        recovered = recovered_over(
            self.model,
            self.held_out_text,
            result.site,
            result.autoencoder,
            self.harvest,
            contexts=contexts,
            largest_norm=facts.get("outlier_limits", {}).get(site_name(result.site)),
        )
        measures = dataclasses.asdict(recovered)
        measures |= {"ce_recovered": recovered.ce_recovered, "kl_recovered": recovered.kl_recovered}
        del measures["tokens"]
        return dataclasses.replace(result, measures=result.measures | measures)

    def metadata(
        self,
        result: Trained,
        facts: Mapping[str, Any],
        *,
        git: str | None = None,
        config_hash: str | None = None,
    ) -> dict[str, Any]:
        """Where a result comes from and how it did, in SAELens' names and ours; plain data."""
        read = (
            as_dict(self.harvest) if isinstance(self.source, TextSource) else facts.get("settings", {}).get("harvest")
        )
        trainer, measures = self.recipe.trainer, result.measures
        provenance = Provenance(
            model_name=self.model.name if self.model is not None else facts.get("model"),
            dataset_path=getattr(self.source, "path", type(self.source or self.stream).__name__),
            context_size=read["context"]["length"] if read else None,
            prepend_bos=bool(facts.get("bos")) if read else None,
            exclude_special_tokens=read["masks"]["special"] if read else None,
            l0=measures.get("l0_exported"),
            num_dead_features=round(result.dead_in_training * result.spec.features),
            training_tokens=trainer.steps * trainer.batch_tokens,
            explained_variance=1 - measures["fvu_exported"] if measures else None,
            git=git,
            config_hash=config_hash,
        )
        own = {
            "site": site_name(result.site),
            "held_out": measures,
            "zipf": result.fitted,
            "backend": result.backend,
            "thresholds": result.thresholds,
            "activations": facts,
            "training": {name: as_dict(getattr(self.recipe, name)) for name in ("trainer", "auxiliary", "zipf")}
            | {"autoencoder": as_dict(result.spec)},
        }
        anatomy = self.model.anatomy if self.model is not None else None
        plain: dict[str, Any] = json.loads(json.dumps(own))
        return provenance.metadata(result.site, anatomy) | plain


def _stream(
    source: Source,
    sites: Sequence[Site],
    model: LanguageModel | None,
    trainer: TrainerConfig,
    mesh: Mesh,
    *,
    harvest: HarvestSpec,
    buffer: BufferSpec,
    reading: ReadSpec,
) -> ActivationStream:
    """The batches of a source that this process harvests, as many as training will ask for."""
    batch, text = trainer.batch_tokens, isinstance(source, TextSource)
    return open_activations(
        source,
        sites,
        batch_tokens=batch,
        model=model,
        harvest=harvest if text else None,
        buffer=buffer if text else None,
        reading=None if text else reading,
        rank=mesh.stream_rank,
        world=mesh.sizes["all"],
    )


def _check_length(stream: ActivationStream, trainer: TrainerConfig) -> None:
    """Raise UserError, before anything is trained, for files that end before the last step."""
    serves, batch = getattr(stream, "serves", None), trainer.batch_tokens
    begin = -(-trainer.start_tokens // batch)
    if serves is not None and serves < (begin + trainer.steps) * batch:
        raise UserError(
            f"the activations end after {serves} tokens, and {begin * batch} to start from and {trainer.steps} steps of {batch} "
            f"need {(begin + trainer.steps) * batch}: set reading.epochs to null, or trainer.steps to "
            f"{max(serves // batch - begin, 0)} at most"
        )


def _device(model: LanguageModel | None, source: Source | ActivationStream | Mapping[Site, Tensor]) -> torch.device:
    if model is not None:
        return model.device
    return next(iter(source.values())).device if isinstance(source, Mapping) else torch.device("cpu")
