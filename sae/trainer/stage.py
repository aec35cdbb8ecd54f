"""The training stage from files to files: load the model, open the activations, train, write one folder an autoencoder.

This is wiring; every decision is in the config, every computation in the modules it calls (`sae.train` calls the same).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from lm.config import as_dict, dump_yaml
from lm.devices import accelerator, launch_facts, together
from lm.errors import UserError
from lm.loading import load
from lm.run_folder import RunFolder, damage, environment, peak_memory_bytes, stage, write_json
from sae.activations import TextSource
from sae.activations.provenance import settings_of_today
from sae.model import save_autoencoder
from sae.trainer.checkpoints import seconds_so_far
from sae.trainer.config import TrainSaeConfig, crossed
from sae.trainer.results import Trained
from sae.trainer.task import Task
from sae.trainer.training_sae import Recipe

RESULTS = "results.json"
SHOWN = ("fvu", "l0", "fvu_exported", "l0_exported", "ce_recovered")
"""The measures that the command prints."""
MANY_ROUNDS = 2.0
"""Of the same activations, from which on it is remarked."""
FREE = ("trainer.max_seconds", "trainer.save_every", "trainer.log_every", "trainer.feature_shards", "trainer.steps")
"""Settings that may change when a run goes on; fewer steps, where activations ended before."""


@stage
def run_train_sae(config: TrainSaeConfig) -> dict[str, Path]:
    """Train as the config says; returns name -> the folder of each autoencoder (`<out>/<name>`); empty if it was stopped.

    Raises:
        UserError: whatever the user can mend, before anything is trained wherever that is possible.
    """
    started = time.perf_counter()
    out = Path(config.out)
    acc = accelerator(trackers=config.trackers, folder=out, cpu=config.model.device == "cpu")
    task = _task(config, acc)
    run = _run_folder(config, acc, task)
    folders = {name: out / name for name in task.members}
    if (out / RESULTS).exists():
        with together(acc):
            for folder in folders.values() if acc.is_main_process else ():
                if (problem := damage(folder)) is not None:
                    raise UserError(f"{folder} is damaged ({problem}): restore it, or train again in another folder")
        acc.print(f"already finished: {out}")
        return folders
    if config.trackers:
        acc.init_trackers("sae", config={"config": str(as_dict(config))})
    earlier = seconds_so_far(run) if config.resume and acc.is_main_process else 0.0
    log = (lambda step, values: acc.log(values, step=step)) if acc.trackers else None
    results = task.train(run=run, resume=config.resume, log=log)
    for tracker in acc.trackers:
        tracker.finish()
    if results is None:
        return {}
    facts = task.facts()
    with together(acc):
        if acc.is_main_process:
            results = [task.with_loss_recovered(result, facts) for result in results]
            _write(run, config, task, results, facts)
            rounds = getattr(task.stream, "rounds", None)
            run.finish(
                **({} if rounds is None else {"rounds": round(rounds, 2)}),
                backends={result.name: result.backend for result in results},
                wall_seconds=round(earlier + time.perf_counter() - started, 3),
                peak_memory_bytes=peak_memory_bytes(),
                peak_gpu_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
            )
            write_json(
                out / RESULTS,
                {
                    r.name: {
                        **r.measures,
                        "dead_in_training": r.dead_in_training,
                        **({"zipf": r.fitted} if r.fitted else {}),
                    }
                    for r in results
                },
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
        found = results[name]
        measures = ", ".join(f"{key} {found[key]:.4g}" for key in SHOWN if key in found)
        said = [f"on held-out tokens {measures}" if measures else "not scored, since nothing is held out"]
        if "dead_in_training" in found:  # older runs have none
            said.append(f"{found['dead_in_training']:.1%} of its features dead in training")
        lines.append(f"wrote {folder}: " + "; ".join(said))
    rounds, read = RunFolder(config.out).manifest.get("rounds", 0.0), config.trainer.steps * config.trainer.batch_tokens
    if rounds >= MANY_ROUNDS:
        lines.append(
            f"the activations were read {rounds:.1f} times over, about {read / rounds:,.0f} different tokens: features of what "
            "recurs by chance are learned too; give more text, or train for fewer steps"
        )
    return "\n".join(lines)


def _task(config: TrainSaeConfig, acc: Accelerator) -> Task:
    """The model, if text is read, the stream, the held-out tokens and the autoencoders."""
    reads_text = isinstance(config.source, TextSource) or isinstance(config.held_out_source, TextSource)
    return Task.of(
        config.source,
        crossed(config.autoencoders, config.sweep),
        Recipe(trainer=config.trainer, auxiliary=config.auxiliary, zipf=config.zipf),
        model=load(config.model, device=str(acc.device)) if reads_text else None,
        sites=config.sites,
        held_out=config.held_out_source,
        harvest=config.harvest,
        buffer=config.buffer,
        reading=config.reading,
        device=acc.device,
    )


def _run_folder(config: TrainSaeConfig, acc: Accelerator, task: Task) -> RunFolder:
    """The run folder, made or gone on with by the main process; other data than those it began with are refused."""
    run, settings = RunFolder(config.out, main=acc.is_main_process), task.settings()
    with together(acc):
        if acc.is_main_process:
            facts = {"seed": config.harvest.seed, "data": settings, "devices": launch_facts(acc)}
            run = RunFolder.create(
                config.out,
                replace(config, held_out=config.held_out_source),  # the stored config says which
                resume=config.resume,
                facts=facts,
                same=("data",),
                free=FREE,
                of_today={"data": settings_of_today},
            )
    return run


def _write(
    run: RunFolder, config: TrainSaeConfig, task: Task, results: Sequence[Trained], facts: Mapping[str, Any]
) -> None:
    """A folder an autoencoder, with what made it."""
    git, config_hash = environment()["git"], hashlib.sha256(dump_yaml(config).encode()).hexdigest()[:16]
    for result in results:
        metadata = task.metadata(result, facts, git=git, config_hash=config_hash)
        with run.writing(result.name) as folder:
            save_autoencoder(result.autoencoder, folder, metadata=metadata, densities=result.densities)
