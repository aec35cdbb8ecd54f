"""One unlearning experiment as data: model x data x scope x objective x trainer, each an independent axis."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lm.errors import UserError
from lm.model import ModelSpec
from lm.prompts import PromptSpec
from unlearn.alternates.base import Alternates, NoAlternates
from unlearn.objectives import AsPublished, AsPublishedWeight, Joint, Loss, Objective, Retain, Weight
from unlearn.scope.scope import Scope
from unlearn.training.config import TrainerConfig

HELP = """Take it out: train the chosen layers so that the forget rows are gone and the retain rows stay.

palimpsest unlearn --config builtin --out runs/mine
accelerate launch --config_file configs/accelerate/cpu2_ddp.yaml -m palimpsest unlearn --config builtin
"""


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Rows that choose the checkpoint: never trained on. Both or neither."""

    forget: str | None = None
    """Forget rows to score on: a file, a folder, or a part of the built-in world."""
    retain: str | None = None
    """Retain rows to score on."""
    max_new_tokens: int = 256
    """Longest answer that is generated."""
    batch_size: int = 32
    """Prompts generated at once on one process."""

    def __post_init__(self) -> None:
        if (self.forget is None) != (self.retain is None):
            raise UserError("validation.forget and validation.retain belong together: give both, or neither")
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"validation.{name} is {getattr(self, name)}: give at least 1")


@dataclass(frozen=True, kw_only=True)
class UnlearnConfig:
    """What to forget, what to keep, where in the model, how hard, and where the result goes."""

    model: ModelSpec = field(default_factory=ModelSpec)
    """The model that has memorized the forget rows."""
    forget: str = "builtin:forget"
    """Rows to forget: a JSONL or Parquet file, a folder of them, or a part of the built-in world."""
    retain: str = "builtin:retain"
    """Rows to keep: likewise."""
    columns: dict[str, str] | None = None
    """For files with other column names: our field -> their column, e.g. {"input": "question", "output": "answer"}."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """Rows for periodic scoring and for choosing the checkpoint."""
    train_on_validation: bool = False
    """Train on the validation rows too, as the authors' code does: a checkpoint is then chosen on rows it has seen."""
    prompt: PromptSpec = field(default_factory=PromptSpec)
    """How rows become tokens: raw as the official evaluation sees them, or chat."""
    scope: Scope = field(default_factory=Scope)
    """Which parameters may change."""
    objective: Objective = field(default_factory=Joint)
    """What is minimized on the forget rows."""
    alternates: Alternates = field(default_factory=NoAlternates)
    """What forget rows are answered with instead, for the objectives that read it."""
    retain_loss: Retain = field(default_factory=AsPublished)
    """What is minimized on the retain rows; AsPublished: what the objective's paper takes."""
    retain_weight: Weight = field(default_factory=AsPublishedWeight)
    """How hard the retain loss pulls; AsPublishedWeight: as in the objective's paper."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """How the loop runs."""
    out: str = "runs/unlearn"
    """The run folder; the result is in its sub-folder `model`."""
    save_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the saved weights; null keeps the one trained in."""
    trackers: tuple[str, ...] = ()
    """Also log to these through accelerate, e.g. ["tensorboard"]."""
    resume: bool = False
    """Go on with the run in `out`, from its newest checkpoint."""

    def __post_init__(self) -> None:
        if self.model.device not in (None, "cpu", "cuda"):
            raise UserError(
                f"model.device is {self.model.device}, but training runs where the launcher puts it: leave it out and set "
                "CUDA_VISIBLE_DEVICES, or give cpu"
            )
        if self.train_on_validation and self.validation.forget is None:
            raise UserError(
                "train_on_validation is true but there are no validation rows: set validation.forget, .retain"
            )
        if self.trainer.autocast != "no" and self.model.dtype != "float32":
            raise UserError(
                f"trainer.autocast is {self.trainer.autocast} over model.dtype {self.model.dtype}: autocast needs float32 "
                "master weights; set model.dtype: float32, or trainer.autocast: no for pure low precision"
            )
        if self.trainer.evaluate_every is not None and self.validation.forget is None:
            raise UserError(
                "trainer.evaluate_every is set but there is nothing to score: set validation.forget and validation.retain"
            )
        if self.forget.startswith("builtin") != self.retain.startswith("builtin"):
            raise UserError(
                f"forget is {self.forget} and retain is {self.retain}: give both sides of one data set (the built-in rows are "
                "the default)"
            )
        given = not isinstance(self.alternates, NoAlternates)
        if given != self.loss.forget_needs.alternate:
            name = type(self.objective).__name__
            raise UserError(
                f"alternates are given and {name} reads none: leave them out, or take an objective that does"
                if given
                else f"{name} reads alternate answers and none are given: set alternates, to Refusals for instance"
            )
        if not self.loss.uses_retain and not isinstance(self.retain_weight, AsPublishedWeight):
            raise UserError(
                f"retain_weight is given and {type(self.objective).__name__} has no retain term here: leave it out, or set "
                "retain_loss, to CrossEntropy for instance"
            )
        if self.trainer.checkpoint != "last" and self.validation.forget is None:
            raise UserError(
                f"trainer.checkpoint is {self.trainer.checkpoint}, which is judged on validation rows: "
                "set validation.forget and validation.retain, or trainer.checkpoint: last"
            )

    @property
    def loss(self) -> Loss:
        """What is minimized."""
        return Loss.of(self.objective, self.retain_loss, self.retain_weight)
