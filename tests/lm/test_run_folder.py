"""Run folders: atomic files, logs without a seam, and refusals that keep what is there."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console

from lm.errors import UserError
from lm.progress import progress
from lm.run_folder import RunFolder, write_atomic


@dataclass(frozen=True, kw_only=True)
class Config:
    """A config."""

    size: int = 1
    resume: bool = False


def test_a_run_folder_holds_config_and_manifest(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", Config(size=3), facts={"seed": 7})
    assert "size: 3" in (run.path / "config.yaml").read_text()
    assert run.manifest["seed"] == 7
    assert "torch" in run.manifest["versions"]
    run.finish(steps=5)
    assert (run.manifest["steps"], run.manifest["seed"]) == (5, 7)


def test_a_second_run_is_refused_and_a_resumed_one_must_agree(tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "run", Config())
    with pytest.raises(UserError, match="already holds a run"):
        RunFolder.create(tmp_path / "run", Config())
    with pytest.raises(UserError, match="size was 1 and is now 2"):
        RunFolder.create(tmp_path / "run", Config(size=2), resume=True)
    RunFolder.create(tmp_path / "run", Config(resume=True), resume=True)


def test_a_setting_younger_than_the_run_had_its_default_then(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", Config())
    stored = run.path / "config.yaml"
    stored.write_text("".join(line for line in stored.read_text().splitlines(True) if not line.startswith("size")))
    RunFolder.create(tmp_path / "run", Config(), resume=True)
    with pytest.raises(UserError, match="size was 1 and is now 2"):
        RunFolder.create(tmp_path / "run", Config(size=2), resume=True)


def test_a_resumed_log_forgets_what_came_after_and_half_lines(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for step in (1, 2, 3):
        run.log(step, {"loss": 0.5 * step})
    with open(tmp_path / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 4, "lo')
    run.forget_after(2)
    assert run.metrics() == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 1.0}]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    with run.writing("model") as folder:
        (folder / "a").write_text("first")

    def half() -> None:
        with run.writing("model") as folder:
            (folder / "a").write_text("second")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        half()
    assert (tmp_path / "model" / "a").read_text() == "first"
    with run.writing("model") as folder:
        (folder / "a").write_text("third")
    assert (tmp_path / "model" / "a").read_text() == "third"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_checkpoints_are_ordered_by_step_and_pruned(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for step in (900, 1000, 1100):
        with run.writing(run.checkpoint_name(step)):
            pass
    run.prune_checkpoints(keep=2)
    assert [step for step, _ in run.checkpoints()] == [1000, 1100]
    run.prune_checkpoints(keep=0)
    assert run.checkpoints() == []


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, main=False)
    run.log(1, {"loss": 1.0})
    run.finish(done=True)
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write"):
        write_atomic(tmp_path / "file" / "deeper" / "x.json", "1")


def test_progress_in_a_log_says_rate_and_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([0.0, 20.0, 40.0])
    monkeypatch.setattr("lm.progress.time.monotonic", lambda: next(now))
    with progress(4, label="work", unit="rows") as advance:
        advance(1, loss=0.25)
        advance(3)
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "work: 1/4  0.1 rows/s  60 s left  loss 0.25"
    assert said[1].startswith("work: 4/4")


def test_progress_is_silent_where_it_should_be(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(4, label="work", enabled=False) as advance:
        advance(4)
    assert capsys.readouterr().err == ""


def test_on_80_columns_the_bar_keeps_its_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many values beside it must not take their room: they have a line of their own."""
    screen = io.StringIO()
    monkeypatch.setattr("lm.progress.sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setattr("lm.progress.Console", lambda **_: Console(file=screen, force_terminal=True, width=80))
    with progress(614_400, label="sae", unit="tokens") as advance:
        for _ in range(3):
            advance(1024, **{f"nmse token_choice_{place}": 0.123456 for place in range(3)})
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    *_, above, below = [line for line in plain.splitlines() if line.strip()]
    assert max(len(above), len(below)) <= 80
    assert all(part in above for part in ("sae", "━", "3,072/614,400", "tokens/s", "left"))
    assert below.strip().startswith("nmse token_choice_0 0.1235  nmse token_choice_1 0.1235")
