"""What goes wrong on one process ends all of them, soon, and the reason is what the launcher says last."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lm.run_folder import RunFolder
from tests.unlearn.helpers import SMALL, config_words, launch, small_config
from unlearn.scope.scope import Scope


@pytest.mark.parametrize(
    ("config", "kind", "says"),
    [
        ("cpu2_ddp", "bug", "RuntimeError: a bug of the second process"),
        ("cpu2_fsdp", "disk", "the disk is full: free some room and give the same command again, with --resume true"),
    ],
)
def test_an_error_of_one_process_ends_all(tiny: Path, tmp_path: Path, config: str, kind: str, says: str) -> None:
    settings = small_config(tiny, tmp_path / "run", scope=Scope(layers=(1,)), trainer=replace(SMALL, steps=400))
    words = [kind, *config_words(settings, tmp_path)]
    done = launch(config, "tests/unlearn/failing_case.py", *words, timeout=240)  # a process that hangs fails the test
    assert done.returncode not in (0, None)
    assert says in done.stderr
    last = done.stderr[done.stderr.rindex("Root Cause") :]
    assert says in last
    if kind == "disk":
        assert done.stderr.count("error: cannot write") == 2, "each process says it"
        assert [step for step, _ in RunFolder(tmp_path / "run").checkpoints()] == [2], "the earlier checkpoint is whole"
        assert not list((tmp_path / "run" / "checkpoints").glob(".*")), "nothing half-written is left"
    else:
        assert "rank      : 1" in last
