"""Finished facts on disk, so that an interrupted trace goes on where it stopped.

One `.npz` a fact, named by a hash of everything its numbers depend on: the weights, the tokens, the noise, the sweep.
A file that cannot be read counts as absent.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from lm.run import write_atomic
from tracing.arrays import pack
from tracing.corruption import Corruptor
from tracing.probe import Probe
from tracing.reference import Traced
from tracing.sweep import Sweep


class FactCache:
    """Traced facts in a folder; None as a folder remembers nothing."""

    def __init__(self, folder: Path | None, model: str, corruptor: Corruptor, sweep: Sweep, engine: str) -> None:
        self.folder, self._corruptor = folder, corruptor
        self._run = json.dumps([model, asdict(sweep), engine], sort_keys=True)

    def load(self, probe: Probe) -> Traced | None:
        """The stored cells of a fact, or None."""
        if self.folder is None:
            return None
        try:
            with np.load(self._path(self.folder, probe), allow_pickle=False) as stored:
                kinds = [name for name in stored.files if name not in ("clean", "corrupted")]
                return Traced(
                    clean=float(stored["clean"]),
                    corrupted=float(stored["corrupted"]),
                    restored={kind: stored[kind] for kind in kinds},
                )
        except Exception:  # absent, cut short, or not ours: compute it again
            return None

    def store(self, probe: Probe, traced: Traced) -> None:
        """Keep the cells of a fact, atomically."""
        if self.folder is None:
            return
        scores = {"clean": np.array(traced.clean), "corrupted": np.array(traced.corrupted)}
        cells = {str(kind): array for kind, array in traced.restored.items()}
        write_atomic(self._path(self.folder, probe), pack(scores | cells))

    def _path(self, folder: Path, probe: Probe) -> Path:
        fact = [probe.prompt_ids, probe.answer_ids, probe.span, probe.foil, probe.counted]
        asked = json.dumps([*fact, self._corruptor.key(probe), self._run])
        return folder / f"{hashlib.sha256(asked.encode()).hexdigest()[:32]}.npz"
