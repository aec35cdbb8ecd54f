"""Two processes, whole or sharded, give the gradient of one, also where a side goes less deep than the other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from tests.forked import run_forked
from tests.unlearn.helpers import ROOT
from tests.unlearn.step_cases import CASES, gradient


@pytest.mark.parametrize("launch", ["cpu2_ddp", "cpu2_fsdp"])
def test_two_processes_give_the_gradient_of_one(tmp_path: Path, launch: str) -> None:
    done = run_forked(ROOT / "tests" / "unlearn" / "step_cases.py", str(tmp_path / "found.pt"), launch=launch)
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
