"""What the unlearning loop is told: batches, rate and schedule, precision, checkpoints; checked when it is read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from lm.errors import UserError
from unlearn.gradient_filter import GradientFilter
from unlearn.training.batches import Batches, PairedBatches, Pairing, SequentialBatches
from unlearn.training.schedule import Schedule, forget_weight, learning_rate
from unlearn.training.step import Weighting
from unlearn.training.streams import StreamBatches

Checkpoint = Literal["last", "lowest_joint_loss", "best_task_aggregate"]


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How the loop runs. The defaults are the published ones where they are known; docs/method.md says why each is so."""

    epochs: int = 8
    """Passes over the larger side (paired) or over all rows (mixed). Ignored if `steps` is given."""
    steps: int | None = None
    """Optimizer steps, instead of `epochs`."""
    batch: int = 120
    """Rows in a global batch, forget and retain together, over all processes."""
    micro_batch: int = 12
    """Rows that go through the model at once on one process: memory, not mathematics."""
    micro_tokens: int | None = None
    """And their tokens at most, padding and alternates included (a longer row goes alone): few long rows or many short ones
    at once, which levels the peak of memory. Null for no such limit."""
    learning_rate: float = 1.5e-5
    """Peak learning rate of AdamW."""
    betas: tuple[float, float] = (0.9, 0.999)
    """How long AdamW remembers gradients and their squares; (0.9, 0.95) follows faster where they shrink a lot, as in healing."""
    schedule: Schedule = "linear"
    """How the learning rate falls to 0."""
    warmup: int = 0
    """Steps over which it first rises."""
    clip: float | None = 1.0
    """Largest gradient norm; null for none."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    pairing: Pairing = "paired"
    """Equal numbers of forget and retain rows a step; or one mixed shuffle as the authors do; or `sequential`: the forget rows
    in chunks, `epochs` passes over each before the next, every forget row followed by some of the retain rows in their turn;
    or `streams`: so many forget rows, general texts and retain rows a step, by their shares."""
    chunk: int = 32
    """Forget rows in a chunk (sequential)."""
    retain_per_forget: int = 7
    """Retain rows that follow each forget row (sequential)."""
    forget_share: float = 0.1
    """Share of a batch's rows that are forget rows (streams)."""
    general_share: float = 0.45
    """Share that is general text (streams); the retain rows are the rest."""
    forget_from: float = 0.0
    """The forget rows come in after this share of the steps, as for healing first and forgetting then."""
    forget_ramp: float = 0.0
    """Share of the steps over which the forget term's weight then rises to 1."""
    folds: int = 1
    """Forget in so many stages: stage i forgets the first i folds of the forget documents and retains the others."""
    gradient_filter: GradientFilter | None = None
    """Collapse the leading singular directions of each matrix's forget gradient, before the retain gradient joins it."""
    weighting: Weighting = "global_tokens"
    """Each token of the global batch counts alike, or each row (short answers then weigh more), or the authors' mean of
    micro-batch means."""
    autocast: Literal["no", "bf16", "fp16"] = "no"
    """Compute in this type over float32 master weights. (Pure bfloat16 is model.dtype: bfloat16 with autocast no.)"""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    reference: Literal["cached", "live"] = "cached"
    """The original's log-probabilities: computed once for every row that will be drawn and kept in the run folder, or at
    every step. Its hidden states are always asked for at every step, its logits too without `cached_logits`."""
    cached_logits: int | None = None
    """Of the original's logits, the largest so many of each supervised token, computed once and kept in the run folder, for
    retain terms and objectives that compare with them; as many as the vocabulary has keep all, exactly. Null: at every step."""
    cache_below: bool = False
    """Compute what the scope's first layer reads once, and keep it on disk: layers below do not run again."""
    estimate: bool = True
    """Say before the steps what memory and time they will take, from a few micro-batches that change nothing."""
    seed: int = 42
    """Order of the batches."""
    save_every: int = 50
    """Steps between checkpoints to resume from."""
    evaluate_every: int | None = None
    """Steps between scorings on the validation split."""
    checkpoint: Checkpoint = "last"
    """Which weights are the result."""
    max_seconds: float | None = None
    """Stop, and keep the result so far, after this much training time."""

    def __post_init__(self) -> None:
        positive = (
            "epochs",
            "steps",
            "batch",
            "micro_batch",
            "micro_tokens",
            "learning_rate",
            "save_every",
            "evaluate_every",
            "max_seconds",
            "chunk",
            "retain_per_forget",
            "folds",
            "cached_logits",
        )
        for name in positive:
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"trainer.{name} is {value}: give a positive number")
        if self.clip is not None and not self.clip > 0:
            raise UserError(f"trainer.clip is {self.clip}: give a positive norm, or null for none")
        for name in ("warmup", "seed", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise UserError(f"trainer.{name} is {getattr(self, name)}: give 0 or more")
        if self.steps is not None and self.warmup >= self.steps:
            raise UserError(
                f"trainer.warmup is {self.warmup} of {self.steps} steps: the peak rate is never reached; give fewer"
            )
        self._refuse_out_of_range()
        if self.pairing == "sequential" and self.folds > 1:
            raise UserError(
                "trainer.folds are stages, and sequential batches have chunks of their own: give one of them"
            )
        if self.pairing != "sequential" and (self.chunk, self.retain_per_forget) != (32, 7):
            raise UserError(
                f"trainer.chunk is {self.chunk} and trainer.retain_per_forget {self.retain_per_forget}, and {self.pairing} "
                "batches have neither: set trainer.pairing to sequential, or leave them out"
            )
        if self.checkpoint != "last" and self.evaluate_every is None:
            raise UserError(
                f"trainer.checkpoint is {self.checkpoint!r}, which needs scores: set trainer.evaluate_every"
            )
        if self.weighting == "micro_batch_mean" and self.gradient_filter is not None:
            raise UserError(
                "trainer.gradient_filter needs the forget rows' gradient by itself, and micro_batch_mean mixes both sides: set "
                "trainer.weighting to global_tokens"
            )
        if self.weighting == "micro_batch_mean" and self.micro_tokens is not None:
            raise UserError(
                "trainer.micro_tokens is set: with micro_batch_mean the loss depends on where rows are cut; leave it out"
            )
        if self.weighting == "micro_batch_mean" and self.pairing == "paired" and self.micro_batch < 2:
            raise UserError("trainer.micro_batch is 1: with micro_batch_mean a paired micro-batch needs both sides")

    def _refuse_out_of_range(self) -> None:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(
                f"trainer.betas is {list(self.betas)}: give two numbers from 0 to below 1 (0.9 and 0.999 are usual)"
            )
        if not 0 < self.forget_share < 1:
            raise UserError(f"trainer.forget_share is {self.forget_share}: give a share, above 0 and below 1")
        for name in ("general_share", "forget_from", "forget_ramp"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"trainer.{name} is {getattr(self, name)}: give a share, from 0 to below 1")
        for one, other in (("forget_from", "forget_ramp"), ("forget_share", "general_share")):
            both = getattr(self, one), getattr(self, other)
            if sum(both) > 1:
                raise UserError(
                    f"trainer.{one} is {both[0]} and trainer.{other} {both[1]}, together above 1: give smaller shares"
                )
        if self.pairing != "streams" and (self.forget_share, self.general_share) != (0.1, 0.45):
            raise UserError(
                f"trainer.forget_share is {self.forget_share} and trainer.general_share {self.general_share}, and {self.pairing} "
                "batches have neither: set trainer.pairing to streams, or leave them out"
            )

    def batches(self, forget: int, retain: int, general: int = 0) -> Batches:
        """The order of so many rows a side, and of general texts (streams)."""
        if self.pairing == "streams":
            return StreamBatches.of_shares(
                forget=forget,
                retain=retain,
                general=general,
                batch=self.batch,
                forget_share=self.forget_share,
                general_share=self.general_share,
                seed=self.seed,
            )
        if self.pairing == "sequential":
            return SequentialBatches(
                forget=forget,
                retain=retain,
                batch=self.batch,
                chunk=self.chunk,
                retain_per_forget=self.retain_per_forget,
                epochs=self.epochs,
                seed=self.seed,
            )
        return PairedBatches(forget=forget, retain=retain, batch=self.batch, pairing=self.pairing, seed=self.seed)

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of the 0-based `step` of `steps` (`unlearn.training.schedule`)."""
        return learning_rate(step, steps, peak=self.learning_rate, schedule=self.schedule, warmup=self.warmup)

    def forget_weight(self, step: int, steps: int) -> float:
        """What the forget term counts at the 0-based `step` of `steps`: 0 before it begins, 1 when it has risen."""
        return forget_weight(step, steps, begins=self.forget_from, ramp=self.forget_ramp)
