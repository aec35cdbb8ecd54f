"""The benchmark's own machinery, with this project alone: it runs, learns, and counts memory and time."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.forked import run_forked

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"hidden": 16, "features": 128, "k": 4, "tokens": 64, "steps": 2, "rounds": 2, "threads": 1, "rate": 0.01}
WORDS = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return run_forked(ROOT / "benchmarks" / "sae.py", *words)


@pytest.mark.parametrize("choice", ["token", "mutual"])
def test_this_project_alone(choice: str, tmp_path: Path) -> None:
    done = run(*WORDS, "--choice", choice, "--contenders", '["ours"]', "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == (tmp_path / "table.md").read_text().strip()
    assert "| ours |" in done.stdout
    facts = json.loads((tmp_path / "results.json").read_text())["ours"]
    assert len(facts["seconds"]) == 2
    assert len(facts["losses"]) == 2 * 3
    assert facts["losses"][4] < facts["losses"][0]  # the same batch, four steps later
    assert facts["peak"] > facts["held"] > 0


def test_a_contender_that_is_not_known_is_refused(tmp_path: Path) -> None:
    done = run("--contenders", '["ours", "nobody"]', "--out", str(tmp_path))
    assert done.returncode == 2
    assert "take 'ours' and any of" in done.stderr
