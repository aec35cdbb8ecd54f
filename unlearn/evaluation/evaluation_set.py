"""What a model is asked: rows, documents, questions; and whether that is enough for the scores that are wanted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from lm.data.rows import Question, Row
from lm.errors import UserError
from lm.row_files import check_disjoint
from sae.activations.sources import TextSource
from unlearn.evaluation.lm_eval_harness import check_tasks
from unlearn.evaluation.lume import check_words
from unlearn.evaluation.scores import chosen_scores
from unlearn.evaluation.scores.base import Losses, Need, Score, needs_of
from unlearn.evaluation.scores.lume import LumeTerm
from unlearn.evaluation.utility import Style
from unlearn.evaluation.word_overlap import Words
from unlearn.general_text import GeneralText

_GIVE = {
    "forget": "forget rows",
    "retain": "retain rows",
    "losses": "documents of members and non-members",
    "choices": "questions",
    "fluency": "an untouched model",
    "general": "general texts",
    "retain_losses": "losses of the retain model (retain_scores)",
}


@dataclass(frozen=True, kw_only=True)
class EvaluationSet:
    """What a model is asked. Membership and utility may be left out; then there is no final score.

    Attributes:
        forget, retain: rows to generate on; no id on both sides.
        members, nonmembers: whole documents the model was, and was not, trained on. Both or neither.
        questions: multiple-choice questions for utility.
        style: how they are asked (see `unlearn.evaluation.utility`).
        lm_eval: ask through lm-eval instead: the name of one of its tasks, or, with `questions`, any name at all.
        retain_losses: the losses of the same members and non-members under the retain model.
        untouched: whether an untouched model is at hand, to say how likely it finds the answers.
        general: text that has nothing to do with either side.
        words: what counts as a word of a completion (see `unlearn.evaluation.word_overlap`).
    """

    forget: tuple[Row, ...]
    retain: tuple[Row, ...]
    members: tuple[str, ...] = ()
    nonmembers: tuple[str, ...] = ()
    questions: tuple[Question, ...] = ()
    style: Style = "sentence"
    lm_eval: str | None = None
    retain_losses: Losses | None = None
    untouched: bool = False
    general: GeneralText = GeneralText()  # noqa: RUF009 (frozen)
    words: Words = "official"

    def __post_init__(self) -> None:
        check_disjoint(self.forget, self.retain)
        if bool(self.members) != bool(self.nonmembers):
            raise UserError("membership needs both members and non-members: give both, or neither")
        both = set(self.members) & set(self.nonmembers)
        if both:
            raise UserError(f'the document "{min(both)[:40]}..." is both a member and a non-member: take it out of one')
        if self.lm_eval is not None and self.questions and self.style != "sentence":
            raise UserError("questions go through lm-eval in sentence style only: set the style to sentence")
        self._check_retain_losses()

    @property
    def documents(self) -> str:
        """A digest of the members and the non-members, in their order: what the manifest of an evaluation holds."""
        return digest([self.members, self.nonmembers])

    def _check_retain_losses(self) -> None:
        losses = self.retain_losses
        if losses is None:
            return
        if not self.members:
            raise UserError("retain_scores says how the retain model fares on members and non-members: give those, too")
        counts, wanted = (len(losses.members), len(losses.nonmembers)), (len(self.members), len(self.nonmembers))
        if counts != wanted or losses.documents not in (None, self.documents):
            raise UserError(
                f"retain_scores holds losses of other documents ({counts[0]} members and {counts[1]} others; here are "
                f"{wanted[0]} and {wanted[1]}): evaluate the retain model on these members and nonmembers"
            )

    def gives(self, need: Need) -> bool:
        """Whether there is something to ask for this statistic."""
        if need == "losses":
            return bool(self.members)
        if need == "retain_losses":
            return self.retain_losses is not None
        if need == "fluency":
            return self.untouched
        if need == "general":
            return isinstance(self.general.source, TextSource)
        if need == "choices":
            return bool(self.questions) or self.lm_eval is not None
        return True

    def askable(self, scores: Sequence[str | Score] | None) -> tuple[Score, ...]:
        """These scores with their parts, once it is clear that this set gives what they need and holds rows they can read.

        Raises:
            UserError: an unknown score, one that was asked for and needs what is not given, or rows that one cannot read.
        """
        wanted = chosen_scores(scores)
        for score in wanted if scores is not None else ():
            if missing := [_GIVE[need] for need in score.needs if not self.gives(need)]:
                raise UserError(
                    f"the score {score.name} needs {missing[0]} and there are none: give some, or leave it out"
                )
        for check in {type(score): score for score in wanted}.values():
            check.check_rows((*self.forget, *self.retain))
        if any(isinstance(score, LumeTerm) for score in wanted):
            check_words((*self.forget, *self.retain), self.words)
        return wanted

    def check_harness(self, scores: Sequence[Score]) -> None:
        """Refuse an lm-eval task that these scores need and that is unknown, or whose data cannot be had; it fetches them."""
        if self.lm_eval is not None and not self.questions and any("choices" in needs_of(score) for score in scores):
            check_tasks([self.lm_eval])


def digest(values: object) -> str:
    """sha256 of plain data."""
    return hashlib.sha256(json.dumps(values, ensure_ascii=False).encode()).hexdigest()
