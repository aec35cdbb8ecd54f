"""Files that are whole or not there: written aside, forced to the disk, moved into place, and known again by their digests.

A folder of files that belong together (a checkpoint, an exported model) is sealed before it gets its name: `SHA256SUMS` lists
each file with its digest, as `sha256sum -c` reads it. Folders from before there were digests are opened and read instead.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lm.errors import NotWritten

SUMS = "SHA256SUMS"
_LEFTOVER = re.compile(r"\..+?(\.\d+)?\.(?P<kind>tmp|old)")
"""A name of something while it was written (`.NAME.PID.tmp`, `.NAME.tmp`), or while another took its place (`.NAME.old`)."""


@contextmanager
def writable(path: Path) -> Iterator[None]:
    """Turn a full disk, a read-only folder or a missing right into one sentence about `path`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        again = "give the same command again, with --resume true if it has that setting"
        reasons = {
            errno.ENOSPC: f"the disk is full: free some room and {again}",
            errno.EFBIG: "the file would be larger than files may be here (ulimit -f): raise the limit, or choose another folder",
            errno.EDQUOT: f"the disk quota is used up: free some room and {again}",
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


def write_atomic(path: Path, data: str | bytes, *, private: bool = False) -> None:
    """Write a whole file or nothing: a reader never sees half of it, also when the power fails.

    Args:
        private: for what holds people's data: no other user may read it. Else the umask decides.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writable(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                if private:
                    os.fchmod(file.fileno(), 0o600)
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any, *, private: bool = False) -> None:
    """`value` as indented JSON, atomically. `private` as for `write_atomic`."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=True) + "\n", private=private)


def seal(folder: Path) -> None:
    """List every file of a folder with its digest in `SHA256SUMS`, and have all of it on the disk.

    Weights get the rights that the umask leaves: safetensors writes them for their owner alone.
    """
    with writable(folder):
        lines = []
        for path in _files(folder):
            if path.suffix == ".safetensors":
                path.chmod(0o666 & ~_umask())
            lines.append(f"{_digest(path)}  {path.relative_to(folder).as_posix()}\n")
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        write_atomic(folder / SUMS, "".join(lines))
        for inside in folder.rglob("*"):
            if inside.is_dir():
                _sync_folder(inside)


def move(temporary: Path, final: Path) -> None:
    """Give a folder its name, in the place of one that has it already."""
    aside = final.with_name(f".{final.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    if final.exists():
        os.replace(final, aside)
    os.replace(temporary, final)
    _sync_folder(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def damage(folder: Path) -> str | None:
    """What is wrong with the files of a sealed folder, in a few words; None if all are as they were written.

    Of a folder without digests, tensors and JSON must be such as can be read at all.
    """
    if not (folder / SUMS).is_file():
        return next((problem for path in _files(folder) if (problem := _unreadable(path)) is not None), None)
    try:
        listed = [line.split("  ", 1) for line in (folder / SUMS).read_text(encoding="utf-8").splitlines()]
        for digest, name in listed:
            if not (folder / name).is_file():
                return f"{name} is missing"
            if _digest(folder / name) != digest:
                return f"{name} is not as it was written"
    except (OSError, ValueError) as error:
        return f"{SUMS} or a file that it lists cannot be read ({error})"
    return None


def sweep(folder: Path) -> None:
    """Clear away what killed processes left half written; no other process may be writing there.

    A folder that was set aside for one that never came gets its name back.
    """
    for path in sorted(folder.rglob(".*")):
        match = _LEFTOVER.fullmatch(path.name)
        if match is None or not path.exists():
            continue
        with suppress(OSError):
            final = path.with_name(path.name[1:-4])
            if match["kind"] == "old" and path.is_dir() and not final.exists():
                os.replace(path, final)
            elif path.is_dir():
                shutil.rmtree(path)
            elif match["kind"] == "tmp":
                path.unlink()


def is_leftover(name: str) -> bool:
    """Whether a name is that of something half written."""
    return _LEFTOVER.fullmatch(name) is not None


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SUMS)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unreadable(path: Path) -> str | None:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                pass
        elif path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        return f"{path.name} cannot be read ({error})"
    return None


def _umask() -> int:
    """The system tells it only by setting another."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """The names in a folder are on the disk too, where the file system can do that."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
