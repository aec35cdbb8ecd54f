"""What one finished run of a search came to, read from its folder, and whether the folder is still what was recorded.

A row of the table stands on files: config, manifest and scores. Their hashes are kept when a run ends; a row whose files
are missing, or are others now, is refused.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lm.errors import UserError
from unlearn.evaluation.lume import TERMS
from unlearn.search.config import Keeping, Quality, Value
from unlearn.search.plan import SCORES

_TRAINED = ("config.yaml", "manifest.json")
_SCORED = tuple(f"{SCORES}/{name}" for name in ("config.yaml", "manifest.json", "scores.json"))


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One run's numbers, and the files that they are from.

    Attributes:
        folder: inside the search's.
        quality: how well the forget rows are forgotten, in [0, 1].
        utility: what the budget is counted in, in [0, 1].
        task_aggregate: the official harmonic mean of all terms.
        seconds: of training; 0 for a model that was only scored.
        tokens: that went through the model in training, prompt and answer.
        peak_bytes: the training process's largest memory, on the GPU if there was one, else resident.
        made_from: hash of the rows and the weights that training began with; empty for a model that was only scored.
        scored_on: hash of the rows, documents and questions that it was scored on.
        files: name in the folder -> SHA-256.
    """

    folder: str
    quality: float
    utility: float
    task_aggregate: float
    seconds: float
    tokens: int
    peak_bytes: int
    made_from: str
    scored_on: str
    files: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A finished run: what was tried in it, and what it came to, or in a sentence why it failed."""

    params: dict[str, Value] = field(default_factory=dict)
    scored: Scored | None = None
    failed: str | None = None


@dataclass(frozen=True)
class Measures:
    """Which of an evaluation's numbers are the two that a search looks at."""

    quality: Quality
    keeping: Keeping

    def of(self, scores: Mapping[str, Any]) -> tuple[float, float]:
        """(quality, utility) from the content of `scores.json`. Raises UserError where the rows bear on no such term."""
        return (
            float(scores["task_aggregate"]) if self.quality == "task_aggregate" else _mean(scores["terms"], "forget"),
            float(scores["utility"]) if self.keeping == "utility" else _mean(scores["terms"], "retain"),
        )


def read_scored(out: Path, folder: str, measures: Measures) -> Scored:
    """A finished run, from its files. Raises UserError if one of them is missing."""
    trained = (out / folder / "config.yaml").exists()
    names = (*_TRAINED, *_SCORED) if trained else _SCORED
    files = {name: _digest(out / folder / name) for name in names}
    scores, scoring = (_json(out / folder / SCORES / name) for name in ("scores.json", "manifest.json"))
    training = _json(out / folder / "manifest.json") if trained else {}
    quality, utility = measures.of(scores)
    return Scored(
        folder=folder,
        quality=quality,
        utility=utility,
        task_aggregate=float(scores["task_aggregate"]),
        seconds=float(training.get("train_seconds", 0.0)),
        tokens=int(training.get("tokens", 0)),
        peak_bytes=int(training.get("peak_gpu_bytes") or training.get("peak_memory_bytes", 0)),
        made_from=_hash(_origin(training)) if trained else "",
        scored_on=_hash(scoring["data"]),
        files=files,
    )


def _origin(training: Mapping[str, Any]) -> list[Any]:
    """Rows and weights that a run began with. Alternates are not rows: each method has its own, or none."""
    return [{side: hashed for side, hashed in training["data"].items() if side != "alternates"}, training["weights"]]


def check_runs(out: Path, runs: Sequence[Scored], measures: Measures) -> None:
    """Refuse runs that are not what they were when they ended, or that are not comparable.

    Raises:
        UserError: a file is missing or altered, a recorded number is not the file's, or two runs were made from other rows.
    """
    for known in runs:
        for name, digest in known.files.items():
            if _digest(out / known.folder / name) != digest:
                raise UserError(
                    f"{out / known.folder / name} is not the file that was recorded when its run ended: no row is shown for "
                    "it; put that file back, or search again in a new folder"
                )
        if read_scored(out, known.folder, measures) != known:
            raise UserError(
                f"the numbers recorded for {out / known.folder} are not those of its files: search again in a new folder"
            )
    for known in runs:
        first = next(run for run in runs if bool(run.made_from) is bool(known.made_from))
        if (known.made_from, known.scored_on) != (first.made_from, runs[0].scored_on):
            raise UserError(
                f"{out / known.folder} was made from or scored on other rows or weights than the runs before it: the content "
                "behind a name changed, and they cannot be compared; search again in a new folder"
            )


def _mean(terms: Sequence[float | None], side: str) -> float:
    present = [term for name, term in zip(TERMS, terms, strict=True) if name.startswith(side) and term is not None]
    if not present:
        raise UserError(f"no row bears on a {side} term, so there is nothing to search by: give {side} rows to score")
    return statistics.fmean(present)


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing: no row is shown for a run without it; put it back, or search again in a new folder"
        ) from None


def _hash(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
