"""How a process ends from outside: asked to (SIGTERM, as a scheduler does), or because the launcher that started it is gone."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

_GRACE = 10.0
"""Seconds that a process which was asked to end may take: it may be waiting, outside of Python, for another one."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, which is treated as Ctrl-C is."""


@contextlib.contextmanager
def asked_to_end() -> Iterator[None]:
    """Within it SIGTERM raises `Terminated`, and ends a process that does not come back to Python. In the main thread only."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    heard, told = socket.socketpair()
    told.setblocking(False)
    before = signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, _terminate)
    left = threading.Event()
    threading.Thread(target=_end_after_a_while, args=(heard, left), daemon=True).start()
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.set_wakeup_fd(before)
        told.close()
        left.set()


def _terminate(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough
    raise Terminated


def _end_after_a_while(heard: socket.socket, left: threading.Event) -> None:
    with heard:
        while said := heard.recv(64):
            if signal.SIGTERM in said and not left.wait(_GRACE):
                print("stopped: asked to end; finished work is kept", file=sys.stderr, flush=True)
                os._exit(143)


def end_with_launcher() -> None:
    """End this process, once begun by a launcher, when that is gone: nobody would end it, and its folder is needed."""
    launcher = os.getppid()
    if not _launched(launcher) or any(thread.name == end_with_launcher.__name__ for thread in threading.enumerate()):
        return
    threading.Thread(target=_watch, args=(launcher,), name=end_with_launcher.__name__, daemon=True).start()


def _launched(parent: int) -> bool:
    """Whether the parent is torch's or accelerate's launcher, and not a shell that may end before what it began."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return True
    try:
        words = Path(f"/proc/{parent}/cmdline").read_text(encoding="utf-8", errors="replace").split("\0")
    except OSError:
        return False
    return any(Path(word).name == "accelerate" or word.startswith("accelerate.commands") for word in words)


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(1.0)
    print("stopped: the launcher is gone; finished work is kept", file=sys.stderr, flush=True)
    os._exit(1)
