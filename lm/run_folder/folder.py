"""The folder of one run, and its records. Names, order and atomicity are settled here.

Everything is written under a temporary name and moved into place, so that an interrupted run or a full disk never
costs finished work. What is *in* a checkpoint belongs to whoever trains.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from lm.config import as_dict, as_of_today, dump_yaml
from lm.errors import UserError, one_line
from lm.run_folder.files import damage, move, seal, sweep, writable, write_atomic, write_json
from lm.run_folder.machine import environment
from lm.run_folder.stages import hold

_CHECKPOINT = re.compile(r"step-(\d+)")


class RunFolder:
    """One run: `config.yaml`, `manifest.json`, `metrics.jsonl`, `checkpoints/step-*`, and whatever the stage writes.

    Create it with `RunFolder.create` on the main process only; the others use `RunFolder(path, main=False)`.
    """

    def __init__(self, path: Path | str, *, main: bool = True) -> None:
        self.path = Path(path)
        self.main = main

    @classmethod
    def create(
        cls,
        path: Path | str,
        config: Any,
        *,
        resume: bool = False,
        facts: Mapping[str, Any] | None = None,
        same: Sequence[str] = (),
        free: Collection[str] = (),
        of_today: Mapping[str, Callable[[Any], Any]] | None = None,
    ) -> RunFolder:
        """Begin a run, or go on with one. In a stage (`lm.run_folder.stage`) the folder is locked until that ends.

        Args:
            config: the whole experiment; written as `config.yaml`.
            resume: go on with what is there. The stored config must be equal but for `resume` itself.
            facts: what else the manifest should hold (data hashes, seed, model).
            same: the facts that must not have changed when a run goes on (the content of the data, say).
            of_today: how a fact of an older run would be written today, for those of `same` that hold settings.
            free: dotted settings that may differ when a run goes on, since no result follows from them.

        Raises:
            UserError: the folder holds another run, is in use by another process, or cannot be written; a record of the run
                that is gone on with is damaged.
        """
        run = cls(path)
        text = dump_yaml(config)
        stored = run.path / "config.yaml"
        hold(run.path)
        if stored.exists():
            if not resume:
                raise UserError(
                    f"the folder {run.path} already holds a run: give another folder, or --resume true to go on with it"
                )
            sweep(run.path)
            run._refuse_other_config(config, free)
            began, today = run.manifest, of_today or {}
            for name in same:
                fact = began.get(name)
                if name in today and fact is not None:
                    fact = today[name](fact)
                if fact != (facts or {}).get(name):
                    raise UserError(
                        f"cannot resume {run.path}: {name} changed since it began (other content behind the same name): "
                        "give another folder"
                    )
        else:
            if run.checkpoints():
                raise UserError(
                    f"{run.path} holds checkpoints of a run and lacks its config.yaml: restore that, or give another folder"
                )
            for name in ("manifest.json", "config.yaml"):
                for left in run.path.glob(f".{name}.*.tmp"):
                    left.unlink()
            write_json(run.path / "manifest.json", {"started": _now(), **environment(), **(facts or {})})
            write_atomic(stored, text)
        return run

    @property
    def manifest(self) -> dict[str, Any]:
        """What the run was made with (and, when it ended, what it came to)."""
        path = self.path / "manifest.json"
        try:
            loaded = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(
                f"{path} cannot be read ({one_line(error)}): restore it, or begin in another folder"
            ) from error
        if not isinstance(loaded, dict):
            raise UserError(f"{path} is no manifest of a run: restore it, or begin in another folder")
        return loaded

    def note(self, **facts: Any) -> None:
        """Add facts to the manifest."""
        if self.main:
            write_json(self.path / "manifest.json", {**self.manifest, **facts})

    def finish(self, **facts: Any) -> None:
        """Add the closing facts (time, peak memory, result) to the manifest."""
        self.note(**facts, finished=_now())

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line to `metrics.jsonl`."""
        if self.main:
            with (
                writable(self.path / "metrics.jsonl"),
                open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file,
            ):
                file.write(json.dumps({"step": step, **values}) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """Every logged line, oldest first; one that is damaged, as the last one of a killed run may be, is left out."""
        return [entry for _, entry in self._log() if entry is not None]

    def forget_after(self, step: int, *, but: str | None = None) -> None:
        """Drop what is later than `step` and damaged lines: a resumed log equals an unbroken one.

        Checkpoints that are later are dropped as well: none of them was fit to go on from.

        Args:
            but: a part of the names of those values that are logged after the last step, and will be again.
        """
        path = self.path / "metrics.jsonl"
        if not self.main:
            return
        for number, folder in self.checkpoints():
            if number > step:
                shutil.rmtree(folder, ignore_errors=True)
        if path.exists():
            lines = self._log()
            for number, (_, entry) in enumerate(lines[:-1], start=1):
                if entry is None:
                    print(f"warning: line {number} of {path} is damaged and left out", file=sys.stderr)
            kept = [
                line
                for line, entry in lines
                if entry is not None and entry["step"] <= step and not (but and any(but in name for name in entry))
            ]
            write_atomic(path, "".join(line + "\n" for line in kept))

    def _log(self) -> list[tuple[str, dict[str, Any] | None]]:
        """Each line of the log with what it says; None for one that is damaged."""
        path = self.path / "metrics.jsonl"
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        return [(line, _entry(line)) for line in text.split("\n") if line]

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A temporary folder that becomes `name`, sealed, when the block ends without error, and not before."""
        final, temporary = self.path / name, self.temporary(name)
        with writable(final):
            try:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
                yield temporary
                seal(temporary)
                move(temporary, final)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)

    def temporary(self, name: str) -> Path:
        """Where `name` is while `writing`, for other processes that write into it too."""
        return (self.path / name).with_name(f".{Path(name).name}.tmp")

    def checkpoint_name(self, step: int) -> str:
        """`checkpoints/step-000120`."""
        return f"checkpoints/step-{step:06d}"

    def checkpoints(self) -> list[tuple[int, Path]]:
        """The finished checkpoints, oldest first; folders of other names are nobody's business."""
        found = [
            (_CHECKPOINT.fullmatch(path.name), path) for path in self.path.glob("checkpoints/step-*") if path.is_dir()
        ]
        return sorted((int(match[1]), path) for match, path in found if match is not None)

    def newest_checkpoint(self, flaw: Callable[[Path], str | None] = damage) -> Path | None:
        """The newest checkpoint that is whole, None if there is none at all; newer ones that are not are named on stderr.

        Args:
            flaw: what is wrong with one, in a few words.

        Raises:
            UserError: there are some, and all are damaged.
        """
        damaged: list[str] = []
        for _, folder in reversed(self.checkpoints()):
            problem = flaw(folder)
            if problem is None:
                if damaged:
                    print(f"warning: going on from {folder}, since {' and '.join(damaged)}", file=sys.stderr)
                return folder
            damaged.append(f"{folder} is damaged ({problem})")
        if damaged:
            raise UserError(
                f"no checkpoint is whole: {' and '.join(damaged)}: restore one, or delete {self.path / 'checkpoints'} to "
                "begin anew"
            )
        return None

    def prune_checkpoints(self, keep: int) -> None:
        """Delete all but the newest `keep` checkpoints."""
        if self.main:
            saved = self.checkpoints()
            for _, path in saved[: max(len(saved) - keep, 0)]:
                shutil.rmtree(path, ignore_errors=True)

    def _refuse_other_config(self, config: Any, free: Collection[str]) -> None:
        path = self.path / "config.yaml"
        try:
            saved = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            raise UserError(
                f"{path} cannot be read ({one_line(error)}): restore it, or begin in another folder"
            ) from error
        if not isinstance(saved, dict):
            raise UserError(f"{path} is no config of a run: restore it, or begin in another folder")
        old = _flat(as_of_today(saved, type(config)))  # a setting that is younger than the run had its default then
        new = _flat(as_dict(config))
        differing = [key for key in sorted({*old, *new} - {"resume", *free}) if old.get(key) != new.get(key)]
        if differing:
            key = differing[0]
            raise UserError(
                f"cannot resume {self.path}: {key} was {old.get(key)!r} and is now {new.get(key)!r}: "
                "give the same settings, or another folder"
            )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        out: dict[str, Any] = {}
        for key, item in value.items():
            out.update(_flat(item, f"{prefix}.{key}" if prefix else str(key)))
        return out
    return {prefix: value}


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _entry(line: str) -> dict[str, Any] | None:
    """What a line of the log says; None if it is damaged."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(entry, dict) and isinstance(entry.get("step"), int) and "\ufffd" not in line
    return entry if whole else None
