"""The tracing benchmark, tiny: contenders agree, and what cannot be is refused."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path

import pytest

from benchmarks.tracing import of_all
from tests.forked import run_forked

ROOT = Path(__file__).resolve().parents[2]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    small = ["--layers", "3", "--hidden", "64", "--tokens", "9", "--samples", "2", "--cells", "6", "--rounds", "1"]
    return run_forked(ROOT / "benchmarks" / "tracing.py", *small, *words)


@pytest.mark.parametrize("window", ["1", "3"])
def test_this_project_s_contenders_agree(tmp_path: Path, window: str) -> None:
    ours = ["wavefront", "reference", "script_2022", "dense"]
    done = run("--window", window, "--contenders", json.dumps(ours), "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "results.json").read_text())
    assert list(found) == ours
    for facts in found.values():
        assert facts["apart"] < 1e-4
        assert len(facts["seconds"]) == 1
        assert facts["seconds"][0] > 0
    assert (tmp_path / "table.md").read_text() in done.stdout


def test_what_is_done_once_is_not_multiplied_with_the_cells() -> None:
    assert of_all(1.0 + 12 * 0.5, 1.0, 12 / 192) == 1.0 + 192 * 0.5
    assert of_all(3.0, 0.0, 0.25) == 12.0


@pytest.mark.parametrize(("name", "package"), [("transformer_lens", "transformer_lens"), ("nnsight", "nnsight")])
def test_peers_agree_where_they_are_installed(tmp_path: Path, name: str, package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed (extra `tracing-peers`)")
    done = run("--contenders", f'["wavefront", "reference", "{name}"]', "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "results.json").read_text())[name]["apart"] < 1e-4


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--contenders", '["wavefront"]'], "take wavefront, reference"),
        (["--tokens", "5"], "too short"),
    ],
)
def test_impossible_settings_are_refused(words: list[str], says: str) -> None:
    done = run(*words)
    assert done.returncode == 2
    assert says in done.stderr
