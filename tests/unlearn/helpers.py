"""What several unlearning tests need: a small config, and running a script as a user would."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lm.model import ModelSpec
from tests.forked import run_forked
from unlearn.config import UnlearnConfig, ValidationConfig
from unlearn.objectives import Joint, Objective
from unlearn.scope.scope import Scope
from unlearn.training.config import TrainerConfig

ROOT = Path(__file__).resolve().parents[2]
SMALL = TrainerConfig(steps=6, batch=8, micro_batch=4, learning_rate=3e-3, save_every=2, estimate=False)


def small_config(
    tiny: Path, out: Path, *, objective: Objective | None = None, trainer: TrainerConfig = SMALL, **changes: object
) -> UnlearnConfig:
    """A few steps on the tiny model, MLPs of layer 1."""
    settings: dict[str, Any] = {
        "model": ModelSpec(path=str(tiny / "model"), device="cpu"),
        "forget": str(tiny / "forget.jsonl"),
        "retain": str(tiny / "retain.jsonl"),
        "scope": Scope(layers=(1,)),
        "objective": objective or Joint(),
        "trainer": trainer,
        "out": str(out),
    }
    return UnlearnConfig(**{**settings, **changes})


def command(script: str, *words: str, launch: str | None = None) -> list[str]:
    """The words a user would type, with this Python."""
    path = str(ROOT / "scripts" / f"{script}.py")
    return [sys.executable, path, *words] if launch is None else launched(launch, path, *words)


def launched(config: str, *words: str) -> list[str]:
    """The words that run a program as `configs/accelerate/<config>.yaml` says."""
    any_free = ["--main_process_port", "0"]  # other tests run at the same time
    start = [sys.executable, "-m", "accelerate.commands.launch", *any_free]
    return [*start, "--config_file", str(ROOT / "configs" / "accelerate" / f"{config}.yaml"), *words]


def launch(config: str, program: str, *words: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """Run a program of this repository with several processes, to the end; every one of them is gone afterwards."""
    process = subprocess.Popen(
        launched(config, str(ROOT / program), *words),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        start_new_session=True,
    )
    try:
        said, errors = process.communicate(timeout=timeout)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(process.args, process.returncode, said, errors)


def run_script(
    script: str, *words: str, launch: str | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run to the end, with output captured and one thread a process."""
    return run_forked(ROOT / "scripts" / f"{script}.py", *words, launch=launch, timeout=timeout)


def run_here(script: str, *words: str) -> tuple[int, str]:
    """Run a script inside this process; returns its exit status and the last line it wrote to stderr."""
    path = str(ROOT / "scripts" / f"{script}.py")
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
        patch.setattr(sys, "argv", [path, *words])
        patch.setattr(sys, "path", [str(ROOT / "scripts"), *sys.path])
        try:
            runpy.run_path(path, run_name="__main__")
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
    return status, (said.getvalue().strip().splitlines() or [""])[-1]


def environment() -> dict[str, str]:
    """One thread a process: the numbers of a sum then do not depend on how busy the machine is."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}


def config_words(config: UnlearnConfig, folder: Path) -> list[str]:
    """`--config` for a file that holds this config."""
    from lm.config import dump_yaml

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(dump_yaml(config))
    return ["--config", str(folder / "config.yaml")]


def unseen_rows(tiny: Path, file: Path) -> None:
    """Rows such as the tiny forget rows, of nobody whom they name."""
    text = (tiny / "forget.jsonl").read_text().replace('"id": "p', '"id": "u')
    file.write_text(text.replace("born", "raised").replace("code", "number"))


def reworded(tiny: Path, folder: Path) -> ValidationConfig:
    """The tiny rows in other words, as a validation split."""
    (folder / "v").mkdir()
    for side in ("forget", "retain"):
        text = (tiny / f"{side}.jsonl").read_text()
        (folder / "v" / f"{side}.jsonl").write_text(text.replace('"id": "p', '"id": "v').replace("What is", "Tell me"))
    return ValidationConfig(
        forget=str(folder / "v/forget.jsonl"), retain=str(folder / "v/retain.jsonl"), max_new_tokens=4
    )


class Casts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what is converted to bfloat16 and has a shape."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        found = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and found.dtype == torch.bfloat16 and found.shape == self.shape:
            self.count += 1
        return found
