"""Ends from outside: SIGTERM says what Ctrl-C says, too little memory says what to lower, workers end with their launcher."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from lm.config import ending_in_one_line, script
from lm.errors import UserError
from lm.signals import asked_to_end

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "lm")}
"""For programs that import `signals` alone, and so begin at once."""


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """Some settings."""

    micro_batch: int = 4
    """Rows at once."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A config."""

    trainer: Trainer = field(default_factory=Trainer)
    """Of training."""
    batch_size: int = 8
    """Prompts at once."""
    resume: bool = False
    """Go on."""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_request_to_end_is_answered_as_ctrl_c_is(
    capsys: pytest.CaptureFixture[str], number: signal.Signals, status: int
) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what runs in the background

    def get_signal() -> None:
        with ending_in_one_line():
            os.kill(os.getpid(), number)
            time.sleep(5)

    with pytest.raises(SystemExit) as ended:
        get_signal()
    assert ended.value.code == status
    assert capsys.readouterr().err == "stopped: finished work is kept; the same command with --resume true goes on\n"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_process_that_does_not_come_back_to_python_ends_all_the_same() -> None:
    """As one that waits in a collective: the handler of the main thread never runs there."""
    program = """
import threading
import signals
signals._GRACE = 0.2
with signals.asked_to_end():
    try:
        print("begun", flush=True)
        threading.Event().wait(30)
    except KeyboardInterrupt:
        threading.Event().wait(30)  # it was heard, and does not end
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    process.terminate()
    assert process.wait(timeout=60) == 143


def test_the_handler_that_stood_before_is_left_alone() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with asked_to_end():
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 9. GiB for an array"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried 4 bytes."
        ),
    ],
)
def test_too_little_memory_says_which_settings_to_lower(capsys: pytest.CaptureFixture[str], error: Exception) -> None:
    def main(config: Config) -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        script(main, Config, description="", argv=[])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said.startswith("error: out of memory (")
    assert said.endswith("): lower trainer.micro_batch or batch_size\n")


def test_another_error_is_a_defect_still() -> None:
    with pytest.raises(RuntimeError, match="a bug"), ending_in_one_line():
        raise RuntimeError("a bug")


def test_a_worker_ends_when_its_launcher_is_gone(tmp_path: Path) -> None:
    worker = """
import sys, time
from signals import end_with_launcher
end_with_launcher()
open(sys.argv[1], "w").write("begun")
time.sleep(60)
"""
    launcher = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1], sys.argv[2]])"
    began, said = tmp_path / "began", tmp_path / "said"
    with open(said, "w") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", launcher, worker, str(began)],
            stderr=file,
            env={**ENVIRONMENT, "TORCHELASTIC_RUN_ID": "test"},
        )
    until = time.monotonic() + 120
    while not began.exists() and time.monotonic() < until:
        time.sleep(0.05)
    process.kill()
    process.wait()
    while "the launcher is gone" not in said.read_text() and time.monotonic() < until:
        time.sleep(0.05)
    assert "the launcher is gone" in said.read_text()


def test_what_an_id_holds_does_not_command_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse() -> None:
        with ending_in_one_line():
            raise UserError("row \x1b[31mred\x1b]0;title\x07\r\u202eturned is twice: née 北京\tfine")

    with pytest.raises(SystemExit):
        refuse()
    said = capsys.readouterr().err
    assert said == "error: row \\u001b[31mred\\u001b]0;title\\u0007\\u000d\\u202eturned is twice: née 北京\tfine\n"
