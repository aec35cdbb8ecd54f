"""What six runs said they would take, beside what they took: peak memory and time of the steps.

    python -m benchmarks.unlearning_estimates --out runs/estimates

Each combination is a run of scripts/unlearn.py in a process of its own, on one random OLMo model; the peak is that process's
largest resident memory. Prints, and writes as table.md, one line a combination.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import OlmoConfig, OlmoForCausalLM

from lm.config import dump_yaml, script
from lm.loading import load
from lm.model import ModelSpec
from lm.progress import progress
from lm.row_files import load_rows
from lm.run_folder import RunFolder, write_atomic
from unlearn.alternates.base import Refusals
from unlearn.config import UnlearnConfig
from unlearn.objectives import DPO, NPO, RMU, Joint, KLMinimization
from unlearn.scope.scope import Lora, Scope
from unlearn.training.config import TrainerConfig

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class Estimates:
    """The size of the model and of the runs."""

    layers: int = 16
    """Blocks of the random model."""
    width: int = 384
    """Its hidden size; MLPs are four times as wide."""
    vocabulary: int = 32000
    """Rows of its embedding, which is also its head."""
    steps: int = 3
    """Optimizer steps of each run."""
    batch: int = 8
    """Rows a step, both sides together."""
    micro_batch: int = 4
    """Rows at once."""
    joined: int = 2
    """Rows of the built-in world that make up one row here."""
    out: str = "runs/estimates"
    """The folder for model, rows and runs."""


def main(asked: Estimates) -> None:
    out = Path(asked.out)
    make_model(asked, out / "base")
    make_rows(asked, out)
    chosen = combinations(asked, out)
    found: dict[str, Mapping[str, Any]] = {}
    with progress(len(chosen), label="estimates", unit="runs") as advance:
        for name, config in chosen.items():
            write_atomic(out / f"{name}.yaml", dump_yaml(replace(config, out=str(out / name))))
            words = [sys.executable, str(ROOT / "scripts" / "unlearn.py"), "--config", str(out / f"{name}.yaml")]
            done = subprocess.run(
                words, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise SystemExit(f"{name}: {done.stderr[-2000:]}")
            found[name] = RunFolder(out / name).manifest
            advance()
    text = table(found)
    write_atomic(out / "table.md", text + "\n")
    print(text)


def make_model(asked: Estimates, folder: Path) -> None:
    """A random model with the built-in tokenizer."""
    tokenizer = load("builtin", device="cpu").tokenizer
    torch.manual_seed(0)
    config = OlmoConfig(
        vocab_size=asked.vocabulary,
        hidden_size=asked.width,
        intermediate_size=4 * asked.width,
        num_hidden_layers=asked.layers,
        num_attention_heads=asked.width // 64,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    OlmoForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_rows(asked: Estimates, folder: Path) -> None:
    """Rows of the built-in world, some joined to one."""
    for side in ("forget", "retain"):
        rows = load_rows(f"builtin:{side}")
        lines = []
        for first in range(0, len(rows) - asked.joined + 1, asked.joined):
            some = rows[first : first + asked.joined]
            told = " ".join(f"{row.input} {row.output}" for row in some[1:])
            row = {"id": some[0].id, "task": some[0].task, "input": some[0].input, "output": f"{some[0].output} {told}"}
            lines.append(json.dumps(row) + "\n")
        write_atomic(folder / f"{side}.jsonl", "".join(lines))


def combinations(asked: Estimates, folder: Path) -> dict[str, UnlearnConfig]:
    """Objective, scope and reference in six ways."""
    trainer = TrainerConfig(steps=asked.steps, batch=asked.batch, micro_batch=asked.micro_batch)
    lower, upper = tuple(range(6)), tuple(range(asked.layers // 2, asked.layers))
    usual = UnlearnConfig(
        model=ModelSpec(path=str(folder / "base"), device="cpu"),
        forget=str(folder / "forget.jsonl"),
        retain=str(folder / "retain.jsonl"),
        trainer=trainer,
    )
    everything, half = Scope(layers="all", modules=("all",)), Scope(layers=upper, modules=("all",))
    return {
        "joint_mlp_0_to_5": replace(usual, objective=Joint(), scope=Scope(layers=lower)),
        "npo_model_live": replace(
            usual, objective=NPO(), scope=Scope(layers="model"), trainer=replace(trainer, reference="live")
        ),
        "npo_lora": replace(usual, objective=NPO(), scope=replace(everything, lora=Lora())),
        "kl_blocks_checkpointing": replace(
            usual, objective=KLMinimization(), scope=everything, trainer=replace(trainer, gradient_checkpointing=True)
        ),
        "rmu_5_to_7": replace(usual, objective=RMU(layer=7), scope=Scope(layers=(5, 6, 7))),
        "dpo_upper_half_kept_bf16": replace(
            usual,
            objective=DPO(),
            alternates=Refusals(),
            scope=half,
            trainer=replace(trainer, cache_below=True, autocast="bf16"),
        ),
    }


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: both figures of each, and their ratio."""
    head = ["combination", "peak, estimated", "measured", "ratio", "steps, estimated", "measured", "ratio"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, manifest in found.items():
        expected = manifest["estimated"]
        peak, seconds = expected["peak_bytes"], expected["train_seconds"]
        cells = [f"{peak / 2**20:.0f} MiB", f"{manifest['peak_memory_bytes'] / 2**20:.0f} MiB"]
        cells += [
            f"{peak / manifest['peak_memory_bytes']:.2f}",
            f"{seconds:.1f} s",
            f"{manifest['train_seconds']:.1f} s",
        ]
        lines.append("| " + " | ".join([name, *cells, f"{seconds / manifest['train_seconds']:.2f}"]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    script(main, Estimates, description=__doc__)
