"""What an evaluation comes to: scores by name, the same example by example, and all that they were computed from."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lm.errors import UserError
from unlearn.evaluation import lume
from unlearn.evaluation.scores.base import Generation, Losses, Statistics

MEASURES = ("task_aggregate", "mia_auc", "mia_score", "utility", "final")
"""The keys beside `terms` that scores.json always has."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Evaluation:
    """The result, with what it was computed from.

    Attributes:
        values: the name of a score -> its value; None where it does not apply or something it needs was not asked.
        examples: the name of a score -> id of a row, document or question -> its number; only scores that have such numbers.
        statistics: the generations, losses and choices behind them.
        seconds: time spent on each part (`forget`, `retain`, `membership`, `utility`, `fluency`).
    """

    values: Mapping[str, float | None]
    examples: Mapping[str, Mapping[str, float]]
    statistics: Statistics
    seconds: Mapping[str, float]

    @property
    def scores(self) -> lume.LumeScores:
        """The official scores; `final` has `utility` in the place of MMLU. NaN for those that were not computed."""
        terms = [self.values.get(name) for name in lume.TERMS]
        aggregate = self.values.get("task_aggregate")
        return lume.LumeScores(
            terms=tuple(math.nan if term is None else term for term in terms),
            applies=tuple(term is not None for term in terms),
            task_aggregate=math.nan if aggregate is None else aggregate,
            mia_auc=self.values.get("mia_auc"),
            mia=self.values.get("mia_score"),
            mmlu=self.utility,
            final=self.values.get("final"),
        )

    @property
    def utility(self) -> float | None:
        """Accuracy, or None if no question was asked."""
        return self.values.get("utility")

    @property
    def others(self) -> tuple[str, ...]:
        """The names of the scores beside the official ones, those that have a value."""
        official = (*lume.TERMS, *MEASURES)
        return tuple(name for name, value in self.values.items() if name not in official and value is not None)

    @property
    def forget(self) -> tuple[Generation, ...]:
        """The generations of the forget rows, in their order; empty if no score needed them."""
        return self.statistics.forget or ()

    @property
    def retain(self) -> tuple[Generation, ...]:
        """The generations of the retain rows."""
        return self.statistics.retain or ()

    @property
    def member_losses(self) -> tuple[float, ...]:
        """Mean token loss of each member document, in nats; empty if there were none."""
        return self.statistics.losses.members if self.statistics.losses is not None else ()

    @property
    def nonmember_losses(self) -> tuple[float, ...]:
        """Likewise of each document that the model was not trained on."""
        return self.statistics.losses.nonmembers if self.statistics.losses is not None else ()

    def to_json(self) -> dict[str, object]:
        """The numbers alone: `terms` (the twelve, null where one does not apply), `task_aggregate`, `mia_auc`, `mia_score`,
        `utility`, `final` (null if not everything was given), any other score that has a value under its name, `words` if
        they are not the official ones, `truncated_questions` if there are any, `seconds` (of all parts)."""
        others = {name: self.values[name] for name in self.others}
        choices = self.statistics.choices
        return {
            "terms": [self.values.get(name) for name in lume.TERMS],
            **{name: self.values.get(name) for name in MEASURES},
            **others,
            **({"words": self.statistics.words} if self.statistics.words != "official" else {}),
            **({"truncated_questions": choices.truncated} if choices is not None and choices.truncated else {}),
            "seconds": round(sum(self.seconds.values()), 3),
        }

    def __repr__(self) -> str:
        named = [name for name in (*MEASURES, *self.values) if name in self.values and name not in lume.TERMS]
        known = [f"{name} {value:.4f}" for name in dict.fromkeys(named) if (value := self.values[name]) is not None]
        return f"Evaluation({', '.join([*known, f'{len(self.forget)} forget and {len(self.retain)} retain rows'])})"


def finished_losses(folder: str | Path) -> Losses:
    """The losses that a finished evaluation left in its run folder, with the digest of the documents that they are of.

    Raises:
        UserError: there is no such folder, its evaluation has not ended, had no membership documents, or does not say which.
    """
    path = Path(folder)
    if not path.is_dir():
        raise UserError(f"retain_scores names the folder {folder}, which does not exist: check the path")
    if not (path / "scores.json").exists():
        raise UserError(f"retain_scores names {folder}, which holds no finished evaluation: give the run folder of one")
    if not (path / "membership.json").exists():
        raise UserError(
            f"the evaluation in {folder} has no losses: evaluate the retain model with members and nonmembers"
        )
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    documents = (manifest.get("data") or {}).get("documents")
    if documents is None:
        raise UserError(f"the evaluation in {folder} does not say of which documents its losses are: run it again")
    members, others = json.loads((path / "membership.json").read_text(encoding="utf-8"))
    return Losses(members=tuple(members), nonmembers=tuple(others), documents=documents)
