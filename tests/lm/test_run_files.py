"""Files of a run under attack: whole or not there, known by their digests, with the right rights, nothing left over."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lm.errors import UserError
from lm.run_folder import RunFolder, damage, seal, sweep, write_atomic, write_json


@dataclass(frozen=True, kw_only=True)
class Config:
    """A config."""

    size: int = 1


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


def rights(path: Path) -> int:
    return path.stat().st_mode & 0o777


def checkpoint(run: RunFolder, step: int) -> Path:
    with run.writing(run.checkpoint_name(step)) as folder:
        save_file({"a": torch.full((4,), float(step))}, folder / "weights.safetensors")
        write_json(folder / "state.json", {"step": step})
    return run.path / run.checkpoint_name(step)


def test_a_sealed_folder_is_what_sha256sum_calls_whole(tmp_path: Path) -> None:
    folder = checkpoint(RunFolder(tmp_path), 2)
    done = subprocess.run(
        ["sha256sum", "--check", "SHA256SUMS"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["state.json: OK", "weights.safetensors: OK"]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_a_missing_file_and_a_cut_one_are_damage(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    folder = checkpoint(run, 1)
    assert damage(folder) is None
    flip(folder / "weights.safetensors")
    assert damage(folder) == "weights.safetensors is not as it was written"
    folder = checkpoint(run, 2)
    (folder / "state.json").unlink()
    assert damage(folder) == "state.json is missing"
    folder = checkpoint(run, 3)
    (folder / "SHA256SUMS").write_bytes(b"\xff\xfe")
    assert "SHA256SUMS" in str(damage(folder))


def test_a_folder_from_before_there_were_digests_is_whole_if_it_can_be_read(tmp_path: Path) -> None:
    folder = checkpoint(RunFolder(tmp_path), 1)
    (folder / "SHA256SUMS").unlink()
    assert damage(folder) is None
    weights = folder / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-3])
    assert "weights.safetensors cannot be read" in str(damage(folder))


def test_the_newest_whole_checkpoint_is_taken_and_damaged_ones_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder(tmp_path)
    assert run.newest_checkpoint() is None
    older, newer = checkpoint(run, 2), checkpoint(run, 4)
    assert run.newest_checkpoint() == newer
    flip(newer / "weights.safetensors")
    assert run.newest_checkpoint() == older
    said = capsys.readouterr().err
    assert said.startswith(f"warning: going on from {older}")
    assert f"{newer} is damaged" in said
    run.forget_after(2)
    assert [step for step, _ in run.checkpoints()] == [2], "a damaged one is not met again"
    flip(older / "weights.safetensors")
    with pytest.raises(UserError, match=r"no checkpoint is whole.*step-000002.*delete"):
        run.newest_checkpoint()


def test_folders_of_other_names_among_the_checkpoints_do_no_harm(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    checkpoint(run, 2)
    (tmp_path / "checkpoints" / "step-000002-keep").mkdir()
    (tmp_path / "checkpoints" / "step-").mkdir()
    assert [step for step, _ in run.checkpoints()] == [2]
    run.prune_checkpoints(keep=0)
    assert (tmp_path / "checkpoints" / "step-000002-keep").exists()


def test_weights_follow_the_umask_and_private_files_do_not(tmp_path: Path, umask: None) -> None:
    folder = checkpoint(RunFolder(tmp_path), 1)
    assert rights(folder / "weights.safetensors") == 0o640
    write_atomic(tmp_path / "open.json", "{}")
    write_json(tmp_path / "people.json", {"name": "…"}, private=True)
    assert (rights(tmp_path / "open.json"), rights(tmp_path / "people.json")) == (0o640, 0o600)
    write_json(folder / "people.json", {}, private=True)
    seal(folder)
    assert rights(folder / "people.json") == 0o600


def test_files_and_their_folder_are_on_the_disk_before_they_have_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order of the calls: every file, the list of digests, and only then the rename; then the folder that names it."""
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def note_sync(handle: int) -> None:
        done.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    def note_replace(old: Path, new: Path) -> None:
        done.append(f"> {Path(new).name}")
        replace(old, new)

    monkeypatch.setattr("lm.run_folder.files.os.fsync", note_sync)
    monkeypatch.setattr("lm.run_folder.files.os.replace", note_replace)
    with RunFolder(tmp_path).writing("model") as folder:
        (folder / "weights.safetensors").write_bytes(b"")
    sums = f".SHA256SUMS.{os.getpid()}.tmp"
    assert done == ["weights.safetensors", sums, "> SHA256SUMS", ".model.tmp", "> model", tmp_path.name]


def test_what_killed_processes_left_is_swept_and_nothing_else(tmp_path: Path) -> None:
    kept = [tmp_path / name for name in ("plan.json", ".tmp", ".mine", "x.tmp", ".lock")]
    for path in kept:
        path.write_text("kept")
    (tmp_path / ".results.json.4711.tmp").write_text("half")
    (tmp_path / "facts").mkdir()
    (tmp_path / "facts" / ".a.npz.12.tmp").write_text("half")
    (tmp_path / ".model.tmp").mkdir()
    (tmp_path / ".model.tmp" / "weights").write_text("half")
    (tmp_path / ".best.old").mkdir()  # killed between the two renames
    (tmp_path / ".best.old" / "weights").write_text("whole")
    sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*(path.name for path in kept), "facts", "best"}
    assert list((tmp_path / "facts").iterdir()) == []
    assert (tmp_path / "best" / "weights").read_text() == "whole"


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe\x00", b"[" * 1200])
@pytest.mark.parametrize("name", ["manifest.json", "config.yaml"])
def test_damaged_records_of_a_run_are_a_sentence(tmp_path: Path, name: str, content: bytes) -> None:
    run = RunFolder.create(tmp_path / "run", Config())
    (run.path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}.*begin in another folder"):
        RunFolder.create(tmp_path / "run", Config(), resume=True, same=("data",))


def test_checkpoints_without_their_config_are_not_taken_for_a_beginning(tmp_path: Path) -> None:
    checkpoint(RunFolder(tmp_path), 2)
    with pytest.raises(UserError, match=r"lacks its config\.yaml"):
        RunFolder.create(tmp_path, Config(), resume=True)


def test_damaged_lines_of_a_log_are_named_and_the_others_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, path = RunFolder(tmp_path), tmp_path / "metrics.jsonl"
    lines = [b'{"step": 1}', b"{", b"[2]", b'{"step": "2"}', b'{"step": 2, "x": "\xff"}', b'{"step": 3}', b'{"st']
    path.write_bytes(b"\n".join(lines))
    assert run.metrics() == [{"step": 1}, {"step": 3}]
    run.forget_after(3)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": 1}, {"step": 3}]
    said = capsys.readouterr().err.splitlines()
    assert [line.split()[2] for line in said] == ["2", "3", "4", "5"], "a half-written last line is no damage"


def test_what_is_logged_after_the_last_step_is_not_logged_twice(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for _ in range(2):
        run.forget_after(1, but="/result/")
        if not run.metrics():
            run.log(1, {"loss": 0.5})
        run.log(1, {"a/result/fvu": 0.25})
    assert run.metrics() == [{"step": 1, "loss": 0.5}, {"step": 1, "a/result/fvu": 0.25}]
