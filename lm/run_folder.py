"""A run folder: what was asked (config), with what (manifest), what happened (metric log), and what came out.

Everything is written under a temporary name and moved into place, so that an interrupted run or a full disk never
costs finished work. What is *in* a checkpoint belongs to whoever trains; here are only names, order and atomicity.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from lm.config import as_dict, as_of_today, dump_yaml
from lm.errors import NotWritten, UserError
from lm.progress import progress

__all__ = ["RunFolder", "progress", "writable", "write_atomic", "write_json"]

_PACKAGES = ("torch", "transformers", "accelerate", "peft", "datasets", "lm-eval", "numpy")


@contextmanager
def writable(path: Path) -> Iterator[None]:
    """Turn a full disk, a read-only folder or a missing right into one sentence about `path`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reasons = {
            errno.ENOSPC: "the disk is full: free some room and run again with --resume true",
            errno.EFBIG: "the file would be larger than files may be here (ulimit -f): raise the limit, or choose another folder",
            errno.EDQUOT: "the disk quota is used up: free some room and run again with --resume true",
            errno.EROFS: "the file system is read-only: choose another folder",
            errno.EACCES: "this user may not write there: choose another folder or change its rights",
            errno.EPERM: "this user may not write there: choose another folder or change its rights",
            errno.ENOTDIR: "a part of that path is a file: choose another folder",
            errno.EEXIST: "a file stands in the way: choose another folder",
        }
        reason = reasons.get(_system_error(error))
        if reason is None:
            raise
        raise NotWritten(f"cannot write {path}, {reason}") from error


def _system_error(error: OSError | SafetensorError) -> int:
    """The system's number for an error; safetensors has it only in its words."""
    if isinstance(error, OSError):
        return error.errno or 0
    number = re.search(r"os error (\d+)", str(error))
    return int(number.group(1)) if number else errno.ENOSPC if "No space left" in str(error) else 0


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write a whole file or nothing: a reader never sees half of it."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writable(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON, atomically."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=True) + "\n")


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
        """Begin a run, or go on with one.

        Args:
            config: the whole experiment; written as `config.yaml`.
            resume: go on with what is there. The stored config must be equal but for `resume` itself.
            facts: what else the manifest should hold (data hashes, seed, model).
            same: the facts that must not have changed when a run goes on (the content of the data, say).
            of_today: how a fact of an older run would be written today, for those of `same` that hold settings.
            free: dotted settings that may differ when a run goes on, since no result follows from them.

        Raises:
            UserError: the folder holds another run, or cannot be written.
        """
        run = cls(path)
        text = dump_yaml(config)
        stored = run.path / "config.yaml"
        if stored.exists():
            if not resume:
                raise UserError(
                    f"the folder {run.path} already holds a run: give another folder, or --resume true to go on with it"
                )
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
            write_json(run.path / "manifest.json", {"started": _now(), **environment(), **(facts or {})})
            write_atomic(stored, text)
        return run

    @property
    def manifest(self) -> dict[str, Any]:
        """What the run was made with (and, when it ended, what it came to)."""
        loaded: dict[str, Any] = json.loads((self.path / "manifest.json").read_text())
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
        """Every logged line, oldest first."""
        path = self.path / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def forget_after(self, step: int) -> None:
        """Drop logged lines later than `step`, and a half-written last one: a resumed log equals an unbroken one."""
        path = self.path / "metrics.jsonl"
        if self.main and path.exists():
            kept = []
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:
                    break
                if entry["step"] <= step:
                    kept.append(line)
            write_atomic(path, "".join(line + "\n" for line in kept))

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A temporary folder that becomes `name` when the block ends without error, and not before."""
        final, temporary = self.path / name, self.temporary(name)
        with writable(final):
            try:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
                yield temporary
                if final.exists():
                    aside = final.with_name(f".{final.name}.old")
                    shutil.rmtree(aside, ignore_errors=True)
                    os.replace(final, aside)
                    os.replace(temporary, final)
                    shutil.rmtree(aside, ignore_errors=True)
                else:
                    os.replace(temporary, final)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)

    def temporary(self, name: str) -> Path:
        """Where `name` is while `writing`, for other processes that write into it too."""
        return (self.path / name).with_name(f".{Path(name).name}.tmp")

    def checkpoint_name(self, step: int) -> str:
        """`checkpoints/step-000120`."""
        return f"checkpoints/step-{step:06d}"

    def checkpoints(self) -> list[tuple[int, Path]]:
        """The finished checkpoints, oldest first."""
        return sorted(
            (int(p.name.removeprefix("step-")), p) for p in self.path.glob("checkpoints/step-*") if p.is_dir()
        )

    def prune_checkpoints(self, keep: int) -> None:
        """Delete all but the newest `keep` checkpoints."""
        if self.main:
            saved = self.checkpoints()
            for _, path in saved[: max(len(saved) - keep, 0)]:
                shutil.rmtree(path, ignore_errors=True)

    def _refuse_other_config(self, config: Any, free: Collection[str]) -> None:
        saved = yaml.safe_load((self.path / "config.yaml").read_text(encoding="utf-8"))
        old = _flat(as_of_today(saved, type(config)))  # a setting that is younger than the run had its default then
        new = _flat(as_dict(config))
        differing = [key for key in sorted({*old, *new} - {"resume", *free}) if old.get(key) != new.get(key)]
        if differing:
            key = differing[0]
            raise UserError(
                f"cannot resume {self.path}: {key} was {old.get(key)!r} and is now {new.get(key)!r}: "
                "give the same settings, or another folder"
            )


def environment() -> dict[str, Any]:
    """What a reader needs to repeat the run: command, versions, git commit, platform."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "git": _git_commit(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": versions,
    }


def peak_memory_bytes() -> int:
    """Peak resident memory of this process (Linux counts in KiB, macOS in bytes)."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes() -> int:
    """Resident memory of this process now; where the system does not tell, its peak."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return peak_memory_bytes()
    return pages * os.sysconf("SC_PAGE_SIZE")


def _git_commit() -> str | None:
    try:
        here = Path(__file__).resolve().parent
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
        return done.stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        out: dict[str, Any] = {}
        for key, item in value.items():
            out.update(_flat(item, f"{prefix}.{key}" if prefix else str(key)))
        return out
    return {prefix: value}


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
