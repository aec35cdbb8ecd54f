"""What is installed is whole: the source distribution has what the tests need, the wheel what the command needs, anywhere."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("lm", "tracing", "sae", "unlearn", "palimpsest")
BESIDE = ("configs", "scripts", "tools", "benchmarks", "notebooks", "tests")
LEFT_OUT = ("runs", "build", "dist")
"""Folders of the checkout's root that are no part of it."""

IMPORT_ALL = """
import importlib, pkgutil, sys
for name in sys.argv[1:]:
    for module in pkgutil.walk_packages(importlib.import_module(name).__path__, f"{name}."):
        importlib.import_module(module.name)
own = {n: m.__file__ for n, m in sys.modules.items() if n.partition(".")[0] in sys.argv[1:] and getattr(m, "__file__", None)}
print(len(own), sorted(set(own.values())))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution, built from a copy of the checkout, and the wheel, built from it."""
    folder = tmp_path_factory.mktemp("built")
    checkout = shutil.copytree(ROOT, folder / "checkout", ignore=_left_out)
    _build("build_sdist", checkout, folder)
    with tarfile.open(_only(folder, "*.tar.gz")) as archive:
        archive.extractall(folder / "source", filter="data")
    _build("build_wheel", _only(folder / "source", "*"), folder)
    return folder


@pytest.fixture(scope="module")
def installed(built: Path) -> Path:
    """The folder into which the wheel alone is installed."""
    target = built / "installed"
    words = ["install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--target", str(target)]
    subprocess.run([sys.executable, "-m", "pip", *words, str(_only(built, "*.whl"))], check=True)
    return target


def _left_out(folder: str, names: list[str]) -> set[str]:
    of_tools = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*")(folder, names)
    return of_tools | (set(LEFT_OUT) if Path(folder) == ROOT else set())


def _build(what: str, source: Path, folder: Path) -> None:
    """As pip does without a network: the hook of the build backend, in the folder of the sources."""
    code = f"from setuptools import build_meta; build_meta.{what}({str(folder)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr


def _only(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


def _run(installed: Path, folder: Path, *words: str) -> str:
    """What the command prints that stands in the target folder, run elsewhere with nothing else of this project on the path."""
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _files(folder: Path) -> set[str]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {
        p.relative_to(folder).as_posix() for p in paths if "__pycache__" not in p.parts and not p.name.startswith(".")
    }


def test_the_source_distribution_has_what_the_tests_need(built: Path) -> None:
    source = _only(built / "source", "*")
    for folder in (*PACKAGES, *BESIDE):
        assert _files(source / folder) == _files(ROOT / folder), folder
    assert {"Makefile", "constraints.txt", "pyproject.toml", "setup.py", "LICENSE", "README.md"} <= _files(source)


def test_the_wheel_has_the_packages_with_their_data_and_nothing_else(built: Path) -> None:
    names = set(zipfile.ZipFile(_only(built, "*.whl")).namelist())
    own = {name for name in names if ".dist-info/" not in name}
    assert own == {f"{package}/{name}" for package in PACKAGES for name in _files(ROOT / package)} | {
        f"palimpsest/configs/{name}" for name in _files(ROOT / "configs")
    }
    assert {f"{package}/py.typed" for package in PACKAGES} <= own


def test_the_metadata_say_who_under_which_license_and_what_is_optional(built: Path) -> None:
    with zipfile.ZipFile(_only(built, "*.whl")) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
        metadata = Parser().parsestr(wheel.read(name).decode())
    assert metadata["Author"] == "the Palimpsest developers"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["License-File"] == "LICENSE"
    assert {"eval", "search", "sae", "all", "tests"} <= set(metadata.get_all("Provides-Extra") or ())
    assert metadata.get_all("Project-URL") is None


def test_the_command_answers_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    command = str(installed / "bin" / "palimpsest")
    assert _run(installed, tmp_path, command, "--version").startswith("palimpsest 0.")
    assert "  trace/builtin  " in _run(installed, tmp_path, command, "configs")
    path = Path(_run(installed, tmp_path, command, "configs", "accelerate/cpu2_ddp").strip())
    assert path == installed / "palimpsest" / "configs" / "accelerate" / "cpu2_ddp.yaml"


@pytest.mark.slow
def test_a_stage_runs_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    command = str(installed / "bin" / "palimpsest")
    words = ["trace", "--config", "builtin", "--max_facts", "2", "--out", "traced"]
    out = _run(installed, tmp_path, command, *words)
    assert "wrote traced/plan.json" in out
    assert json.loads((tmp_path / "traced" / "plan.json").read_text())["layers"]


@pytest.mark.slow
def test_every_module_is_imported_from_what_was_installed(installed: Path, tmp_path: Path) -> None:
    count, _, paths = _run(installed, tmp_path, sys.executable, "-c", IMPORT_ALL, *PACKAGES).partition(" ")
    assert int(count) == len([name for package in PACKAGES for name in _files(ROOT / package) if name.endswith(".py")])
    assert all(f"'{installed}" in path for path in paths.strip("[]\n").split(", "))
