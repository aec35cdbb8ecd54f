"""How to unlearn, whatever the model and the rows: objective x retain term x weight x alternates x scope x perturbation x
trainer x prompt."""

from __future__ import annotations

from dataclasses import dataclass, field

from lm.errors import UserError
from lm.prompts import PromptSpec
from unlearn.alternates.base import Alternates, NoAlternates
from unlearn.objectives import AsPublishedWeight, Loss, Objective, Retain, Weight
from unlearn.perturbation import NoPerturbation, Perturbation
from unlearn.scope.scope import Scope
from unlearn.training.config import TrainerConfig


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The axes of an experiment that are neither model nor rows; the fields are those of `UnlearnConfig`."""

    objective: Objective
    retain_loss: Retain
    retain_weight: Weight
    alternates: Alternates
    scope: Scope
    trainer: TrainerConfig
    prompt: PromptSpec
    perturbation: Perturbation = field(default_factory=NoPerturbation)

    def __post_init__(self) -> None:
        name = type(self.objective).__name__
        has_alternates = not isinstance(self.alternates, NoAlternates)
        if has_alternates != self.loss.forget_needs.alternate:
            raise UserError(
                f"alternates are given and {name} reads none: leave them out, or take an objective that does"
                if has_alternates
                else f"{name} reads alternate answers and none are given: set alternates, to Refusals for instance"
            )
        if not isinstance(self.perturbation, NoPerturbation) and (self.scope.lora or self.scope.mask):
            what = (
                "scope.lora leaves the weights themselves frozen"
                if self.scope.lora
                else "scope.mask freezes most weights"
            )
            raise UserError(
                f"perturbation is given and {what}, so what it breaks would never heal: leave one of them out"
            )
        if not self.loss.uses_retain and not isinstance(self.retain_weight, AsPublishedWeight):
            raise UserError(
                f"retain_weight is given and {name} has no retain term here: leave it out, or set "
                "retain_loss, to CrossEntropy for instance"
            )

    @property
    def loss(self) -> Loss:
        """What is minimized."""
        return Loss.of(self.objective, self.retain_loss, self.retain_weight)

    def check_dtype(self, dtype: str) -> None:
        """Raise UserError for weights of a type (`float32`, …) that cannot be trained, or that autocast does not go with."""
        if dtype == "float16":
            raise UserError(
                "model.dtype is float16, in which AdamW's second moments vanish and steps become a thousand times too large: set "
                "model.dtype to float32 (with trainer.autocast bf16 or fp16 for speed) or to bfloat16"
            )
        if self.trainer.autocast != "no" and dtype != "float32":
            raise UserError(
                f"trainer.autocast is {self.trainer.autocast} over model.dtype {dtype}: autocast needs float32 "
                "master weights; set model.dtype: float32, or trainer.autocast: no for pure low precision"
            )

    def check_validation(self, given: bool) -> None:
        """Raise UserError if the trainer is to score on validation rows, or to choose by them, and there are none."""
        if self.trainer.evaluate_every is not None and not given:
            raise UserError(
                "trainer.evaluate_every is set but there is nothing to score: set validation.forget and validation.retain"
            )
        if self.trainer.checkpoint != "last" and not given:
            raise UserError(
                f"trainer.checkpoint is {self.trainer.checkpoint}, which is judged on validation rows: "
                "set validation.forget and validation.retain, or trainer.checkpoint: last"
            )
