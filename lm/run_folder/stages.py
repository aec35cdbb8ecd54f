"""What a stage owes the folders that it begins: they are its own while it runs, and none is left behind if nothing came of it.

A folder is locked by `.lock` in it, which names the process and its host. The system gives the lock back when that process is
gone, however it ended; between hosts, where not every file system tells, the file is touched now and then as a sign of life.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import ParamSpec, TypeVar

from lm.errors import UserError
from lm.run_folder.files import writable

P = ParamSpec("P")
T = TypeVar("T")

LOCK = ".lock"
_OF_A_BEGINNING = ("config.yaml", "manifest.json", LOCK)
_PATIENCE = 3.0
"""Seconds in which a process that is ending may leave a folder."""
_BEAT, _DEAD = 20.0, 180.0
"""Seconds between two signs of life, and after which a process on another host counts as gone."""


@dataclass(frozen=True)
class _Folder:
    """A folder that a stage holds: what was in it before, and the outermost folder that was made for it."""

    path: Path
    before: frozenset[Path]
    made: Path | None
    lock: int | None
    released: threading.Event = field(default_factory=threading.Event)

    def drop_if_bare(self) -> None:
        """Take the beginning of a run away if nothing else came of it."""
        new = {path for path in self.path.rglob("*") if not path.is_dir()} - self.before
        if not new or any(path.parent != self.path or path.name not in _OF_A_BEGINNING for path in new):
            return
        if "finished" in _read(self.path / "manifest.json"):
            return
        for path in new:
            path.unlink(missing_ok=True)
        if self.made is not None:
            inside = sorted(self.path.rglob("*"), reverse=True)
            with suppress(OSError):  # one that is not empty is someone else's
                for folder in [*inside, self.path, *self.path.parents]:
                    folder.rmdir()
                    if folder == self.made:
                        break

    def release(self) -> None:
        """Let others have it."""
        self.released.set()
        if self.lock is not None:
            (self.path / LOCK).unlink(missing_ok=True)
            os.close(self.lock)


_held: ContextVar[tuple[dict[Path, _Folder], ...]] = ContextVar("held", default=())
"""What each of the stages that are running here, from the outermost to the innermost, holds."""


def stage(function: Callable[P, T]) -> Callable[P, T]:
    """A stage: folders that it begins (`RunFolder.create`, `hold`) are locked until it ends, by whatever way.

    If it ends by an error before anything but config and manifest was written, it leaves no folder behind.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with _holding():
            return function(*args, **kwargs)

    return run


def hold(folder: Path) -> None:
    """Lock a folder, made if need be, for the stage that is running; outside of one, do nothing.

    Raises:
        UserError: another process holds it, or it cannot be made.
    """
    path, stages = folder.absolute(), _held.get()
    if not stages or any(path in held for held in stages):
        return
    before = frozenset(inside for inside in path.rglob("*") if not inside.is_dir())
    made = next((parent for parent in reversed([path, *path.parents]) if not parent.exists()), None)
    with writable(folder):
        path.mkdir(parents=True, exist_ok=True)
        lock = _locked(path, folder)
    stages[-1][path] = held = _Folder(path, before - {path / LOCK}, made, lock)
    if lock is not None:
        threading.Thread(target=_give_signs_of_life, args=(held,), daemon=True).start()


@contextmanager
def _holding() -> Iterator[None]:
    held: dict[Path, _Folder] = {}
    token = _held.set((*_held.get(), held))
    try:
        yield
    except BaseException:
        for folder in reversed(held.values()):
            with suppress(OSError):
                folder.drop_if_bare()
        raise
    finally:
        _held.reset(token)
        for folder in reversed(held.values()):
            folder.release()


def _locked(path: Path, named: Path) -> int | None:
    """The lock of a folder; None where nothing may be written, so that nothing is in danger."""
    until = time.monotonic() + _PATIENCE
    while True:
        try:
            handle = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
                return None
            raise
        owner, age = _read(path / LOCK), time.time() - os.fstat(handle).st_mtime
        if _granted(handle, path / LOCK, owner) and (owner.get("host", _host()) == _host() or age > _DEAD):
            os.ftruncate(handle, 0)
            os.write(handle, json.dumps({"pid": os.getpid(), "host": _host(), "since": time.ctime()}).encode())
            return handle
        os.close(handle)
        if time.monotonic() > until:
            who = f"process {owner.get('pid', 'unknown')} on {owner.get('host', 'an unknown host')}"
            raise UserError(
                f"the folder {named} is in use by {who}, since {owner.get('since', 'a moment ago')}: wait until that ends, or "
                f"give another folder (if it is gone, the folder is free again after {_DEAD:.0f} seconds)"
            )
        time.sleep(0.1)


def _granted(handle: int, path: Path, owner: dict[str, object]) -> bool:
    """Whether the system gives this process the lock, on the file that has the name (one that was let go has lost it)."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: what the file says must do
        pid = owner.get("pid")
        return not isinstance(pid, int) or owner.get("host") != _host() or not _alive(pid)
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(handle), path.stat())
    return False


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _give_signs_of_life(held: _Folder) -> None:
    while not held.released.wait(_BEAT):
        with suppress(OSError):
            os.utime(held.path / LOCK)


def _read(path: Path) -> dict[str, object]:
    """A JSON object; nothing if there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _host() -> str:
    return socket.gethostname()
