"""The evaluation scores: a file a family, a class a score. `known_scores` finds them, `chosen_scores` picks by name."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence

from lm.errors import UserError, did_you_mean
from lm.old_configs import subclasses
from unlearn.evaluation.scores.base import Score, Statistics, with_parts

__all__ = ["Score", "Statistics", "chosen_scores", "known_scores", "room_scores"]


def known_scores() -> dict[str, Score]:
    """Every score by name: those of this room's files in the files' order, then those of any other class that is imported."""
    modules = [module.name for module in pkgutil.iter_modules(__path__, prefix=f"{__name__}.")]
    for name in modules:
        importlib.import_module(name)
    place = {name: at for at, name in enumerate(modules)}  # what happens to be imported first must not order them
    classes = sorted(subclasses(Score).values(), key=lambda cls: place.get(cls.__module__, len(modules)))
    return {score.name: score for cls in classes for score in cls.all()}


def room_scores() -> tuple[Score, ...]:
    """The scores of this room's files: those an evaluation computes when it is not told which."""
    return tuple(score for score in known_scores().values() if type(score).__module__.startswith(f"{__name__}."))


def chosen_scores(scores: Sequence[str | Score] | None) -> tuple[Score, ...]:
    """These scores, by name or as objects, and all that they are made of, parts first; None takes all of this room.

    Raises:
        UserError: no score has such a name, or two have the same.
    """
    if scores is None:
        return with_parts(room_scores())
    known = known_scores()
    picked = []
    for score in scores:
        if isinstance(score, str):
            if score not in known:
                raise UserError(
                    f"there is no score {score!r}{did_you_mean(score, known)}: use some of {', '.join(known)}"
                )
            score = known[score]  # noqa: PLW2901
        picked.append(score)
    expanded = with_parts(picked)
    names = [score.name for score in expanded]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{names.count(name)} of the scores are named {name!r}: name each once")
    return expanded
