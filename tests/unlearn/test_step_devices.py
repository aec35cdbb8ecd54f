"""Two processes, whole or sharded, give the gradient of one, also where a side goes less deep than the other."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from tests.unlearn.helpers import ROOT, environment
from tests.unlearn.step_cases import CASES, gradient


@pytest.mark.parametrize("launch", ["cpu2_ddp", "cpu2_fsdp"])
def test_two_processes_give_the_gradient_of_one(tmp_path: Path, launch: str) -> None:
    words = [sys.executable, "-m", "accelerate.commands.launch"]
    words += ["--config_file", str(ROOT / "configs" / "accelerate" / f"{launch}.yaml")]
    words += ["--main_process_port", str(22000 + os.getpid() % 20000)]
    words += [str(ROOT / "tests" / "unlearn" / "step_cases.py"), str(tmp_path / "found.pt")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False, env=environment())
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    for case in CASES:
        wanted = gradient(Accelerator(cpu=True), case)
        assert found[case].keys() == wanted.keys(), case
        for name, value in wanted.items():
            torch.testing.assert_close(
                found[case][name],
                value,
                rtol=1e-3,
                atol=1e-5,
                equal_nan=True,
                msg=lambda m, place=f"{case}, {name}": f"{place}: {m}",
            )
