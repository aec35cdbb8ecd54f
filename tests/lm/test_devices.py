"""Devices: sums, shards and shared errors are the same on every process; what cannot be set up is refused in a sentence."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

from lm.devices import accelerator, launch_facts, leave_process_group, sum_over_processes, together
from lm.errors import UserError
from lm.shards import gather, scatter_into

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from lm.devices import accelerator, is_main, leave_process_group, sum_over_processes, together
from lm.shards import first_row, gather, is_sharded, local_part, reshard, scatter_into
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
try:
    with together(acc):
        if rank == 1:
            raise UserError("the second process found a mistake")
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
    first, held = first_row(parameter), local_part(parameter)
    assert torch.equal(held, value[first : first + len(held)])
    scatter_into(parameter, value + 1)
    assert torch.equal(gather(parameter), value + 1)
with torch.no_grad():
    model(input_ids=torch.ones(1, 3, dtype=torch.long))
reshard(plain)
assert all(is_sharded(torch.nn.ParameterList([p])) == (sys.argv[1] == "sharded") for p in plain.parameters())
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
        assert f"{rank} the second process found a mistake" in done.stdout
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


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "accelerate").glob("*.yaml")), ids=lambda file: file.stem)
def test_launch_files_say_what_their_names_say(file: Path) -> None:
    found = load_config_from_file(str(file))  # refuses a key that accelerate does not know
    assert found.mixed_precision == "no", "autocast is the run's own setting"
    assert (
        (found.distributed_type == "FSDP") == file.stem.endswith("fsdp") == (found.fsdp_config.get("fsdp_version") == 2)
    )
    assert (found.distributed_type == "NO") == (found.num_processes == 1)
    assert found.num_machines == (2 if file.stem.startswith("nodes2") else 1)
    assert found.num_processes % found.num_machines == 0
    assert bool(found.use_cpu) == file.stem.startswith("cpu")
    if found.num_machines > 1:
        assert found.same_network
        assert found.main_process_ip
        assert found.main_process_port


def test_the_slurm_job_starts_a_launcher_on_each_machine(tmp_path: Path) -> None:
    """The job as SLURM would run it, but for its own two commands and the launcher, whose words are kept."""
    programs = {
        "scontrol": "printf 'node7\\nnode8\\n'",
        "srun": 'shift; for rank in 0 1; do SLURM_PROCID=$rank "$@"; done',
        ".venv/bin/accelerate": 'printf "%s\\n" "$@" >> words; echo end >> words',
    }
    for name, text in programs.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
    given = {
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_JOB_ID": "30123",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_CPUS_PER_TASK": "64",
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }
    job = ["bash", str(ROOT / "configs/accelerate/slurm.sbatch"), "scripts/unlearn.py", "--out", "runs/a name"]
    subprocess.run(job, check=True, env={**os.environ, **given}, timeout=60)
    *launches, rest = (tmp_path / "words").read_text().split("end\n")
    assert (len(launches), rest) == (2, "")
    for rank, words in enumerate(launches):
        command, *settings = words.splitlines()
        found = launch_command_parser().parse_args(settings)
        assert command == "launch"
        assert (ROOT / found.config_file).is_file()
        assert (found.num_machines, found.num_processes, found.machine_rank) == (2, 16, rank)
        assert (found.main_process_ip, found.main_process_port) == ("node7", 30123)
        assert found.training_script == "scripts/unlearn.py"
        assert found.training_script_args == ["--out", "runs/a name", "--resume", "true"]


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "true", "asks for DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "asks for Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "parallelism"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "dynamo_backend INDUCTOR"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "gradient_accumulation_steps 4.*trainer.micro_batch"),
    ],
)
def test_what_the_launch_asks_for_and_no_step_is_made_for_is_refused(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, says: str
) -> None:
    """Gradient accumulation from there divided every gradient, and torch.compile failed after minutes."""
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=says):
        accelerator(cpu=True)
    for harmless in ("no", "NO") if "DYNAMO" in variable else ("1",) if "STEPS" in variable else ("false",):
        monkeypatch.setenv(variable, harmless)
        accelerator(cpu=True)


def test_a_precision_of_the_launch_that_is_not_heeded_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    accelerator(cpu=True, mixed_precision="bf16")
    assert capsys.readouterr().err == ""
    accelerator(cpu=True)
    assert "the launch's mixed_precision bf16 is not heeded" in capsys.readouterr().err
