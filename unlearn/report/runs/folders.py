"""Run folders: what a folder holds, and those that lie in a folder. Nothing is put together here."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lm.errors import UserError
from lm.old_configs import upgraded
from lm.run_folder import RunFolder
from unlearn.report.runs.stages import CONFIGS, MAKES_A_MODEL, RESULTS, Kind, not_shown, settings_in, shown_stage


@dataclass(frozen=True)
class Run:
    """A folder that a stage has written to the end."""

    folder: Path
    kind: Kind

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The settings as plain data, under today's names."""
        values = settings_in(self.folder)
        if not values:
            raise UserError(f"{self.folder / 'config.yaml'} holds no settings: leave that run out")
        today: Mapping[str, Any] = upgraded(values, CONFIGS[self.kind])
        return today

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
    folders, one or two levels down: these are taken in the order in which they began. Of a run whose stage no report shows, only
    the runs right inside it are taken.

    Raises:
        UserError: a folder that is not there, that holds no run, or whose run has not ended or is of a stage that no report
            shows.
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
    """The run folders that `find_runs` passes over in these: not ended, or of a stage that no report shows."""
    paths = (path for name in folders for path in (Path(name), *_folders_in(Path(name), levels=2)))
    return [path for path in dict.fromkeys(paths) if run_in(path) is None and _is_begun(path)]


def run_in(folder: Path) -> Run | None:
    """The run that a folder is; None if it is none, has not ended, or is of a stage that no report shows."""
    kind = shown_stage(folder)
    return Run(folder, kind) if kind is not None else None


def _is_begun(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() or not_shown(folder) is not None


def _runs_in(folder: Path, levels: int) -> Iterator[Run]:
    run = run_in(folder)
    inner = _inner(folder)
    if run is not None:
        yield run
    if run is not None or not_shown(folder) is not None:
        yield from filter(None, map(run_in, inner))
    elif levels:
        below = [found for path in inner for found in _runs_in(path, levels - 1)]
        yield from sorted(below, key=lambda each: each.started)


def _folders_in(folder: Path, levels: int) -> Iterator[Path]:
    """The folders that `_runs_in` looks into, without the folder itself."""
    whole = run_in(folder) is not None or not_shown(folder) is not None
    for path in _inner(folder):
        yield path
        if levels and not whole:
            yield from _folders_in(path, levels - 1)


def _inner(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _nothing_in(folder: Path) -> UserError:
    expected = ", ".join(f"{name} ({kind})" for kind, name in RESULTS.items())
    stage = not_shown(folder)
    if stage is not None:
        instead = ", and give an evaluation of its model instead" if stage in MAKES_A_MODEL else ""
        return UserError(f"the run in {folder} is of {stage}, a stage that no report shows: leave it out{instead}")
    if (folder / "config.yaml").is_file():
        return UserError(
            f"the run in {folder} has not ended, or is of no stage that a report shows (there is none of {expected}): finish it "
            "with --resume true, or leave it out"
        )
    passed = ", ".join(map(str, left_out([folder])))
    only = f" that has ended and that a report shows, only {passed}" if passed else ""
    return UserError(
        f"the folder {folder} holds no run{only}: give one that a stage wrote, with its config.yaml and one of {expected}"
    )
