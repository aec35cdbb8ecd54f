"""One unlearning experiment as data: model x data x scope x objective x trainer, each an independent axis."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lm.errors import UserError
from lm.model import ModelSpec
from lm.prompts import PromptSpec
from lm.row_files import Half
from sae.activations.sources import NoSource, Source
from unlearn.alternates.base import Alternates, NoAlternates
from unlearn.general_text import GeneralText
from unlearn.objectives import AsPublished, AsPublishedWeight, Joint, Loss, Objective, Retain, Weight
from unlearn.perturbation import NoPerturbation, Perturbation
from unlearn.recipe import Recipe
from unlearn.scope.scope import Scope
from unlearn.training.config import TrainerConfig

HELP = """Take it out: train the chosen layers so that the forget rows are gone and the retain rows stay.

palimpsest unlearn --config builtin --out runs/mine
accelerate launch --config_file "$(palimpsest configs accelerate/cpu2_ddp)" -m palimpsest unlearn --config builtin
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
class Paraphrases:
    """The same knowledge in other words, trained on beside the rows."""

    forget: str | None = None
    """Further wordings of forget rows: a file, a folder, or a part of the built-in world."""
    retain: str | None = None
    """Further wordings of retain rows."""


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
    paraphrases: Paraphrases = field(default_factory=Paraphrases)
    """Further wordings of the rows, which are trained on as they are."""
    general: Source = field(default_factory=NoSource)
    """Text of the pretraining kind that is held beside the retain rows (trainer.pairing: streams)."""
    general_longest: int = 256
    """Tokens; a longer general text is cut into pieces."""
    general_most: int = 20_000
    """At most so many pieces of general text, from the front of its source."""
    calibration: str | None = None
    """Rows such as the forget rows that the model never saw, for LookUnseen, or a file of whole documents; they must not be
    scored on afterwards."""
    calibration_half: Half | None = None
    """Only every second document of them, from the `first` or from the `second` on: the others are left to score on."""
    calibration_together: int = 1
    """Of a source without ids: how many rows in a row are about one person (20 in TOFU)."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """Rows for periodic scoring and for choosing the checkpoint."""
    train_on_validation: bool = False
    """Train on the validation rows too, as the authors' code does: a checkpoint is then chosen on rows it has seen."""
    prompt: PromptSpec = field(default_factory=PromptSpec)
    """How rows become tokens: raw as the official evaluation sees them, or chat."""
    scope: Scope = field(default_factory=Scope)
    """Which parameters may change."""
    perturbation: Perturbation = field(default_factory=NoPerturbation)
    """What is done to the weights before the first step: Noise, TowardsCheckpoint, Reinitialize, or nothing."""
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
        recipe, _ = self.recipe, self.general_text
        recipe.check_dtype(self.model.dtype)
        recipe.check_validation(self.validation.forget is not None)
        if self.trainer.folds > 1 and (self.paraphrases.forget is not None):
            raise UserError(
                "trainer.folds is set with paraphrases.forget, and whose words each wording is cannot be known, so a person "
                "would be forgotten in one fold and held in another: give one of them"
            )
        if self.forget.startswith("builtin") != self.retain.startswith("builtin"):
            raise UserError(
                f"forget is {self.forget} and retain is {self.retain}: give both sides of one data set (the built-in rows are "
                "the default)"
            )

    @property
    def recipe(self) -> Recipe:
        """All of it but model and rows."""
        return Recipe(
            objective=self.objective,
            retain_loss=self.retain_loss,
            retain_weight=self.retain_weight,
            alternates=self.alternates,
            scope=self.scope,
            trainer=self.trainer,
            prompt=self.prompt,
            perturbation=self.perturbation,
        )

    @property
    def general_text(self) -> GeneralText:
        """The third stream of rows."""
        return GeneralText(source=self.general, longest=self.general_longest, most=self.general_most)

    @property
    def loss(self) -> Loss:
        """What is minimized."""
        return self.recipe.loss
