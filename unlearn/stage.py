"""The unlearning stage from files to files: read rows, load the model, apply the scope, train, save a plain checkpoint.

This is wiring; every decision is in the config, every computation in the modules it calls.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from lm.config import as_dict
from lm.data.rows import Row
from lm.devices import accelerator, launch_facts, sum_over_processes, together
from lm.errors import UserError
from lm.loading import load
from lm.model import DTYPES, LanguageModel, fingerprint
from lm.prompts import Encoded, PromptSpec, encode_pair
from lm.row_files import canonical_id, check_disjoint, data_hash, load_rows
from lm.run_folder import RunFolder, peak_memory_bytes
from unlearn import export
from unlearn.config import UnlearnConfig
from unlearn.evaluation.lume import check_rows, score
from unlearn.forward.passes import Passes
from unlearn.generation.batching import Workers, max_positions
from unlearn.generation.generate import generate
from unlearn.objectives import RetainMemory
from unlearn.scope import lora
from unlearn.scope.scope import cost
from unlearn.training.batches import dealt
from unlearn.training.loop import refuse_broken_weights, train
from unlearn.training.step import Side
from unlearn.training.tensor_store import forget_stores


def _doubts(config: UnlearnConfig, weights: str) -> dict[str, str]:
    """For the manifest, and said: that the plan was drawn from other weights, if it was. A retrained model may well use it."""
    doubt = config.scope.doubt(weights)
    if doubt is None:
        return {}
    print(f"warning: {doubt}", file=sys.stderr)
    return {"plan_warning": doubt}


def run_unlearn(config: UnlearnConfig) -> Path:
    """Unlearn as the config says; returns the folder of the resulting checkpoint (`<out>/model`).

    Raises:
        UserError: whatever the user can mend, before the model is loaded wherever that is possible.
    """
    forget, retain = load_rows(config.forget, columns=config.columns), load_rows(config.retain, columns=config.columns)
    check_disjoint(forget, retain)
    validation = _validation_rows(config, (*forget, *retain))
    if config.train_on_validation and validation is not None:
        forget, retain = (*forget, *validation[0]), (*retain, *validation[1])
    acc = accelerator(
        mixed_precision=config.trainer.autocast,
        trackers=config.trackers,
        folder=Path(config.out),
        cpu=config.model.device == "cpu",
    )
    if config.scope.lora is not None:
        lora.require(config.scope.lora, sharded=acc.distributed_type == DistributedType.FSDP)
    data = {"forget": data_hash(forget), "retain": data_hash(retain)}
    if validation is not None:
        data |= {"validation_forget": data_hash(validation[0]), "validation_retain": data_hash(validation[1])}
    result = Path(config.out) / export.MODEL
    model = load(config.model, device="cpu")  # before the folder is made: a mistyped path must not leave one behind
    scope = config.scope.resolve(model.anatomy)
    encoded = [encode_rows(model, rows, config.prompt) for rows in (forget, retain)]
    alternates = config.alternates.encode(model, forget, config.prompt)
    if alternates:
        data["alternates"] = hashlib.sha256(repr(alternates).encode()).hexdigest()[:16]
    run = RunFolder(config.out, main=acc.is_main_process)
    with together(acc):
        if acc.is_main_process:
            facts = {
                "seed": config.trainer.seed,
                "data": data,
                "weights": (weights := fingerprint(model)),
                "scope": {"layers": list(scope.layers), "modules": list(scope.modules)},
                "devices": launch_facts(acc),
                **_doubts(config, weights),
            }
            same = ("data", "weights", "scope")
            run = RunFolder.create(
                config.out, config, resume=config.resume, facts=facts, same=same, free=("trainer.max_seconds",)
            )
    if result.exists():
        acc.print(f"already finished: {result}")
        return result

    scope.apply(model.model, model.anatomy)
    quantized = scope.lora is not None and scope.lora.quantize
    if quantized:
        lora.quantize(model.model, model.anatomy, acc.device)
    if scope.lora is not None:
        lora.inject(model.model, model.anatomy, scope, scope.lora, seed=config.trainer.seed)
    price = cost(model.model)
    acc.print(price.sentence(acc.num_processes))
    if config.trackers:
        acc.init_trackers("unlearn", config={"config": str(as_dict(config))})

    started = time.perf_counter()
    scorer = None if validation is None else Validation(acc, model, config, validation)
    wrapped, at = train(
        acc,
        model,
        Side(encoded[0], alternates),
        Side(encoded[1]),
        config.loss,
        config.trainer,
        run=run,
        made_from=run.manifest["weights"],
        mask=config.scope.mask,
        validate=scorer,
        resume=config.resume,
    )
    plain = acc.unwrap_model(wrapped)
    refuse_broken_weights(plain)
    run.finish(
        steps=at.step,
        tokens=at.tokens,
        train_seconds=round(at.seconds, 3),
        wall_seconds=round(time.perf_counter() - started, 3),
        tokens_per_second=round(at.tokens / max(at.seconds, 1e-9), 1),
        peak_memory_bytes=peak_memory_bytes(),
        peak_gpu_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
        trainable_parameters=price.trainable,
        layers=list(scope.layers),
        modules=list(scope.modules),
        best=at.best,
    )
    dense = load(config.model, device="cpu").model if quantized and acc.is_main_process else None
    export.save(
        plain, model.tokenizer, run, dtype=DTYPES[config.save_dtype] if config.save_dtype else None, dense=dense
    )
    for tracker in acc.trackers:
        tracker.finish()
    run.prune_checkpoints(keep=0)
    forget_stores(run)
    acc.wait_for_everyone()
    return result


def describe(config: UnlearnConfig, result: Path) -> str:
    """What a finished run says."""
    return f"wrote {result}"


def _validation_rows(config: UnlearnConfig, trained: Sequence[Row]) -> tuple[Sequence[Row], Sequence[Row]] | None:
    """Both sides of the validation split, checked; None if there is none."""
    if config.validation.forget is None or config.validation.retain is None:
        return None
    forget, retain = (
        load_rows(source, columns=config.columns) for source in (config.validation.forget, config.validation.retain)
    )
    check_disjoint(forget, retain)
    check_rows((*forget, *retain))
    known = {canonical_id(row.id) for row in trained}
    twice = [row.id for row in (*forget, *retain) if canonical_id(row.id) in known]
    if twice:
        raise UserError(
            f"validation row {twice[0]} is also trained on: the checkpoint would be chosen on training rows"
        )
    return forget, retain


class Validation:
    """Scores the model in training on rows it is not trained on: official task aggregate, and the joint loss."""

    def __init__(
        self, acc: Accelerator, model: LanguageModel, config: UnlearnConfig, rows: tuple[Sequence[Row], Sequence[Row]]
    ) -> None:
        self.acc, self.model, self.config, self.rows = acc, model, config, rows

    def __call__(self) -> dict[str, float]:
        """`task_aggregate` (not for lowest_joint_loss), and `joint_loss`, the weighted cross-entropies, with its parts."""
        with torch.no_grad():
            forget_ce, _ = self._cross_entropy(self.rows[0])
            retain_ce, batch_means = self._cross_entropy(self.rows[1])
            answers: dict[str, float] = {}
            if (
                self.config.trainer.checkpoint != "lowest_joint_loss"
            ):  # which needs no answers, and they are most of the time
                workers = Workers(self.acc.process_index, self.acc.num_processes)
                forget, retain = (self._generate(rows, workers) for rows in self.rows)
                answers["task_aggregate"] = score(forget, retain).task_aggregate
        weight = self.config.loss.weight.at(RetainMemory(), retain_ce, retain_ce)
        return {
            **answers,
            "joint_loss": -forget_ce + weight * retain_ce,
            "forget_ce": forget_ce,
            "retain_ce": retain_ce,
            "retain_batch_means": batch_means,
            "retain_rows": float(len(self.rows[1])),
        }

    def _generate(self, rows: Sequence[Row], workers: Workers) -> list[dict[str, str]]:
        said = generate(
            self.model,
            [row.input for row in rows],
            prompt=self.config.prompt,
            max_new_tokens=self.config.validation.max_new_tokens,
            batch_size=self.config.validation.batch_size,
            workers=workers,
        )
        return [
            {"id": row.id, "task": row.task, "expected_output": row.output, "model_output": text}
            for row, text in zip(rows, said, strict=True)
        ]

    def _cross_entropy(self, rows: Sequence[Row]) -> tuple[float, float]:
        encoded = encode_rows(self.model, rows, self.config.prompt)
        return mean_cross_entropy(self.acc, self.model, encoded, self.config.trainer.micro_batch)


def encode_rows(model: LanguageModel, rows: Sequence[Row], prompt: PromptSpec) -> list[Encoded]:
    """Rows as token ids, in order. Raises UserError for a row that is longer than the model can read."""
    encoded = [encode_pair(model.tokenizer, row.input, row.output, prompt) for row in rows]
    limit = max_positions(model)
    for row, one in zip(rows, encoded, strict=True):
        if limit is not None and len(one.ids) > limit:
            raise UserError(
                f"row {row.id} has {len(one.ids)} tokens and {model.name} reads {limit}: shorten or split it"
            )
    return encoded


def mean_cross_entropy(
    acc: Accelerator, model: LanguageModel, rows: Sequence[Encoded], size: int
) -> tuple[float, float]:
    """Mean cross-entropy over the supervised tokens of all rows (nats a token), and the sum of the means of micro-batches of
    `size` consecutive rows, however many processes there are."""
    passes = Passes(acc, model.model, model)
    sums = torch.zeros(3, dtype=torch.float64, device=acc.device)
    for micro in dealt(rows, size, acc.process_index, acc.num_processes):
        found = passes.logprobs(micro)
        loss, tokens = -sum((float(each.sum()) for each in found), 0.0), sum(len(each) for each in found)
        sums += torch.tensor([loss, tokens, loss / max(tokens, 1)], dtype=torch.float64, device=sums.device)
    total, count, means = sum_over_processes(sums).tolist()
    return total / max(count, 1.0), means
