"""Finished facts on disk, so that an interrupted trace goes on where it stopped.

One `.npz` a fact, named by a hash of everything its numbers depend on: the weights, the tokens, the noise, the sweep.
A file that cannot be read counts as absent. Every metric has a file of its own, whichever others were read off with it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from lm.run_folder import write_atomic
from tracing.arrays import pack
from tracing.corruption.noise import Corruptor
from tracing.engine.reference import Traced
from tracing.question.encoded_fact import EncodedFact
from tracing.question.metrics import MetricName, metric_of
from tracing.question.sweep import Sweep


class FactCache:
    """Traced facts in a folder; None as a folder remembers nothing."""

    def __init__(self, folder: Path | None, model: str, corruptor: Corruptor, sweep: Sweep, engine: str) -> None:
        self.folder, self._corruptor = folder, corruptor
        self._sweep, self._model, self._engine = sweep, model, engine

    def load(self, encoded: EncodedFact) -> Traced | None:
        """The stored cells of a fact by every metric of the sweep, or None."""
        found = {metric: self._load(encoded, metric) for metric in self._sweep.metrics}
        there = {metric: one for metric, one in found.items() if one is not None}
        if len(there) < len(found):
            return None
        return replace(there.pop(self._sweep.metric), also=there)

    def store(self, encoded: EncodedFact, traced: Traced) -> None:
        """Keep the cells of a fact, atomically."""
        for metric, one in {self._sweep.metric: traced, **traced.also}.items():
            self._store(encoded, metric, one)

    def _load(self, encoded: EncodedFact, metric: MetricName) -> Traced | None:
        if self.folder is None:
            return None
        try:
            with np.load(self._path(self.folder, encoded, metric), allow_pickle=False) as stored:
                kinds = [name for name in stored.files if name not in ("clean", "corrupted")]
                return Traced(
                    clean=float(stored["clean"]),
                    corrupted=float(stored["corrupted"]),
                    restored={kind: stored[kind] for kind in kinds},
                )
        except Exception:  # absent, cut short, or not ours: compute it again
            return None

    def _store(self, encoded: EncodedFact, metric: MetricName, traced: Traced) -> None:
        if self.folder is None:
            return
        scores = {"clean": np.array(traced.clean), "corrupted": np.array(traced.corrupted)}
        cells = {str(kind): array for kind, array in traced.restored.items()}
        write_atomic(self._path(self.folder, encoded, metric), pack(scores | cells))

    def _path(self, folder: Path, encoded: EncodedFact, metric: MetricName) -> Path:
        sweep = asdict(replace(self._sweep, metric=metric, also=()))
        del sweep["also"]
        run = json.dumps([self._model, sweep, self._engine], sort_keys=True)
        counted = encoded.counted if metric_of(metric).counts_words else None
        fact = [encoded.prompt_ids, encoded.answer_ids, encoded.span, encoded.foil, counted]
        asked = json.dumps([*fact, self._corruptor.key(encoded), run])
        return folder / f"{hashlib.sha256(asked.encode()).hexdigest()[:32]}.npz"
