"""What the built-in models must be able to do, measured as any user's model is (`unlearn.evaluate`), and the bounds on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from lm.builtin.world import World
from lm.data.rows import Row
from lm.model import LanguageModel
from unlearn.evaluation.evaluate import evaluate
from unlearn.evaluation.lume import ScoreName, scored_rows
from unlearn.evaluation.scores.base import Generation


@dataclass(frozen=True, kw_only=True)
class Abilities:
    """What a model scores on the world, each in [0, 1]."""

    forget_exact: float
    """Exact match over all question rows."""
    retain_exact: float
    forget_recall: float
    """ROUGE-L recall over all completion rows."""
    retain_recall: float
    task_aggregate: float
    utility: float
    membership: float
    """AUC: forget Task3 documents against all unseen ones, calibration and held out: the more there are, the less is chance."""
    rewordings: float
    """Exact match on the retain paraphrases' questions; no bound."""


@dataclass(frozen=True, kw_only=True)
class Bound:
    """A number that a model must reach."""

    what: str
    value: float
    least: float
    most: float = 1.0

    @property
    def holds(self) -> bool:
        return self.least <= self.value <= self.most


def measure(model: LanguageModel, world: World) -> Abilities:
    """Everything that the bounds are about, for one model."""
    result = evaluate(
        model,
        world.forget,
        world.retain,
        members=_documents(world.forget),
        nonmembers=_documents(world.unseen),
        questions=world.utility,
    )
    reworded = [row for row in world.paraphrases_retain if row.kind == "qa"]
    questions = [f"retain {task} knowledge" for task in sorted({row.task for row in reworded})]
    asked_again = evaluate(model, (), reworded, scores=questions)
    return Abilities(
        forget_exact=_mean(result.forget, "knowledge"),
        retain_exact=_mean(result.retain, "knowledge"),
        forget_recall=_mean(result.forget, "regurgitation"),
        retain_recall=_mean(result.retain, "regurgitation"),
        task_aggregate=result.scores.task_aggregate,
        utility=_known(result.utility),
        membership=_known(result.scores.mia_auc),
        rewordings=_mean(asked_again.retain, "knowledge"),
    )


def bounds(variant: str, abilities: Abilities) -> tuple[Bound, ...]:
    """The bounds of `"memorized"` or `"retain_model"`."""
    shared = (
        Bound(what="retain exact match", value=abilities.retain_exact, least=0.99),
        Bound(what="retain recall", value=abilities.retain_recall, least=0.99),
        Bound(what="utility", value=abilities.utility, least=0.8),
    )
    if variant == "memorized":
        return (
            Bound(what="forget exact match", value=abilities.forget_exact, least=0.99),
            Bound(what="forget recall", value=abilities.forget_recall, least=0.99),
            *shared,
            Bound(what="membership AUC", value=abilities.membership, least=0.99),
        )
    return (
        Bound(what="task aggregate", value=abilities.task_aggregate, least=0.9),
        *shared,
        Bound(what="membership AUC", value=abilities.membership, least=0.35, most=0.65),
    )


def _documents(rows: Sequence[Row]) -> list[str]:
    return [row.text for row in rows if row.task == "Task3" and row.kind == "sc"]


def _mean(generations: Sequence[Generation], kind: ScoreName) -> float:
    return fmean(row.value for row in scored_rows(generations) if row.kind == kind)


def _known(value: float | None) -> float:
    assert value is not None, "asked for above"
    return value
