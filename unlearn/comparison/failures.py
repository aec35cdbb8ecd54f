"""Runs that did not end: what a benchmark wrote of one that failed, and what a stage left that was broken off."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm.config import as_dict
from lm.errors import UserError
from lm.run_folder import write_json
from unlearn.config import UnlearnConfig
from unlearn.report.runs.folders import left_out
from unlearn.report.runs.stages import settings_in

FAILED = "failed.json"
_LEVELS = 3


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A run that did not end, and why.

    Attributes:
        folder: where it is: the folder of the unlearning run that it is, or that it is of.
        why: in a sentence.
        settings: of the unlearning run; None if they are not known.
    """

    folder: Path
    why: str
    settings: Mapping[str, Any] | None


def write_failure(folder: Path, why: str, config: UnlearnConfig) -> None:
    """Leave word of a run that failed or was refused, for `palimpsest compare` to show.

    Args:
        folder: of the unlearning run; made if need be.
        why: in a sentence.
        config: of the unlearning run, so that it stands beside its other seeds.
    """
    write_json(folder / FAILED, {"why": why, "settings": as_dict(config)})


def failures(folders: Sequence[str]) -> list[Failure]:
    """The runs in these folders that failed or have not ended, each folder once. Raises UserError for a damaged file."""
    found = {failure.folder: failure for failure in _not_ended(folders)}
    for name in folders:
        for path in _files(Path(name), _LEVELS):
            try:
                said = json.loads(path.read_text(encoding="utf-8"))
                found[path.parent] = Failure(folder=path.parent, why=str(said["why"]), settings=said.get("settings"))
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path} is damaged ({error!r}): delete it") from None
    return list(found.values())


def _files(folder: Path, levels: int) -> Iterator[Path]:
    if (folder / FAILED).is_file():
        yield folder / FAILED
    if levels and folder.is_dir():
        for path in sorted(folder.iterdir()):
            if path.is_dir() and not path.name.startswith("."):
                yield from _files(path, levels - 1)


def _not_ended(folders: Sequence[str]) -> Iterator[Failure]:
    """Of the run folders that no report shows, those that unlearning, an evaluation or an attack left."""
    for path in left_out([name for name in folders if Path(name).is_dir()]):
        settings = settings_in(path)
        again = f"palimpsest STAGE --config {path / 'config.yaml'} --resume true goes on with it"
        if "objective" in settings:
            why = f"its unlearning in {path} has not ended: {again.replace('STAGE', 'unlearn')}"
            yield Failure(folder=path, why=why, settings=settings)
            continue
        stage = "attack" if "attack" in settings else "evaluate" if "members" in settings else None
        if stage is not None:
            what = "attack" if stage == "attack" else "evaluation"
            why = f"its {what} in {path} has not ended: {again.replace('STAGE', stage)}"
            made = _run_of(settings)
            yield Failure(folder=made or path, why=why, settings=settings_in(made) if made else None)


def _run_of(settings: Mapping[str, Any]) -> Path | None:
    """The unlearning run that made the model of an evaluation or an attack; None where none is there."""
    model = settings.get("model")
    path = Path(str(model.get("path") if isinstance(model, Mapping) else model))
    return path.parent if path.name == "model" and "objective" in settings_in(path.parent) else None
