"""The unlearning stage from files to files: read rows, load the model, apply the scope, train, save a plain checkpoint.

This is wiring; every decision is in the config, every computation in the modules it calls. The same on objects in memory is
`unlearn.unlearn`.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from lm.config import as_dict
from lm.data.rows import Row
from lm.devices import is_main, launch_facts, together
from lm.errors import UserError
from lm.loading import load
from lm.model import DTYPES, LanguageModel, fingerprint
from lm.row_files import check_disjoint, data_hash, load_calibration, load_rows
from lm.run_folder import RunFolder, damage, peak_memory_bytes, stage
from unlearn import export
from unlearn.config import UnlearnConfig
from unlearn.evaluation.lume import check_rows
from unlearn.training.tensor_store import forget_stores
from unlearn.unlearning import Task, Trained, devices
from unlearn.validation import BothSides, Validation, check_unseen, check_validation_rows


@stage
def run_unlearn(config: UnlearnConfig) -> Path:
    """Unlearn as the config says; returns the folder of the resulting checkpoint (`<out>/model`).

    Raises:
        UserError: whatever the user can mend, before the model is loaded wherever that is possible.
    """
    rows = _Rows.read(config)
    _warn_of_unscorable(rows)
    acc = devices(config.recipe, cpu=config.model.device == "cpu", trackers=config.trackers, folder=Path(config.out))
    model = load(config.model, device="cpu")  # before the folder is made: a mistyped path must not leave one behind
    task = Task.of(
        model, rows.forget, rows.retain, config.recipe, general=config.general_text, calibration=rows.calibration
    )
    run = _begin(acc, config, rows, task)
    result = run.path / export.MODEL
    if result.exists():
        with together(acc):
            if run.main and (problem := damage(result)) is not None:
                raise UserError(f"{result} is damaged ({problem}): restore it, or unlearn again in another folder")
        acc.print(f"already finished: {result}")
        return result
    if config.trackers:
        acc.init_trackers("unlearn", config={"config": str(as_dict(config))})
    trained = task.train(
        acc,
        run=run,
        made_from=run.manifest["weights"],
        validate=None if rows.validation is None else _validation(acc, config, task, rows.validation),
        resume=config.resume,
    )
    run.finish(**_closing_facts(task, trained))
    _save(acc, config, model, trained, run)
    _tidy(acc, run)
    return result


def _warn_of_unscorable(rows: _Rows) -> None:
    """Training needs no task and no kind of a row, evaluation does: said before the training, not after it."""
    try:
        check_rows((*rows.forget, *rows.retain))
    except UserError as problem:
        if is_main():
            print(f"warning: palimpsest evaluate and attack would refuse these rows: {problem}", file=sys.stderr)


def describe(config: UnlearnConfig, result: Path) -> str:
    """What a finished run says."""
    return f"wrote {result}"


@dataclass(frozen=True)
class _Rows:
    """What is trained on, and what chooses the checkpoint."""

    forget: Sequence[Row]
    retain: Sequence[Row]
    validation: BothSides | None
    calibration: Sequence[Row] = ()

    @classmethod
    def read(cls, config: UnlearnConfig) -> _Rows:
        def load(source: str | None) -> tuple[Row, ...]:
            return () if source is None else load_rows(source, columns=config.columns)

        forget, retain = load(config.forget), load(config.retain)
        forget, retain = forget + load(config.paraphrases.forget), retain + load(config.paraphrases.retain)
        check_disjoint(forget, retain)
        calibration: tuple[Row, ...] = ()
        if config.calibration is not None:
            calibration = load_calibration(
                config.calibration,
                columns=config.columns,
                half=config.calibration_half,
                together=config.calibration_together,
            )
        check_unseen(calibration, (*forget, *retain))
        if config.validation.forget is None or config.validation.retain is None:
            return cls(forget, retain, None, calibration)
        sources = (config.validation.forget, config.validation.retain)
        validation = (
            load_rows(sources[0], columns=config.columns),
            load_rows(sources[1], columns=config.columns),
        )
        check_validation_rows(validation, (*forget, *retain))
        if config.train_on_validation:
            forget, retain = (*forget, *validation[0]), (*retain, *validation[1])
        return cls(forget, retain, validation, calibration)

    def hashes(self) -> dict[str, str]:
        """For the manifest: a run does not go on with other rows."""
        hashes = {"forget": data_hash(self.forget), "retain": data_hash(self.retain)}
        if self.calibration:
            hashes["calibration"] = data_hash(self.calibration)
        if self.validation is not None:
            hashes |= {
                f"validation_{side}": data_hash(rows)
                for side, rows in zip(("forget", "retain"), self.validation, strict=True)
            }
        return hashes


def _begin(acc: Accelerator, config: UnlearnConfig, rows: _Rows, task: Task) -> RunFolder:
    """Begin the run folder, or go on with one, on the main process; the others wait."""
    data = rows.hashes()
    if task.forget.alternates:
        data["alternates"] = _hash(task.forget.alternates)
    if task.retain.general:
        data["general"] = _hash(task.retain.rows[task.retain.own : task.retain.own + task.retain.general])
    with together(acc):
        if acc.is_main_process:
            weights = fingerprint(task.model)
            facts = {
                "seed": config.trainer.seed,
                "data": data,
                "weights": weights,
                "scope": {"layers": list(task.scope.layers), "modules": list(task.scope.modules)},
                "devices": launch_facts(acc),
                **_doubts(config, weights),
            }
            RunFolder.create(
                config.out,
                config,
                resume=config.resume,
                facts=facts,
                same=("data", "weights", "scope"),
                free=("trainer.max_seconds", "save_dtype"),
            )
    return RunFolder(config.out, main=acc.is_main_process)


def _hash(texts: object) -> str:
    return hashlib.sha256(repr(texts).encode()).hexdigest()[:16]


def _doubts(config: UnlearnConfig, weights: str) -> dict[str, str]:
    """For the manifest, and said: that the plan was drawn from other weights, if it was. A retrained model may well use it."""
    doubt = config.scope.doubt(weights)
    if doubt is None:
        return {}
    print(f"warning: {doubt}", file=sys.stderr)
    return {"plan_warning": doubt}


def _validation(acc: Accelerator, config: UnlearnConfig, task: Task, rows: BothSides) -> Validation:
    settings = config.validation
    return task.validation(acc, rows, max_new_tokens=settings.max_new_tokens, batch_size=settings.batch_size)


def _closing_facts(task: Task, trained: Trained) -> dict[str, Any]:
    """What the run took and came to, for the manifest."""
    progress = trained.progress
    return {
        "steps": progress.step,
        "tokens": progress.tokens,
        "train_seconds": round(progress.seconds, 3),
        "wall_seconds": round(progress.earlier + trained.seconds, 3),
        "tokens_per_second": round(progress.tokens / max(progress.seconds, 1e-9), 1),
        "peak_memory_bytes": peak_memory_bytes(),
        "peak_gpu_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
        "trainable_parameters": trained.cost.trainable,
        "layers": list(task.scope.layers),
        "modules": list(task.scope.modules),
        "best": progress.best,
    }


def _save(acc: Accelerator, config: UnlearnConfig, model: LanguageModel, trained: Trained, run: RunFolder) -> None:
    """Write the plain checkpoint and read it back; what was held quantized is taken from the model as it was loaded."""
    dense = load(config.model, device="cpu").model if trained.quantized and acc.is_main_process else None
    dtype = DTYPES[config.save_dtype] if config.save_dtype else None
    run.note(save_dtype=config.save_dtype)  # it may be another than the run began with
    with together(acc):
        export.save(trained.model, model.tokenizer, run, source=config.model, dtype=dtype, dense=dense)


def _tidy(acc: Accelerator, run: RunFolder) -> None:
    """Close the trackers; a finished run needs neither checkpoints nor stores."""
    for tracker in acc.trackers:
        tracker.finish()
    run.prune_checkpoints(keep=0)
    forget_stores(run)
    acc.wait_for_everyone()
