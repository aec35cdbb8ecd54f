"""The unlearning loop: deterministic batches, one gradient a step, checkpoints, periodic scoring, exact resume.

It runs on whatever `lm.devices` set up. It does not read data, choose layers or know any metric: rows arrive encoded,
the scope is already applied, and `validate` is a function that returns named numbers.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from lm.devices import sum_over_processes
from lm.errors import UserError
from lm.model import LanguageModel
from lm.run_folder import RunFolder, progress
from lm.shards import is_sharded, local_part
from unlearn.forward.calibration import Calibration, Measured
from unlearn.forward.passes import Passes
from unlearn.forward.recomputing import recompute_activations
from unlearn.forward.reference_model import Reference, reference
from unlearn.objectives import Calibrated, Loss, RetainMemory
from unlearn.perturbation import NoPerturbation, Perturbation, perturb
from unlearn.perturbation.apply import described, sentence
from unlearn.scope.scope import WeightMask
from unlearn.training import checkpoint
from unlearn.training.allocator import return_freed_memory
from unlearn.training.batches import Batches
from unlearn.training.checks import refuse_what_cannot_be
from unlearn.training.config import TrainerConfig
from unlearn.training.estimate import estimate
from unlearn.training.masks import Masks, make_masks
from unlearn.training.reference_cache import ReferenceCache, asks_original
from unlearn.training.side import Side
from unlearn.training.step import Stepper, StepResult
from unlearn.training.streams import FoldedBatches, LateBatches, deal_folds

Validate = Callable[[RetainMemory], dict[str, float]]

_RULES: dict[str, tuple[str, float]] = {
    "lowest_joint_loss": ("joint_loss", -1.0),
    "best_task_aggregate": ("task_aggregate", 1.0),
}


@dataclass
class Progress:
    """Where a run stands; everything here is in the checkpoint."""

    step: int = 0
    memory: RetainMemory = dataclasses.field(default_factory=RetainMemory)
    best: dict[str, float] | None = None
    seconds: float = 0.0
    earlier: float = 0.0
    """Of the seconds, those of earlier starts."""
    tokens: int = 0
    scaler: dict[str, Any] | None = None
    targets: Measured | None = None


def train(
    acc: Accelerator,
    model: LanguageModel,
    forget: Side,
    retain: Side,
    loss: Loss,
    config: TrainerConfig,
    *,
    run: RunFolder,
    made_from: str,
    mask: WeightMask | None = None,
    perturbation: Perturbation = NoPerturbation(),  # noqa: B008 (frozen)
    calibration: Side | None = None,
    validate: Validate | None = None,
    resume: bool = False,
    keep_checkpoints: bool = True,
    label: str = "unlearn",
) -> tuple[nn.Module, Progress]:
    """Train the parameters that require gradients; returns the (wrapped) model with the result in it, and the closing facts.

    Args:
        model: with the scope applied. Dropout stays off: one, two and N processes give the same numbers.
        forget, retain: encoded rows; `retain` may be empty if the loss does not use it.
        made_from: the fingerprint of the model as it is, which names what is computed beforehand.
        mask: which single weights may change; None for all that require gradients.
        perturbation: what is done to the weights before the first step, after what is asked of the original was kept.
        calibration: rows that no model saw, for an objective that is calibrated.
        validate: returns `task_aggregate` and/or `joint_loss`, on every process; called every `evaluate_every` steps.
        resume: go on from the newest checkpoint in `run`, if there is one.
        keep_checkpoints: write what a resumed run goes on from; without it only the best weights are kept, where they are chosen.
        label: what the progress is called.

    Raises:
        UserError: the loss needs retain rows and there are none, or reads nothing of a trainable parameter; the loss became
            NaN; the disk is full.
    """
    refuse_what_cannot_be(
        model, forget, retain, loss, config, calibration, perturbation, validates=validate is not None
    )
    if acc.device.type == "cpu":
        return_freed_memory(sum(p.nbytes for p in model.model.parameters()))
    batches, steps = _order(forget, retain, loss, config)
    if config.warmup >= steps:
        raise UserError(
            f"trainer.warmup is {config.warmup} of {steps} steps: the peak rate is never reached; give fewer"
        )
    model.model.train(False)
    if config.gradient_checkpointing:
        recompute_activations(model.model)
    wrapped, optimizer = acc.prepare(model.model, _adamw(model.model, config, masked=mask is not None))
    model = replace(model, model=acc.unwrap_model(wrapped))
    passes = Passes(acc, wrapped, model, reference=_way_back(model, loss, config))
    cache = ReferenceCache(passes=passes, config=config, batches=batches, steps=steps, run=run, made_from=made_from)
    forget, retain = cache.fill(forget, retain, loss)
    stepper = Stepper(
        passes,
        loss,
        forget,
        retain,
        micro_batch=config.micro_batch,
        micro_tokens=config.micro_tokens,
        weighting=config.weighting,
        gradient_filter=config.gradient_filter,
    )
    # A resumed run is perturbed too: the checkpoint's weights then come over it.
    moved = perturb(model, perturbation, seed=config.seed, healed=retain.tokens)
    if moved:
        acc.print(sentence(moved))
        run.note(perturbed=described(moved))
    masks = make_masks(passes, forget, retain, mask, run, micro_batch=config.micro_batch) if mask else None
    calibrate = _calibration(passes, loss, forget, calibration, config)
    loop = _Loop(stepper, optimizer, config, batches, steps, run, validate, masks, calibrate, keep_checkpoints)
    if config.estimate and not is_sharded(model.model):
        expected = estimate(stepper, batches, steps)
        acc.print(expected.sentence())
        run.note(estimated={"peak_bytes": expected.peak, "train_seconds": round(expected.seconds, 3)})
    return wrapped, loop.run_all(resume=resume, label=label)


def _order(forget: Side, retain: Side, loss: Loss, config: TrainerConfig) -> tuple[Batches, int]:
    """Which rows each step trains on, and how many steps there are."""
    own, general = (retain.own, retain.general) if loss.uses_retain else (0, 0)
    batches = config.batches(len(forget.rows), own, general)
    steps = config.steps or batches.total(config.epochs)
    if loss.objective.forgets and not config.forget_weight(steps - 1, steps):
        raise UserError(
            f"trainer.forget_from is {config.forget_from} of {steps} steps, so no forget row would come in: give a smaller share"
        )
    if config.folds > 1:
        batches = FoldedBatches(
            inner=lambda some, others: config.batches(some, others, general),
            fold=deal_folds(
                [row.document for row in forget.of], [row.task for row in forget.of], config.folds, config.seed
            ),
            retain=own,
            general=general,
            steps=steps,
        )
    if config.forget_from or not loss.objective.forgets:
        batches = LateBatches(
            inner=batches, quiet=lambda step: not (loss.objective.forgets and config.forget_weight(step, steps))
        )
    return batches, steps


def _calibration(
    passes: Passes, loss: Loss, forget: Side, calibration: Side | None, config: TrainerConfig
) -> Calibration | None:
    """What measures the targets of a calibrated objective."""
    if calibration is None or not isinstance(loss.objective, Calibrated):
        return None
    return Calibration(
        passes=passes,
        objective=loss.objective,
        forget=forget.rows,
        forget_rows=forget.of,
        calibration=calibration.rows,
        calibration_rows=calibration.of,
        size=config.micro_batch,
        seed=config.seed,
    )


def _adamw(model: nn.Module, config: TrainerConfig, *, masked: bool) -> torch.optim.Optimizer:
    """Of what requires gradients; weights under a mask decay in the loop."""
    return torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=config.learning_rate,
        betas=config.betas,
        weight_decay=0.0 if masked else config.weight_decay,
        fused=True,  # one pass over each weight, and no temporaries of its size
    )


def _way_back(model: LanguageModel, loss: Loss, config: TrainerConfig) -> Reference | None:
    """To the original model, if it must be asked at every step."""
    live = any(asks_original(needs, config) for needs in (loss.forget_needs, loss.retain_needs))
    return reference(model.model) if live else None


@dataclass
class _Loop:
    """The steps of one call of `train`, and where they stand."""

    stepper: Stepper
    optimizer: torch.optim.Optimizer
    config: TrainerConfig
    batches: Batches
    steps: int
    run: RunFolder
    validate: Validate | None
    masks: Masks | None
    calibration: Calibration | None
    keep_checkpoints: bool
    at: Progress = dataclasses.field(default_factory=Progress)
    saved_at: int | None = None

    @property
    def acc(self) -> Accelerator:
        return self.stepper.acc

    @property
    def loss(self) -> Loss:
        return self.stepper.loss

    @property
    def plain(self) -> nn.Module:
        """The model without what accelerate put round it."""
        plain: nn.Module = self.stepper.passes.model.model
        return plain

    def run_all(self, *, resume: bool, label: str) -> Progress:
        if resume:
            self._load_newest()
        self.run.forget_after(self.at.step)
        self.acc.wait_for_everyone()
        shown = self.acc.is_main_process
        with progress(self.steps, label=label, unit="steps", done=self.at.step, enabled=shown) as advance:
            while self.at.step < self.steps and not self._out_of_time():
                started = time.perf_counter()
                result, norm = self._step()
                self.at.seconds += time.perf_counter() - started
                self.at.tokens += result.tokens
                self._log(result, norm)
                sides = {"forget": result.forget_cross_entropy}
                if self.loss.uses_retain:
                    sides |= {"retain": result.retain_cross_entropy, "alpha": result.retain_weight}
                sides = {name: value for name, value in sides.items() if not math.isnan(value)}
                advance(**sides, tok_s=self.at.tokens / self.at.seconds)
                self._milestones()
        if self.keep_checkpoints and self.saved_at != self.at.step:  # no look at the disk: all processes decide alike
            self._save(self.run.checkpoint_name(self.at.step), with_moments=True)  # the export may meet a full disk
        if self.config.checkpoint != "last" and self.at.best is not None:
            checkpoint.restore_best(self.acc, self.run.path / "best", self.plain)
        return self.at

    def _step(self) -> tuple[StepResult, float]:
        self.at.memory.epoch = self.batches.epoch(self.at.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.rate(self.at.step, self.steps)
        counts = self.config.forget_weight(self.at.step, self.steps)
        if self.calibration is not None and counts and self.calibration.due(self.at.step, self.at.targets):
            self.at.targets = self.calibration.renewed(self.at.step, self.at.targets)
        result = self.stepper.gradient(
            self.batches.step(self.at.step), self.at.memory, forget_weight=counts, targets=self.at.targets
        )
        if not math.isfinite(result.loss):
            raise UserError(
                f"the loss became {result.loss} at step {self.at.step + 1}: lower trainer.learning_rate, or set a forget_cap; "
                "earlier checkpoints are kept"
            )
        if self.masks is not None:
            self.masks.keep_gradient()
        limit = self.config.clip if self.config.clip is not None else float("inf")
        norm = self.acc.clip_grad_norm_(self.stepper.model.parameters(), limit)
        if self.acc.scaler is None and not math.isfinite(_number(norm)):  # with a scaler such a step is left out
            raise UserError(
                f"the gradient's norm became {_number(norm)} at step {self.at.step + 1}: lower trainer.learning_rate, or set a "
                "forget_cap, and begin in a new folder; earlier checkpoints are kept"
            )
        if self.masks is not None and math.isfinite(_number(norm)):
            self.masks.decay(1.0 - float(self.optimizer.param_groups[0]["lr"]) * self.config.weight_decay)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.at.step += 1
        return result, _number(norm)

    def _milestones(self) -> None:
        step, every = self.at.step, self.config.evaluate_every
        if every is not None and self.validate is not None and (step % every == 0 or step == self.steps):
            self.at.memory.epoch = self.batches.epoch(step)  # after an epoch's last step the next one has begun
            scores = self.validate(self.at.memory)
            self.run.log(step, {f"validation/{name}": value for name, value in scores.items()})
            self.loss.weight.observe_validation(self.at.memory, scores)
            self._keep_if_best(scores)
        if self.keep_checkpoints and step % self.config.save_every == 0 and step < self.steps:
            self._save(self.run.checkpoint_name(step), with_moments=True)
            self.run.prune_checkpoints(keep=2)

    def _keep_if_best(self, scores: dict[str, float]) -> None:
        if self.config.checkpoint == "last":
            return
        name, sign = _RULES[self.config.checkpoint]
        if name not in scores:
            raise UserError(
                f"trainer.checkpoint is {self.config.checkpoint!r}, but validation gives only {', '.join(scores)}: "
                "choose by one of them"
            )
        if self.at.best is None or sign * scores[name] > sign * self.at.best["value"]:
            self.at.best = {"value": scores[name], "step": float(self.at.step)}
            self._save("best", with_moments=False)

    def _save(self, name: str, *, with_moments: bool) -> None:
        refuse_broken_weights(self.plain)
        if with_moments:
            self.saved_at = self.at.step
        if self.acc.scaler is not None:
            self.at.scaler = self.acc.scaler.state_dict()
        optimizer = self._inner_optimizer() if with_moments else None
        checkpoint.save(self.acc, self.run, name, self.plain, optimizer, dataclasses.asdict(self.at))

    def _load_newest(self) -> None:
        folder = checkpoint.newest(self.acc, self.run)
        if folder is None:
            return
        facts = checkpoint.read_facts(folder)
        try:
            self.at = Progress(**{**facts, "memory": RetainMemory(**facts["memory"])})
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{folder / checkpoint.FACTS} is not of this run ({error}): delete that checkpoint"
            ) from error
        checkpoint.restore(folder, self.plain, self._inner_optimizer())
        self.saved_at, self.at.earlier = self.at.step, self.at.seconds
        if self.acc.scaler is not None and self.at.scaler:
            self.acc.scaler.load_state_dict(self.at.scaler)

    def _inner_optimizer(self) -> torch.optim.Optimizer:
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        assert isinstance(inner, torch.optim.Optimizer)
        return inner

    def _out_of_time(self) -> bool:
        limit = self.config.max_seconds
        if limit is None:
            return False
        from accelerate.utils import broadcast_object_list

        (stop,) = broadcast_object_list([self.at.seconds >= limit])
        return bool(stop)

    def _log(self, result: StepResult, norm: float) -> None:
        measured = {
            "loss": result.loss,
            "forget_ce": result.forget_cross_entropy,
            "retain_ce": result.retain_cross_entropy,
            "alpha": result.retain_weight,
            "forget_loss": result.forget_loss,
            "retain_loss": result.retain_loss,
            "forgotten_share": result.forgotten_share,
            "grad_norm": norm,
            "lr": float(self.optimizer.param_groups[0]["lr"]),
        }
        values = {name: value for name, value in measured.items() if not math.isnan(value)}  # not asked for, not known
        self.run.log(self.at.step, values)
        if self.acc.trackers:
            self.acc.log(values, step=self.at.step)


def refuse_broken_weights(model: nn.Module) -> None:
    """Raise UserError, on every process, if a trained weight is no longer a finite number: it must not be saved."""
    broken = [
        name for name, p in model.named_parameters() if p.requires_grad and not bool(local_part(p).isfinite().all())
    ]
    if float(sum_over_processes(torch.tensor(float(len(broken)), device=next(model.parameters()).device))):
        raise UserError(
            f"the weights are no longer finite numbers ({broken[0] if broken else 'on another process'}): lower "
            "trainer.learning_rate and begin in a new folder; earlier checkpoints are kept"
        )


def _number(norm: Any) -> float:
    if norm is None:
        return float("nan")
    full = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return float(full)
