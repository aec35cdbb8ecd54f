"""What stages owe their folders: one process at a time, also after a kill; nothing left behind by one that was refused."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from multiprocessing.context import ForkProcess
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from lm.errors import UserError
from lm.run_folder import RunFolder, hold, stage

FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True, kw_only=True)
class Config:
    """A config."""

    resume: bool = False


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lm.run_folder.stages._PATIENCE", 0.2)


@stage
def begin(folder: Path, *, resume: bool = True) -> RunFolder:
    return RunFolder.create(folder, Config(), resume=resume)


def _hold(folder: Path, begun: Event) -> None:
    @stage
    def run() -> None:
        RunFolder.create(folder, Config(), resume=True)
        begun.set()
        time.sleep(600)

    run()


def holder(folder: Path) -> ForkProcess:
    begun = FORK.Event()
    process = FORK.Process(target=_hold, args=(folder, begun))
    process.start()
    assert begun.wait(120)
    return process


def test_a_second_process_is_told_who_holds_the_folder_and_a_killed_one_holds_it_no_more(
    tmp_path: Path, impatient: None
) -> None:
    process = holder(tmp_path / "run")
    try:
        for resume in (True, False):
            with pytest.raises(UserError, match=f"in use by process {process.pid} on {socket.gethostname()}"):
                begin(tmp_path / "run", resume=resume)
    finally:
        process.kill()
        process.join()
    assert (tmp_path / "run" / ".lock").exists()
    begin(tmp_path / "run")
    assert not (tmp_path / "run" / ".lock").exists()


def _begun_at_once(folder: Path, start: float, told: multiprocessing.Queue[str]) -> None:
    @stage
    def run() -> None:
        RunFolder.create(folder, Config())
        time.sleep(4.5)

    time.sleep(max(0.0, start - time.time()))
    try:
        run()
        told.put("ran")
    except UserError as error:
        told.put(str(error))


def test_of_two_fresh_starts_one_runs_and_the_other_is_told(tmp_path: Path) -> None:
    told = FORK.Queue()
    start = time.time() + 0.3
    starts = [FORK.Process(target=_begun_at_once, args=(tmp_path / "run", start, told)) for _ in range(2)]
    for process in starts:
        process.start()
    said = sorted(told.get(timeout=120) for _ in starts)
    for process in starts:
        process.join()
    assert said[0] == "ran"
    assert "in use by process" in said[1]


def test_the_lock_of_another_host_counts_while_it_gives_signs_of_life(tmp_path: Path, impatient: None) -> None:
    begin(tmp_path)
    lock = tmp_path / ".lock"
    lock.write_text(json.dumps({"pid": 7, "host": "elsewhere", "since": "now"}))
    with pytest.raises(UserError, match=r"process 7 on elsewhere.*free again after 180 seconds"):
        begin(tmp_path)
    old = time.time() - 200
    os.utime(lock, (old, old))
    begin(tmp_path)


def test_where_the_system_has_no_locks_the_named_process_decides(
    tmp_path: Path, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without(*_: object) -> None:
        raise OSError(95, "not supported")

    monkeypatch.setattr("lm.run_folder.stages.fcntl.flock", without)
    begin(tmp_path)
    owner = {"pid": os.getppid(), "host": socket.gethostname(), "since": "now"}
    (tmp_path / ".lock").write_text(json.dumps(owner))
    with pytest.raises(UserError, match=f"in use by process {os.getppid()}"):
        begin(tmp_path)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (tmp_path / ".lock").write_text(json.dumps({**owner, "pid": ended.pid}))
    begin(tmp_path)


def test_one_process_may_hold_a_folder_in_a_stage_within_a_stage(tmp_path: Path) -> None:
    @stage
    def outer() -> bool:
        hold(tmp_path)
        begin(tmp_path)
        return (tmp_path / ".lock").exists()

    assert outer(), "the outer one still holds it"
    assert not (tmp_path / ".lock").exists()


@pytest.mark.parametrize("error", [UserError, RuntimeError, KeyboardInterrupt])
def test_a_stage_that_comes_to_nothing_leaves_no_folder(tmp_path: Path, error: type[BaseException]) -> None:
    @stage
    def refuse(folder: Path, *, resume: bool = False) -> None:
        run = RunFolder.create(folder, Config(), resume=resume)
        (run.path / "facts").mkdir(exist_ok=True)
        run.note(estimated=1)
        raise error

    with pytest.raises(error):
        refuse(tmp_path / "runs" / "new")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "notes.txt").write_text("mine")
    with pytest.raises(error):
        refuse(tmp_path / "there")
    assert [path.name for path in (tmp_path / "there").rglob("*") if path.is_file()] == ["notes.txt"]
    begin(tmp_path / "old", resume=False)
    with pytest.raises(error):
        refuse(tmp_path / "old", resume=True)
    assert (tmp_path / "old" / "config.yaml").exists(), "a run that was there stays"


def test_a_stage_that_wrote_something_keeps_its_folder(tmp_path: Path) -> None:
    @stage
    def half(finish: bool) -> None:
        run = RunFolder.create(tmp_path / str(finish), Config())
        if finish:
            run.finish()
        else:
            run.log(1, {"loss": 1.0})
        raise UserError("too late")

    for finish in (True, False):
        with pytest.raises(UserError):
            half(finish)
        assert (tmp_path / str(finish) / "config.yaml").exists()


def test_a_folder_that_nobody_may_write_is_read_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(tmp_path)
    refuse, usual = (OSError(30, "read-only"), os.open)

    def open_(path: object, flags: int, mode: int = 0o777) -> int:
        if str(path).endswith(".lock"):
            raise refuse
        return usual(str(path), flags, mode)

    monkeypatch.setattr("lm.run_folder.stages.os.open", open_)
    assert begin(tmp_path).manifest["started"]
