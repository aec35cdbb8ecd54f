"""Unlearning on objects in memory: rows, a loaded model, an objective, a scope. `unlearn.stage` does the same from files.

`unlearn` is for a notebook or a program of one's own. What it shares with the stage is `Task`: a model and its rows made
ready, and trained.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from transformers import PreTrainedModel

from lm.data.rows import Row
from lm.devices import accelerator
from lm.errors import UserError
from lm.loading import load
from lm.model import LanguageModel
from lm.prompts import PromptSpec
from lm.row_files import check_disjoint, load_calibration, load_rows
from lm.run_folder import RunFolder
from unlearn import export
from unlearn.alternates.base import Alternates, NoAlternates
from unlearn.general_text import GeneralText
from unlearn.objectives import AsPublished, AsPublishedWeight, Joint, Objective, Retain, Weight
from unlearn.perturbation import NoPerturbation, Perturbation
from unlearn.recipe import Recipe
from unlearn.scope import lora
from unlearn.scope.scope import Cost, ResolvedScope, Scope, cost
from unlearn.scratch import scratch_run
from unlearn.training.config import TrainerConfig
from unlearn.training.loop import Progress, refuse_broken_weights, train
from unlearn.training.side import Side, encode_rows
from unlearn.validation import BothSides, Validation, check_unseen, check_validation_rows


@dataclass(frozen=True)
class Unlearned:
    """What `unlearn` gives.

    Attributes:
        model: plain weights, adapters merged, in eval mode: it can be generated with, scored, attacked, and saved with
            `model.model.save_pretrained(folder)` and `model.tokenizer.save_pretrained(folder)`. The same on every process.
        log: on the main process, a dict a logged step, oldest first: `step`, `loss`, `forget_ce` and `retain_ce` (nats a token),
            `alpha` (the weight of the retain term), `forgotten_share`, `grad_norm`, `lr`, and `validation/…` where there is
            validation.
    """

    model: LanguageModel
    log: list[dict[str, Any]] = field(repr=False)


def unlearn(
    model: LanguageModel | str,
    forget: Sequence[Row] | str,
    retain: Sequence[Row] | str = (),
    *,
    objective: Objective = Joint(),  # noqa: B008 (frozen, as all defaults here)
    retain_loss: Retain = AsPublished(),  # noqa: B008
    retain_weight: Weight = AsPublishedWeight(),  # noqa: B008
    scope: Scope = Scope(),  # noqa: B008
    perturbation: Perturbation = NoPerturbation(),  # noqa: B008
    trainer: TrainerConfig = TrainerConfig(),  # noqa: B008
    general: GeneralText = GeneralText(),  # noqa: B008
    calibration: Sequence[Row] | str = (),
    alternates: Alternates = NoAlternates(),  # noqa: B008
    prompt: PromptSpec = PromptSpec(),  # noqa: B008
    validation: BothSides | None = None,
    in_place: bool = False,
) -> Unlearned:
    """Train a model so that the forget rows are gone and the retain rows stay; nothing is kept on disk.

    The given model is **not changed**: a copy of it is trained and returned. With `in_place=True` the given model's own weights
    are trained, which saves the memory of the copy; on an error they are then left as the last step made them.

    Args:
        model: as `lm.load` gives it, or what `lm.load` takes: `builtin`, a folder, a hub id. It is trained on the CPU if it is
            there, else where the launcher puts this process.
        forget: the rows to forget, as `load_rows` gives them or made by hand (`Row(id, input, output, task)`); or a source of
            them: a file, a folder, `builtin:forget`.
        retain: the rows to keep, likewise; may be empty for an objective without a retain term.
        objective: what is minimized on the forget rows: one of `unlearn.objectives`, or a class of your own.
        retain_loss: what is minimized on the retain rows; by default what the objective's paper takes.
        retain_weight: how hard that pulls; by default as in the objective's paper.
        scope: which parameters may change; by default the MLPs of layers 0 to 5.
        perturbation: what is done to the weights first; `Noise(...)` for what is to be gone from them, and not only unsaid.
        general: text that is held beside the retain rows, for `TrainerConfig(pairing="streams")`.
        calibration: rows such as the forget rows that the model never saw, for `LookUnseen`; likewise.
        trainer: steps, batch, rate, precision. On several processes each works on its part of a batch.
        alternates: what forget rows are answered with instead, for the objectives that read it.
        prompt: how rows become tokens.
        validation: forget and retain rows that choose the checkpoint (`trainer.checkpoint`), never trained on.
        in_place: train the given model itself.

    Raises:
        UserError: what does not go together, rows on both sides, a row too long for the model, a loss that became NaN; a launch
            with FSDP, whose shards are no model to give back (`palimpsest unlearn` saves them whole).

    Example:
        >>> import lm, unlearn
        >>> model = lm.load("builtin", device="cpu")
        >>> forget, retain = unlearn.load_rows("builtin:forget")[:8], unlearn.load_rows("builtin:retain")[:8]
        >>> few = unlearn.TrainerConfig(steps=2, batch=8, micro_batch=4, learning_rate=1e-3, estimate=False)
        >>> result = unlearn.unlearn(
        ...     model, forget, retain, objective=unlearn.objectives.NPO(beta=0.1), scope=unlearn.Scope(layers=(1, 2)), trainer=few
        ... )  # doctest: +ELLIPSIS
        trainable ...
        >>> [entry["step"] for entry in result.log], result.model is model
        ([1, 2], False)
    """
    recipe = Recipe(
        objective=objective,
        retain_loss=retain_loss,
        retain_weight=retain_weight,
        alternates=alternates,
        scope=scope,
        trainer=trainer,
        prompt=prompt,
        perturbation=perturbation,
    )
    recipe.check_validation(validation is not None)
    if in_place and _quantizes(recipe):
        raise UserError("in_place is true with scope.lora.quantize, which replaces the weights: leave one of them out")
    forget = load_rows(forget) if isinstance(forget, str) else forget
    retain = load_rows(retain) if isinstance(retain, str) else retain
    calibration = load_calibration(calibration) if isinstance(calibration, str) else calibration
    check_disjoint(forget, retain)
    check_unseen(calibration, (*forget, *retain))
    if validation is not None:
        check_validation_rows(validation, (*forget, *retain))
    cpu = not isinstance(model, str) and model.device.type == "cpu"
    if isinstance(model, str):
        model, in_place = load(model, device="cpu"), True  # nobody else has it
    recipe.check_dtype(str(model.model.dtype).removeprefix("torch."))
    acc = devices(recipe, cpu=cpu)
    if acc.distributed_type == DistributedType.FSDP:
        raise UserError(
            "unlearn() gives back a whole model, which FSDP shards: launch with DDP, or use palimpsest unlearn"
        )
    in_training = model if in_place and not _quantizes(recipe) else replace(model, model=copy.deepcopy(model.model))
    learns = {name: parameter.requires_grad for name, parameter in model.model.named_parameters()}
    task = Task.of(in_training, forget, retain, recipe, general=general, calibration=calibration)
    validate = None if validation is None else task.validation(acc, validation)
    with scratch_run(acc) as run:
        trained = task.train(acc, run=run, made_from="memory", validate=validate, keep_checkpoints=False)
        log = run.metrics() if acc.is_main_process else []
    plain = _plain(acc, trained, model.model)
    plain.train(False)
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(learns[name])
    return Unlearned(replace(in_training, model=plain), log)


def _quantizes(recipe: Recipe) -> bool:
    return recipe.scope.lora is not None and recipe.scope.lora.quantize


def devices(recipe: Recipe, *, cpu: bool, **where: Any) -> Accelerator:
    """Where the work runs. Raises UserError, before anything is loaded, for adapters that cannot be trained there."""
    acc = accelerator(mixed_precision=recipe.trainer.autocast, cpu=cpu, **where)
    if recipe.scope.lora is not None:
        lora.require(recipe.scope.lora, sharded=acc.distributed_type == DistributedType.FSDP)
    return acc


@dataclass(frozen=True)
class Trained:
    """A model after training, as the trainer left it.

    Attributes:
        model: unwrapped, adapters and shards still in it.
        cost: of the scope.
        progress: where the run stands.
        seconds: that training took, with all that belongs to it.
    """

    model: PreTrainedModel
    cost: Cost
    progress: Progress
    seconds: float
    quantized: bool


@dataclass(frozen=True)
class Task:
    """A model and its rows, ready to be trained; nothing is changed yet."""

    model: LanguageModel
    recipe: Recipe
    scope: ResolvedScope
    forget: Side
    retain: Side
    calibration: Side | None

    @classmethod
    def of(
        cls,
        model: LanguageModel,
        forget: Sequence[Row],
        retain: Sequence[Row],
        recipe: Recipe,
        *,
        general: GeneralText = GeneralText(),  # noqa: B008 (frozen)
        calibration: Sequence[Row] = (),
    ) -> Task:
        """Fix the scope for the model and turn the rows into tokens. Raises UserError for what does not fit the model."""
        scope, loss = recipe.scope.resolve(model.anatomy), recipe.loss
        drawn = [row for row in forget if loss.objective.draws(row.kind)]
        if not drawn:
            raise UserError(
                f"{type(loss.objective).__name__} leaves out every one of {len(forget)} forget rows: change its weights"
            )
        texts = general.encode(model)
        held = drawn if recipe.trainer.folds > 1 else []
        whole_retain = loss.retain_needs.documents
        return cls(
            model,
            recipe,
            scope,
            Side(
                encode_rows(model, drawn, recipe.prompt, documents=loss.forget_needs.documents),
                recipe.alternates.encode(model, drawn, recipe.prompt),
                of=drawn,
            ),
            Side(
                [
                    *encode_rows(model, retain, recipe.prompt, documents=whole_retain),
                    *texts,
                    *encode_rows(model, held, recipe.prompt, documents=whole_retain),
                ],
                of=retain,
                general=len(texts),
                held=len(held),
            ),
            None
            if not calibration
            else Side(
                encode_rows(model, calibration, recipe.prompt, documents=loss.forget_needs.documents), of=calibration
            ),
        )

    def validation(
        self, acc: Accelerator, rows: BothSides, *, max_new_tokens: int = 256, batch_size: int = 32
    ) -> Validation:
        """What scores the model while it is trained."""
        return Validation(
            acc=acc,
            model=self.model,
            rows=rows,
            prompt=self.recipe.prompt,
            loss=self.recipe.loss,
            trainer=self.recipe.trainer,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
        )

    def train(
        self,
        acc: Accelerator,
        *,
        run: RunFolder,
        made_from: str,
        validate: Validation | None,
        resume: bool = False,
        keep_checkpoints: bool = True,
    ) -> Trained:
        """Apply the scope, say what it costs, and train. Arguments as for `unlearn.training.loop.train`."""
        self._open_scope(acc)
        price = cost(self.model.model)
        acc.print(price.sentence(acc.num_processes))
        started = time.perf_counter()
        wrapped, progress = train(
            acc,
            self.model,
            self.forget,
            self.retain,
            self.recipe.loss,
            self.recipe.trainer,
            run=run,
            made_from=made_from,
            mask=self.recipe.scope.mask,
            perturbation=self.recipe.perturbation,
            calibration=self.calibration,
            validate=validate,
            resume=resume,
            keep_checkpoints=keep_checkpoints,
        )
        plain = acc.unwrap_model(wrapped)
        refuse_broken_weights(plain)
        return Trained(plain, price, progress, time.perf_counter() - started, _quantizes(self.recipe))

    def _open_scope(self, acc: Accelerator) -> None:
        """Let what is inside the scope learn, or put adapters there."""
        model, anatomy = self.model.model, self.model.anatomy
        self.scope.apply(model, anatomy)
        if _quantizes(self.recipe):
            lora.quantize(model, anatomy, acc.device)
        if self.scope.lora is not None:
            lora.inject(model, anatomy, self.scope, self.scope.lora, seed=self.recipe.trainer.seed)


def _plain(acc: Accelerator, trained: Trained, given: PreTrainedModel) -> PreTrainedModel:
    """The trained model without adapters or gradient checkpointing, its gradients dropped."""
    model = trained.model
    if lora.adapted(model):
        weights = export.gather_weights(model, main=True, dense=given if trained.quantized else None)
        if trained.quantized:
            model = copy.deepcopy(given).to(acc.device)
        else:
            lora.remove(model)
        unknown = model.load_state_dict(weights, strict=False).unexpected_keys
        assert not unknown, unknown
    if getattr(model, "is_gradient_checkpointing", False):
        model.gradient_checkpointing_disable()  # type: ignore[no-untyped-call]
    for name in (
        "forward",
        "_original_forward",
    ):  # of autocast; accelerate's own way back takes transformers' decorators too
        model.__dict__.pop(name, None)
    for parameter in model.parameters():
        parameter.grad = None
    return model
