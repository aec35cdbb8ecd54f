"""Devices: sums, shards and shared errors are the same on every process; what cannot be set up is refused in a sentence."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lm.devices import (
    accelerator,
    gather,
    launch_facts,
    leave_process_group,
    scatter_into,
    sum_over_processes,
    together,
)
from lm.errors import UserError

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from lm.devices import (
    accelerator, gather, is_main, is_sharded, leave_process_group, scatter_into, sum_over_processes, together
)
from lm.errors import UserError

acc = accelerator(cpu=True)
rank, count = acc.process_index, acc.num_processes
assert count == 2 and is_main() == (rank == 0)
assert sum_over_processes(torch.tensor([1.0, 10.0 * rank])).tolist() == [2.0, 10.0]
try:
    with together(acc):
        if acc.is_main_process:
            raise UserError("the main process found a mistake")
except UserError as error:
    print(f"{rank} {error}", flush=True)
torch.manual_seed(0)
size = dict(hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=2, vocab_size=33)
model = LlamaForCausalLM(LlamaConfig(**size))
before = [p.detach().clone() for p in model.parameters()]
model, _ = acc.prepare(model, torch.optim.AdamW(model.parameters()))
plain = acc.unwrap_model(model)
assert is_sharded(plain) == (sys.argv[1] == "sharded")
for parameter, value in zip(plain.parameters(), before, strict=True):
    assert torch.equal(gather(parameter), value)
    scatter_into(parameter, value + 1)
    assert torch.equal(gather(parameter), value + 1)
leave_process_group()
print(f"{rank} left", flush=True)
"""


@pytest.mark.parametrize(("launch", "kind"), [("cpu2_ddp", "whole"), ("cpu2_fsdp", "sharded")])
def test_two_processes_agree(tmp_path: Path, launch: str, kind: str) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    words = [sys.executable, "-m", "accelerate.commands.launch"]
    words += ["--config_file", str(ROOT / "configs" / "accelerate" / f"{launch}.yaml")]
    words += ["--main_process_port", "0", str(program), kind]
    done = subprocess.run(
        words,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for rank in range(2):
        assert f"{rank} the main process found a mistake" in done.stdout
        assert f"{rank} left" in done.stdout


def test_one_process_is_the_plain_case() -> None:
    acc = accelerator(cpu=True)
    assert sum_over_processes(torch.tensor([2.5])).tolist() == [2.5]
    parameter = torch.nn.Parameter(torch.zeros(3))
    scatter_into(parameter, torch.arange(3.0))
    assert gather(parameter).tolist() == [0.0, 1.0, 2.0]
    with pytest.raises(UserError, match="a mistake"), together(acc):
        raise UserError("a mistake")
    leave_process_group()
    facts = launch_facts(acc)
    assert facts["processes"] == 1
    assert facts["device"] == "cpu"


def test_what_cannot_be_set_up_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="fp16 autocast needs a GPU"):
        accelerator(mixed_precision="fp16", cpu=True)
    with pytest.raises(UserError, match=r"cannot set up|not installed"):
        accelerator(cpu=True, trackers=("nosuchtracker",), folder=tmp_path)
