"""Bad input ends in one clear sentence (exit status 2, no traceback) and loses no finished work. As a user would meet it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from lm.errors import UserError
from lm.model import ModelSpec
from lm.run_folder import RunFolder, write_atomic
from tests.unlearn.helpers import SMALL, command, config_words, environment, run_here, run_script, small_config
from unlearn.stage import run_unlearn

Break = Callable[[Path], dict[str, str]]


def lines(tiny: Path, side: str = "forget") -> list[dict[str, str]]:
    return [json.loads(line) for line in (tiny / f"{side}.jsonl").read_text().splitlines()]


def put(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def refused(tiny: Path, tmp_path: Path, *, says: list[str], **changes: object) -> None:
    """Run the script; it must exit with 2 and one line that holds each of `says`."""
    words = config_words(small_config(tiny, tmp_path / "run", **changes), tmp_path)  # type: ignore[arg-type]
    status, last = run_here("unlearn", *words)
    assert status == 2, last
    assert last.startswith("error: ")
    for word in says:
        assert word in last, last
    assert not (tmp_path / "run" / "model").exists()


def test_missing_file(tiny: Path, tmp_path: Path) -> None:
    refused(tiny, tmp_path, forget=str(tiny / "forgett.jsonl"), says=["forgett.jsonl", "forget.jsonl"])


def test_a_user_sees_no_traceback(tiny: Path, tmp_path: Path) -> None:
    words = command("unlearn", "--forget", str(tiny / "nothing.jsonl"), "--out", str(tmp_path / "run"))
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False, env=environment())
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_wrong_columns(tiny: Path, tmp_path: Path) -> None:
    rows = [{"id": r["id"], "inputt": r["input"], "output": r["output"], "task": r["task"]} for r in lines(tiny)]
    refused(tiny, tmp_path, forget=put(tmp_path / "f.jsonl", rows), says=["input", "inputt", "line 1"])


def test_rows_that_no_evaluation_takes_are_told_before_the_training(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = put(tmp_path / "rows.jsonl", [{**line, "task": "Biography"} for line in lines(tiny)])
    with pytest.raises(UserError, match="nowhere"):
        run_unlearn(replace(small_config(tiny, tmp_path / "run", forget=rows), model=ModelSpec(path="nowhere/model")))
    assert "warning: palimpsest evaluate and attack would refuse these rows: row" in (said := capsys.readouterr().err)
    assert 'has task "Biography": use one that the score knows' in said


def test_empty_split(tiny: Path, tmp_path: Path) -> None:
    refused(tiny, tmp_path, retain=put(tmp_path / "r.jsonl", []), says=["r.jsonl", "no rows"])


def test_duplicate_ids(tiny: Path, tmp_path: Path) -> None:
    rows = lines(tiny)
    refused(tiny, tmp_path, forget=put(tmp_path / "f.jsonl", [*rows, rows[2]]), says=[rows[2]["id"], "line 3"])


def test_the_same_id_on_both_sides(tiny: Path, tmp_path: Path) -> None:
    both = [*lines(tiny, "retain"), lines(tiny)[0]]
    refused(tiny, tmp_path, retain=put(tmp_path / "r.jsonl", both), says=[lines(tiny)[0]["id"], "both"])


def test_not_utf8(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "f.jsonl").write_bytes((tiny / "forget.jsonl").read_bytes() + b'{"id": "\xff"}\n')
    refused(tiny, tmp_path, forget=str(tmp_path / "f.jsonl"), says=["UTF-8", "line 13"])


def test_nan_weights(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny / "model", tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    refused(tiny, tmp_path, model=ModelSpec(path=str(tmp_path / "model")), says=["layers.1.mlp.up_proj.weight"])


def test_tokenizer_without_eos(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    config.pop("eos_token")
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(config))
    refused(tiny, tmp_path, model=ModelSpec(path=str(tmp_path / "model")), says=["EOS", "eos_token"])


def test_a_folder_that_is_no_model(tiny: Path, tmp_path: Path) -> None:
    refused(tiny, tmp_path, model=ModelSpec(path=str(tiny)), says=["config.json"])


def test_wrong_key_and_wrong_type(tiny: Path, tmp_path: Path) -> None:
    words = config_words(small_config(tiny, tmp_path / "run"), tmp_path)
    for extra, says in (
        (["--trainer.stepz", "3"], "trainer.steps"),
        (["--objective", "Jont"], "Joint"),
        (["--objective.forget_capp", "3"], "forget_cap"),
        (["--retain_weight", "Fixd"], "Fixed"),
        (["--model.dtype", "float33"], "float32"),
        (["--trainer.steps", "many"], "trainer.steps"),
        (["--trainer.batch", "-3"], "trainer.batch is -3"),
        (["--trainer.autocast", "bf16", "--model.dtype", "bfloat16"], "master"),
        (["--scope.layers", "[9]"], "layers 0 to 2"),
        (["--trackers", "[tensorbord]"], "tensorbord"),
        (["--trackers", "[comet_ml]"], "not installed"),
    ):
        status, last = run_here("unlearn", *words, *extra)
        assert status == 2, last
        assert says in last


def test_a_run_folder_is_not_overwritten(tiny: Path, tmp_path: Path) -> None:
    config = small_config(tiny, tmp_path / "run")
    folder = run_unlearn(config)
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="already holds a run"):
        run_unlearn(config)
    with pytest.raises(UserError, match=r"trainer.steps was 6 and is now 7"):
        run_unlearn(replace(config, resume=True, trainer=replace(SMALL, steps=7)))
    assert run_unlearn(replace(config, resume=True)) == folder
    assert (folder / "model.safetensors").read_bytes() == before


@contextmanager
def small_disk(folder: Path, size: str, *, read_only: bool = False) -> Iterator[None]:
    """A real little file system at `folder`, where this user may mount one."""
    folder.mkdir()
    options = f"size={size}" + (",ro" if read_only else "")
    if (
        shutil.which("mount") is None
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=False, capture_output=True
        ).returncode
    ):
        pytest.skip("this user may not mount a small file system; the same errors are simulated in the other tests")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_read_only_output_folder(tiny: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "1m", read_only=True):
        done = run_script("unlearn", *config_words(small_config(tiny, tmp_path / "disk" / "run"), tmp_path))
    assert done.returncode == 2, done.stderr
    assert "read-only" in done.stderr.strip().splitlines()[-1]


def test_a_full_disk_loses_no_finished_work(tiny: Path, tmp_path: Path) -> None:
    """The disk has room for checkpoints but not for the result; with room made, the run goes on from its last step."""
    disk = tmp_path / "disk"
    config = small_config(tiny, disk / "run")
    with small_disk(disk, "200k"):
        done = run_script("unlearn", *config_words(config, tmp_path))
        assert done.returncode == 2, done.stderr
        assert "the disk is full" in done.stderr.strip().splitlines()[-1], done.stderr
        saved = [step for step, _ in RunFolder(disk / "run").checkpoints()]
        assert saved, "finished checkpoints are still there"
        assert not (disk / "run" / "model").exists()
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        again = run_script("unlearn", *config_words(config, tmp_path), "--resume", "true")
        assert again.returncode == 0, again.stderr
        result = load_file(disk / "run" / "model" / "model.safetensors")
    whole = load_file(run_unlearn(small_config(tiny, tmp_path / "whole")) / "model.safetensors")
    assert all(torch.equal(whole[name], result[name]) for name in whole)


@pytest.mark.parametrize("size", ["60k", "100k", "140k"])
def test_a_disk_that_fills_anywhere_ends_in_the_sentence(tiny: Path, tmp_path: Path, size: str) -> None:
    """Weights are written by safetensors, whose error is not the system's own."""
    with small_disk(tmp_path / "disk", size), pytest.raises(UserError, match="the disk is full"):
        run_unlearn(small_config(tiny, tmp_path / "disk" / "run"))


@pytest.mark.parametrize(
    ("number", "says"), [(errno.ENOSPC, "disk is full"), (errno.EROFS, "read-only"), (errno.EACCES, "may not write")]
)
def test_write_errors_are_sentences_and_leave_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, says: str
) -> None:
    path = tmp_path / "results.json"
    write_atomic(path, "old")

    def fail(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("lm.run_folder.files.os.fsync", fail)
    with pytest.raises(UserError, match=says):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path], "no temporary file is left"


def test_a_checkpoint_of_another_scope_is_refused(tiny: Path, tmp_path: Path) -> None:
    from lm.loading import load
    from unlearn.scope.scope import Scope
    from unlearn.training import checkpoint

    model = load(str(tiny / "model"), device="cpu")
    Scope(layers=(0,)).resolve(model.anatomy).apply(model.model, model.anatomy)
    checkpoint.save(Accelerator(cpu=True), RunFolder(tmp_path), "saved", model.model, None, {})
    Scope(layers=(1,)).resolve(model.anatomy).apply(model.model, model.anatomy)
    with pytest.raises(UserError, match="another scope"):
        checkpoint.restore(tmp_path / "saved", model.model, None)
