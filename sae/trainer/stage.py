"""The training stage from files to files: load the model, open the activations, train, write one folder an autoencoder.

This is wiring; every decision is in the config, every computation in the modules it calls.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from lm.anatomy import Site
from lm.config import as_dict, dump_yaml
from lm.devices import accelerator, launch_facts, together
from lm.errors import UserError
from lm.loading import load
from lm.model import LanguageModel
from lm.run_folder import RunFolder, environment, peak_memory_bytes, write_json
from sae.activations import (
    ActivationFiles,
    ActivationStream,
    ContextSpec,
    MadeActivations,
    ReadSpec,
    Source,
    TextSource,
    harvest,
    open_activations,
    parse_site,
    site_name,
)
from sae.formats import Provenance
from sae.metrics import recovered_over
from sae.model import save_autoencoder
from sae.sharding import Mesh
from sae.trainer.config import NoSource, TrainSaeConfig, crossed, named
from sae.trainer.loop import train_on_stream
from sae.trainer.results import Trained
from sae.trainer.set_thresholds import needs_calibration
from sae.trainer.training_sae import Recipe

RESULTS = "results.json"
SHOWN = ("fvu", "l0", "fvu_exported", "l0_exported", "dead", "ce_recovered")
"""The measures that the command prints."""
FREE = ("trainer.max_seconds", "trainer.save_every", "trainer.log_every", "trainer.feature_shards")
"""Settings that may change when a run goes on."""


def run_train_sae(config: TrainSaeConfig) -> dict[str, Path]:
    """Train as the config says; returns name -> the folder of each autoencoder (`<out>/<name>`); empty if it was stopped.

    Raises:
        UserError: whatever the user can mend, before anything is trained wherever that is possible.
    """
    sites = [parse_site(site) for site in config.sites]
    members = named(crossed(config.autoencoders, config.sweep), sites)
    out = Path(config.out)
    acc = accelerator(trackers=config.trackers, folder=out, cpu=config.model.device == "cpu")
    mesh = Mesh(features=config.trainer.feature_shards)
    started = time.perf_counter()
    model = load(config.model, device=str(acc.device)) if _needs_model(config) else None
    stream = _stream(config, sites, model, mesh)
    held_out = held_out_tokens(config.held_out, sites, model, config)
    settings = json.loads(json.dumps(stream.state_dict()["facts"].get("settings", {})))
    run = RunFolder(out, main=acc.is_main_process)
    with together(acc):
        if acc.is_main_process:
            facts = {"seed": config.harvest.seed, "data": settings, "devices": launch_facts(acc)}
            run = RunFolder.create(out, config, resume=config.resume, facts=facts, same=("data",), free=FREE)
    folders = {name: out / name for name in members}
    if (out / RESULTS).exists():
        acc.print(f"already finished: {out}")
        return folders
    if config.trackers:
        acc.init_trackers("sae", config={"config": str(as_dict(config))})
    results = train_on_stream(
        stream,
        members,
        Recipe(trainer=config.trainer, auxiliary=config.auxiliary, zipf=config.zipf),
        mesh=mesh,
        device=acc.device,
        run=run,
        held_out=held_out,
        resume=config.resume,
        log=(lambda step, values: acc.log(values, step=step)) if acc.trackers else None,
    )
    for tracker in acc.trackers:
        tracker.finish()
    if results is None:
        return {}
    activations = _facts_of_all(stream)
    with together(acc):
        if acc.is_main_process:
            limits = activations.get("outlier_limits", {})
            results = [_with_behavior(result, config, model, limits) for result in results]
            for result in results:
                _write(result, folders[result.name], config, activations, model)
            run.finish(
                backends={result.name: result.backend for result in results},
                wall_seconds=round(time.perf_counter() - started, 3),
                peak_memory_bytes=peak_memory_bytes(),
                peak_gpu_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
            )
            write_json(
                out / RESULTS, {r.name: {**r.measures, **({"zipf": r.fitted} if r.fitted else {})} for r in results}
            )
            run.prune_checkpoints(keep=0)
    return folders


def describe(config: TrainSaeConfig, folders: Mapping[str, Path]) -> str:
    """What the command prints at the end: a line an autoencoder, with its measures on held-out tokens."""
    if not folders:
        return f"stopped after trainer.max_seconds: the same command with --resume true goes on in {config.out}"
    results = json.loads((Path(config.out) / RESULTS).read_text())
    lines = []
    for name, folder in folders.items():
        measures = ", ".join(f"{key} {results[name][key]:.4g}" for key in SHOWN if key in results[name])
        lines.append(f"wrote {folder}" + (f": on held-out tokens {measures}" if measures else ""))
    return "\n".join(lines)


def held_out_tokens(
    source: Source, sites: Sequence[Site], model: LanguageModel | None, config: TrainSaeConfig
) -> dict[Site, Tensor]:
    """(tokens, hidden) of each site, the same on every process, documents in an order drawn by `harvest.seed`.

    `trainer.held_out_tokens` at most, and before them those that thresholds are calibrated on (`split_held_out`).
    """
    if isinstance(source, NoSource):
        return {}
    wanted = config.trainer.held_out_tokens
    if config.trainer.calibrate_on == "held_out" and needs_calibration(config.trainer, config.autoencoders):
        wanted += config.trainer.calibrate_tokens
    parts: dict[Site, list[Tensor]] = {site: [] for site in sites}
    seen = 0
    if isinstance(source, ActivationFiles):
        reading = ReadSpec(shuffle=False, epochs=1, keep_last=True)
        batches = iter(open_activations(source, sites, batch_tokens=min(wanted, 4096), reading=reading))
    elif isinstance(source, MadeActivations):
        batches = iter(open_activations(source, sites, batch_tokens=min(wanted, 4096)))
    else:
        if model is None or not isinstance(source, TextSource):
            raise UserError(f"held_out is {type(source).__name__}: name text, activation files, or NoSource")
        context = dataclasses.replace(config.harvest.context, shuffle=True, epochs=1)
        batches = harvest(model, source, sites, dataclasses.replace(config.harvest, context=context))
    for batch in batches:
        for site in sites:
            parts[site].append(batch[site][: wanted - seen].float().cpu())
        seen += min(len(batch), wanted - seen)
        if seen >= wanted:
            break
    if seen < 2:
        raise UserError("held_out holds less than two tokens that are not masked: give more text, or NoSource")
    return {site: torch.cat(own) for site, own in parts.items()}


def _needs_model(config: TrainSaeConfig) -> bool:
    return isinstance(config.source, TextSource) or isinstance(config.held_out, TextSource)


def _stream(config: TrainSaeConfig, sites: Sequence[Site], model: LanguageModel | None, mesh: Mesh) -> ActivationStream:
    trainer, batch = config.trainer, config.trainer.batch_tokens
    text = isinstance(config.source, TextSource)
    return open_activations(
        config.source,
        sites,
        batch_tokens=batch,
        model=model,
        harvest=config.harvest if text else None,
        buffer=config.buffer if text else None,
        reading=None if text else config.reading,
        rank=mesh.stream_rank,
        world=mesh.sizes["all"],
        tokens=batch * (trainer.steps + -(-trainer.start_tokens // batch)) if text else None,
    )


def _facts_of_all(stream: ActivationStream) -> dict[str, Any]:
    """What the stream says of itself, with the counts of masked tokens of all processes."""
    facts = stream.facts()
    if "masked" not in facts:
        return facts
    total: Counter[str] = Counter()
    for masked in gather_object([facts["masked"]]):
        total.update(masked)
    return {**facts, "masked": dict(total)}


def _with_behavior(
    result: Trained, config: TrainSaeConfig, model: LanguageModel | None, limits: Mapping[str, float]
) -> Trained:
    """With the cross-entropy and KL recovered among the measures, if they are asked for."""
    contexts = config.trainer.recovered_contexts
    if not contexts or model is None or not isinstance(config.held_out, TextSource):
        return result
    found = recovered_over(
        model,
        config.held_out,
        result.site,
        result.autoencoder,
        config.harvest,
        contexts=contexts,
        largest_norm=limits.get(site_name(result.site)),
    )
    shown = {**dataclasses.asdict(found), "ce_recovered": found.ce_recovered, "kl_recovered": found.kl_recovered}
    del shown["tokens"]
    return dataclasses.replace(result, measures=result.measures | shown)


def _write(
    result: Trained, folder: Path, config: TrainSaeConfig, activations: Mapping[str, Any], model: LanguageModel | None
) -> None:
    context: ContextSpec = config.harvest.context
    text = isinstance(config.source, TextSource)
    source: Any = config.source
    measures = result.measures
    dead = None if result.densities is None else int((result.densities == 0).sum())
    provenance = Provenance(
        model_name=model.name if model is not None else None,
        dataset_path=getattr(source, "path", type(source).__name__),
        context_size=context.length if text else None,
        prepend_bos=bool(activations.get("bos")) if text else None,
        exclude_special_tokens=config.harvest.masks.special if text else None,
        l0=measures.get("l0_exported"),
        num_dead_features=dead,
        training_tokens=config.trainer.steps * config.trainer.batch_tokens,
        explained_variance=1 - measures["fvu_exported"] if measures else None,
        git=environment()["git"],
        config_hash=hashlib.sha256(dump_yaml(config).encode()).hexdigest()[:16],
    )
    own = {
        "site": site_name(result.site),
        "held_out": measures,
        "zipf": result.fitted,
        "backend": result.backend,
        "thresholds": result.thresholds,
        "activations": activations,
        "training": {name: as_dict(getattr(config, name)) for name in ("trainer", "auxiliary", "zipf")}
        | {"autoencoder": as_dict(result.spec)},
    }
    metadata = provenance.metadata(result.site, model.anatomy if model is not None else None)
    save_autoencoder(
        result.autoencoder, folder, metadata=metadata | json.loads(json.dumps(own)), densities=result.densities
    )
