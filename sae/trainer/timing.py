"""Where a training step's time goes: model forward, the rest of harvesting, encode, select, decode, loss, backward, optimizer.

On an accelerator a phase ends when its kernels do, so there the clock waits for them, and only at steps it is told to.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

Phase = Literal["forward", "harvest", "encode", "select", "decode", "loss", "backward", "optimizer"]


class Phases:
    """Adds up seconds by phase. `sum(mean().values())` is the time of a step but for what is outside all phases."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[str, float] = {}
        self._steps = 0
        self._since: float | None = None
        self.on = True

    def begin(self, *, on: bool) -> None:
        """A new step; its time counts if `on` (always, where measuring costs nothing)."""
        self.on = on or self._device.type == "cpu"
        self._steps += self.on

    def start(self) -> None:
        """What is done until the next `stop` belongs to the phase that is named there."""
        if self.on:
            self._since = self._now()

    def stop(self, phase: Phase) -> None:
        """The time since the last `start` or `stop` went to this phase."""
        if self.on and self._since is not None:
            now = self._now()
            self._seconds[phase] = self._seconds.get(phase, 0.0) + now - self._since
            self._since = now

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """A block that belongs to one phase."""
        self.start()
        yield
        self.stop(phase)

    def move(self, seconds: float, source: Phase, to: Phase) -> None:
        """Count some of the seconds of a phase for another one."""
        if self.on and seconds:
            self._seconds[source] = self._seconds.get(source, 0.0) - seconds
            self._seconds[to] = self._seconds.get(to, 0.0) + seconds

    def take(self) -> dict[str, float]:
        """Mean milliseconds a measured step of each phase since the last call, which starts anew."""
        means = {phase: 1e3 * seconds / max(self._steps, 1) for phase, seconds in self._seconds.items()}
        self._seconds, self._steps = {}, 0
        return means

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
