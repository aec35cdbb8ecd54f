"""Training on objects in memory: a loaded model and documents, or activations. `sae.trainer.stage` does the same from files.

`train` is for a notebook or a program of one's own. What it shares with the stage is `sae.trainer.task`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lm.anatomy import Site
from lm.errors import UserError
from lm.model import LanguageModel
from sae.activations import Activations, BufferSpec, HarvestSpec, ReadSpec
from sae.model import SparseAutoencoder
from sae.trainer.config import AutoencoderSpec, AuxiliarySpec, TrainerConfig, ZipfSpec
from sae.trainer.loop import Log
from sae.trainer.results import Trained
from sae.trainer.task import Task
from sae.trainer.training_sae import Recipe


@dataclass(frozen=True)
class TrainedAutoencoders:
    """What `train` gives.

    Attributes:
        results: one an autoencoder and site, in order: `autoencoder`, `site`, `measures` on held-out tokens, `densities`.
        log: a dict a logged step, oldest first: `step`, and for each autoencoder `<name>/nmse`, `<name>/l0`, `<name>/dead`.
    """

    results: tuple[Trained, ...]
    log: list[dict[str, Any]] = field(repr=False)

    @property
    def autoencoders(self) -> dict[str, SparseAutoencoder]:
        """Name -> the autoencoder, for activations as they are, in evaluation mode, on the CPU."""
        return {result.name: result.autoencoder for result in self.results}

    @property
    def autoencoder(self) -> SparseAutoencoder:
        """The autoencoder, where one was trained."""
        if len(self.results) != 1:
            names = ", ".join(result.name for result in self.results)
            raise UserError(f"{len(self.results)} autoencoders were trained: take one of .autoencoders, {names}")
        return self.results[0].autoencoder


def train(
    activations: Activations,
    autoencoders: AutoencoderSpec | Sequence[AutoencoderSpec] = AutoencoderSpec(),  # noqa: B008 (frozen, as all defaults here)
    *,
    model: LanguageModel | None = None,
    sites: Sequence[str | Site] = (),
    held_out: Activations | None = None,
    trainer: TrainerConfig = TrainerConfig(),  # noqa: B008
    auxiliary: AuxiliarySpec = AuxiliarySpec(),  # noqa: B008
    zipf: ZipfSpec = ZipfSpec(),  # noqa: B008
    harvest: HarvestSpec = HarvestSpec(),  # noqa: B008
    buffer: BufferSpec = BufferSpec(),  # noqa: B008
    reading: ReadSpec = ReadSpec(),  # noqa: B008
    device: torch.device | str | None = None,
    show: bool = True,
    log: Log | None = None,
) -> TrainedAutoencoders:
    """Train sparse autoencoders on activations; every one at every site, all from one pass. Nothing is kept on disk.

    Args:
        activations: documents (texts, or rows as `load_rows` gives them) that `model` reads; or (tokens, hidden) of one site,
            or of each site, the same tokens in each; or any source of `sae.activations`; or a stream of your own.
        autoencoders: width, k and choice of one or several.
        model: as `lm.load` gives it; it is read, never changed. Needed for text alone.
        sites: such as `resid.3`, `mlp.3` or `attn.3`; for activations that say of what they are, all of theirs if none is named
            (a tensor without a name is of `resid.0`).
        held_out: what results are scored on and thresholds calibrated on, likewise; None scores nothing and calibrates on the
            next training tokens. Text and sources are read up to `trainer.held_out_tokens` (and `calibrate_tokens` more).
        trainer: steps, batch, rate, precision; `batch_tokens` must be a multiple of `buffer.lanes` for text.
        auxiliary: the loss that brings unused features back.
        zipf: budgets of feature choice, and the densities that aux_zipf expects.
        harvest: how text becomes activations: length of contexts, masked tokens, seed.
        buffer: in which activations of text are shuffled, two batches or more.
        reading: how files of activations are read.
        device: where autoencoders are trained; None: where the model or the tensors are, else on the CPU.
        show: a progress bar.
        log: is also called with each line of the log, as `log(step, values)`.

    Raises:
        UserError: what does not go together, text without a model, activations that end early or are not finite, a training
            that diverges.

    Example:
        >>> import sae
        >>> from lm import load
        >>> from lm.row_files import load_rows
        >>> from sae.activations import BufferSpec
        >>> from sae.trainer import TrainerConfig
        >>> done = sae.train(
        ...     load_rows("builtin:forget"),
        ...     sae.AutoencoderSpec(choice="token", features=64, k=4),
        ...     model=load("builtin", device="cpu"),
        ...     sites=["resid.3"],
        ...     held_out=load_rows("builtin:held_out"),
        ...     trainer=TrainerConfig(steps=20, batch_tokens=128, start_tokens=256, held_out_tokens=256),
        ...     buffer=BufferSpec(tokens=1024),
        ...     show=False,
        ... )
        >>> done.autoencoder
        SparseAutoencoder(token choice, 64 features, hidden 128, k 4, at resid.3)
        >>> [entry["step"] for entry in done.log if "step" in entry][:2]
        [10, 20]
        >>> 0 < done.results[0].measures["fvu"] < 1
        True
    """
    if trainer.max_seconds is not None:
        raise UserError(
            f"trainer.max_seconds is {trainer.max_seconds}: leave it out, sae.train keeps no checkpoint to go on from "
            "(palimpsest train-sae does)"
        )
    lines: list[dict[str, Any]] = []

    def write(step: int, values: dict[str, float]) -> None:
        lines.append({"step": step, **values})
        if log is not None:
            log(step, values)

    task = Task.of(
        activations,
        [autoencoders] if isinstance(autoencoders, AutoencoderSpec) else autoencoders,
        Recipe(trainer=trainer, auxiliary=auxiliary, zipf=zipf),
        model=model,
        sites=sites,
        held_out=held_out,
        harvest=harvest,
        buffer=buffer,
        reading=reading,
        device=device,
    )
    results = task.train(show=show, log=write)
    assert results is not None  # nothing stops it early
    facts = task.facts()
    results = [task.with_loss_recovered(result, facts) for result in results]
    for result in results:
        result.autoencoder.metadata = task.metadata(result, facts)
    return TrainedAutoencoders(tuple(results), lines)
