"""Run folders: what a folder is, told by what it holds; and those that lie in a folder. Nothing is put together here."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml

from lm.errors import UserError
from lm.run_folder import RunFolder

Kind = Literal["trace", "unlearn", "evaluate", "attack", "retrace", "depth"]
_RESULTS: dict[Kind, str] = {
    "evaluate": "scores.json",
    "attack": "attack.json",
    "depth": "depth.json",
    "retrace": "difference.json",
    "trace": "plan.json",
    "unlearn": "model/config.json",
}
"""The stage that wrote a folder -> the file that only it writes, and writes when it has ended."""
_OLD_KEYS = {"never": "retain_model"}
"""Settings that older runs have under another name; no others are read here."""


@dataclass(frozen=True)
class Run:
    """A folder that a stage has written to the end."""

    folder: Path
    kind: Kind

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The settings as plain data, under today's names."""
        values = yaml.safe_load((self.folder / "config.yaml").read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise UserError(f"{self.folder / 'config.yaml'} holds no settings: leave that run out")
        return {_OLD_KEYS.get(str(name), str(name)): value for name, value in values.items()}

    @cached_property
    def manifest(self) -> Mapping[str, Any]:
        """What it was made with; empty if the file is gone."""
        return RunFolder(self.folder).manifest if (self.folder / "manifest.json").exists() else {}

    @property
    def started(self) -> str:
        """When it began, as text that sorts by time."""
        return str(self.manifest.get("started", ""))

    def json(self, name: str) -> Any:
        """A file of the folder. Raises UserError if it is damaged."""
        try:
            return json.loads((self.folder / name).read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{self.folder / name} is damaged ({error}): run that stage again") from None

    def rows(self, name: str) -> list[dict[str, str]]:
        """A file of rows; none if there is no such file."""
        path = self.folder / name
        if not path.exists():
            return []
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def find_runs(folders: Iterable[str | Path]) -> list[Run]:
    """The runs in these folders, each once, in the order in which the folders are given.

    A folder is a run, with any runs right inside it (an evaluation kept in the folder of the model, say), or it holds run
    folders, one or two levels down: these are taken in the order in which they began.

    Raises:
        UserError: a folder that is not there, that holds no run, or whose run has not ended.
    """
    runs: dict[Path, Run] = {}
    for name in folders:
        folder = Path(name)
        if not folder.is_dir():
            raise UserError(f"the run folder {name} does not exist: check the path")
        inside = list(_runs_in(folder, levels=2))
        if not inside:
            raise _nothing_in(folder)
        for run in inside:
            runs.setdefault(run.folder.resolve(), run)
    return list(runs.values())


def left_out(folders: Iterable[str | Path]) -> list[Path]:
    """The run folders in these folders that `find_runs` passes over: not ended, or of a stage that no report shows."""
    begun = (path for name in folders for path in _folders_in(Path(name), levels=2) if (path / "config.yaml").is_file())
    return [path for path in dict.fromkeys(begun) if run_in(path) is None]


def run_in(folder: Path) -> Run | None:
    """The run that a folder is; None if it is none, or has not ended."""
    if not (folder / "config.yaml").is_file():
        return None
    return next((Run(folder, kind) for kind, name in _RESULTS.items() if (folder / name).is_file()), None)


def _runs_in(folder: Path, levels: int) -> Iterator[Run]:
    run = run_in(folder)
    inner = _inner(folder)
    if run is not None:
        yield run
        yield from filter(None, map(run_in, inner))
    elif levels:
        below = [found for path in inner for found in _runs_in(path, levels - 1)]
        yield from sorted(below, key=lambda each: each.started)


def _folders_in(folder: Path, levels: int) -> Iterator[Path]:
    """The folders that `_runs_in` looks into, without the folder itself."""
    for path in _inner(folder):
        yield path
        if run_in(folder) is None and levels:
            yield from _folders_in(path, levels - 1)


def _inner(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _nothing_in(folder: Path) -> UserError:
    expected = ", ".join(f"{name} ({kind})" for kind, name in _RESULTS.items())
    if (folder / "config.yaml").is_file():
        return UserError(
            f"the run in {folder} has not ended, or its stage is not reported (there is none of {expected}): finish it with "
            "--resume true, or leave it out"
        )
    return UserError(
        f"the folder {folder} holds no run: give one that a stage wrote, with its config.yaml and one of {expected}"
    )
