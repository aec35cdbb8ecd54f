"""The competition's contract: `unlearn(input_model_path, output_path, forget_dir, retain_dir)`, within its hour.

A fixed recipe around `run_unlearn`; whoever wants to choose takes `palimpsest unlearn` and a config.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

from lm.devices import is_main
from lm.errors import UserError
from lm.model import ModelSpec
from lm.run_folder import hold, stage
from unlearn.config import UnlearnConfig
from unlearn.scope.scope import Scope
from unlearn.semeval.config import SemevalConfig
from unlearn.stage import run_unlearn
from unlearn.training.config import TrainerConfig

HOUR = 3600.0


def run_semeval(config: SemevalConfig) -> Path:
    """`unlearn` on the paths of a config; returns `config.output_path`."""
    return unlearn(
        config.input_model_path,
        config.output_path,
        config.forget_dir,
        config.retain_dir,
        tokenizer=config.tokenizer,
    )


def describe(config: SemevalConfig, result: Path) -> str:
    """What a finished stage says."""
    return f"wrote {result}"


@stage
def unlearn(
    input_model_path: str,
    output_path: str,
    forget_dir: str,
    retain_dir: str,
    *,
    tokenizer: str | None = None,
    trainer: TrainerConfig | None = None,
    scope: Scope | None = None,
) -> Path:
    """Unlearn `forget_dir` from a model and leave a plain checkpoint in `output_path`.

    Args:
        input_model_path: a folder or hub id.
        output_path: an empty or new folder; it then holds config, safetensors and tokenizer.
        forget_dir, retain_dir: folders with the challenge's JSONL or Parquet files.
        tokenizer: for a model that ships without one (the challenge's 1B model).
        trainer, scope: replace the recipe's: the joint method's defaults (MLPs of layers 0 to 5), stopped after 50 minutes
            of training so that loading and saving fit in the competition's hour.

    Returns:
        `output_path`.
    """
    output = Path(output_path)
    if (output / "config.json").exists():
        raise UserError(f"{output} already holds a model: give an empty folder")
    if is_main():
        hold(output)
    recipe = trainer or replace(TrainerConfig(), max_seconds=HOUR * 5 / 6)
    work = output / "run"
    config = UnlearnConfig(
        model=ModelSpec(path=input_model_path, tokenizer=tokenizer),
        forget=forget_dir,
        retain=retain_dir,
        scope=scope or Scope(),
        trainer=recipe,
        out=str(work),
        resume=work.exists(),
    )
    model = run_unlearn(config)
    if is_main():
        for file in sorted(
            model.iterdir(), key=lambda f: f.name == "config.json"
        ):  # the config last: it marks a whole model
            os.replace(file, output / file.name)
        shutil.rmtree(model)
    return output
