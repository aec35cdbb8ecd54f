"""Which training runs cannot be, said in a sentence before anything is computed."""

from __future__ import annotations

import torch

from lm.errors import UserError
from lm.model import LanguageModel
from unlearn.forward.calibration import groups_of
from unlearn.forward.passes import first_block, reads
from unlearn.objectives import Calibrated, Dual, Loss
from unlearn.perturbation import Perturbation, check_perturbation
from unlearn.training.config import TrainerConfig
from unlearn.training.side import Side


def refuse_what_cannot_be(
    model: LanguageModel,
    forget: Side,
    retain: Side,
    loss: Loss,
    config: TrainerConfig,
    calibration: Side | None,
    perturbation: Perturbation,
    *,
    validates: bool,
) -> None:
    """Raise UserError for a loss, rows and settings that do not go together, or a loss that reads nothing of what may change."""
    if not loss.objective.forgets:
        _refuse_what_forgets(loss, config)
    if loss.uses_retain and not retain.rows:
        raise UserError(f"{type(loss.objective).__name__} needs retain rows and there are none: give a retain set")
    if config.checkpoint != "last" and not validates:
        raise UserError(
            f"trainer.checkpoint is {config.checkpoint!r} but there is no validation split: give one, or use last"
        )
    if config.weighting == "micro_batch_mean" and isinstance(loss.weight, Dual):
        raise UserError(
            "the dual variable moves with the global batch's loss, which micro_batch_mean never knows: set trainer.weighting "
            "to global_tokens"
        )
    _refuse_streams(retain, loss, config)
    _refuse_calibration(forget, calibration, loss)
    check_perturbation(model, perturbation, retain.tokens)
    if loss.forget_needs.alternate and not forget.alternates:
        raise UserError(f"{type(loss.objective).__name__} needs alternate answers and there are none: set alternates")
    if any(p.requires_grad and p.dtype == torch.float16 for p in model.model.parameters()):
        raise UserError(
            f"the weights of {model.name} are held in float16, in which AdamW's second moments vanish and steps become a "
            "thousand times too large: load it with dtype float32 or bfloat16"
        )
    sides = [loss.forget_needs, *([loss.retain_needs] if loss.uses_retain else [])]
    for needs in sides:
        if needs.hidden is not None:
            model.anatomy.block_path(needs.hidden.layer)
    for name, parameter in model.model.named_parameters():
        if parameter.requires_grad and not any(reads(model.anatomy, needs, name) for needs in sides):
            raise UserError(
                f"{name} may change, but {type(loss.objective).__name__} reads the model only up to layer "
                f"{max(needs.hidden.layer for needs in sides if needs.hidden is not None)}: leave later layers out of the scope"
            )
    start = first_block(model)
    for axis, needs in (("objective", loss.forget_needs), ("retain_loss", loss.retain.needs())):
        if needs.hidden is not None and not needs.vocabulary and needs.hidden.layer < start:
            raise UserError(
                f"{axis} reads the stream after layer {needs.hidden.layer}, and nothing up to there may change, so it could do "
                f"nothing: give it layer {start} or a later one, or widen the scope"
            )


def _refuse_what_forgets(loss: Loss, config: TrainerConfig) -> None:
    name = type(loss.objective).__name__
    if not loss.uses_retain:
        raise UserError(
            f"{name} reads no forget row and the retain term is NoRetain, so nothing would be trained: set retain_loss"
        )
    if config.pairing in ("mixed_shuffle", "sequential") or config.weighting == "micro_batch_mean":
        raise UserError(
            f"{name} leaves the places of forget rows empty, and {config.pairing} batches weighted by {config.weighting} may "
            "have nothing else: set trainer.pairing to paired or streams, and trainer.weighting to global_tokens or global_rows"
        )
    late = ("forget_from", "forget_ramp", "gradient_filter")
    if config.folds > 1 or any(getattr(config, each) for each in late):
        raise UserError(
            f"{name} forgets nothing, so trainer.folds and {', '.join(f'.{each}' for each in late)} say nothing: leave them out"
        )


def _refuse_streams(retain: Side, loss: Loss, config: TrainerConfig) -> None:
    if retain.general and (config.pairing != "streams" or not config.general_share or not loss.uses_retain):
        raise UserError(
            f"there is general text, and {type(loss.retain).__name__} with {config.pairing} batches reads none: set "
            "trainer.pairing to streams and a retain_loss, or leave general out"
        )
    if config.pairing == "streams" and config.general_share and not retain.general:
        raise UserError(
            f"trainer.general_share is {config.general_share} and there is no general text: give general, or set "
            "trainer.general_share to 0"
        )


def _refuse_calibration(forget: Side, calibration: Side | None, loss: Loss) -> None:
    if isinstance(loss.objective, Calibrated) != (calibration is not None):
        name = type(loss.objective).__name__
        raise UserError(
            f"{name} holds forget rows against calibration rows and there are none: give calibration"
            if calibration is None
            else f"calibration rows are given and {name} reads none: leave them out, or take LookUnseen"
        )
    if isinstance(loss.objective, Calibrated) and calibration is not None:
        groups_of(loss.objective, forget.of, calibration.of)
