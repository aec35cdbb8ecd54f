"""The merging stage from files to files: find the checkpoints, merge them a tensor at a time, save a plain one. Wiring only."""

from __future__ import annotations

from pathlib import Path

from lm.errors import UserError
from lm.model import DTYPES
from lm.run_folder import RunFolder, damage, stage
from unlearn import model_files
from unlearn.export import MODEL
from unlearn.merging import weight_files
from unlearn.merging.config import MergeConfig
from unlearn.merging.merge import merged
from unlearn.merging.weight_files import Checkpoint


@stage
def run_merge(config: MergeConfig) -> Path:
    """Merge as the config says; returns the folder of the resulting checkpoint (`<out>/model`).

    Raises:
        UserError: checkpoints that are missing, damaged, quantized, not finite, or do not belong together; a result that is not
            finite in `save_dtype`, or whose tokenizer does not load.
    """
    base, models = Checkpoint.find(config.base), [Checkpoint.find(name) for name in config.models]
    for model in models:
        weight_files.require_alike(base, model)
    weights = {"base": base.digest(), "models": [model.digest() for model in models]}
    dtype = DTYPES[config.save_dtype] if config.save_dtype else None
    run = RunFolder.create(config.out, config, resume=config.resume, facts={"weights": weights}, same=("weights",))
    result = run.path / MODEL
    if result.exists():
        if (problem := damage(result)) is not None:
            raise UserError(f"{result} is damaged ({problem}): restore it, or merge again in another folder")
        print(f"already finished: {result}")
        return result
    if "thresholds" not in run.manifest:
        run.note(thresholds=list(config.method.thresholds(base, models)))
    thresholds = tuple(run.manifest["thresholds"])
    with run.writing(MODEL) as folder:
        weight_files.write(folder, base, lambda name: merged(base, models, name, config.method, thresholds, dtype))
        model_files.copy_config(base.folder, folder)
        model_files.set_config(folder, dtype=dtype)
        model_files.copy_tokenizer(config.tokenizer or config.base, folder)
        model_files.for_every_version(folder)
        weight_files.read_back(folder, base)
    run.finish()
    return result


def describe(config: MergeConfig, result: Path) -> str:
    """What a finished merge says."""
    return f"wrote {result}"
