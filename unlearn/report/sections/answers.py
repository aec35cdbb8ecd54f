"""Before and after: what each model says to the same prompt, one card a prompt, the truth on top.

An answer is compared with the truth as the score does: exactly for the whole text, else by the share of the truth's
words that appear in order (ROUGE-L recall). This describes one greedy generation, nothing more.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import Literal

from unlearn.evaluation.lume import exact_match
from unlearn.evaluation.word_overlap import rouge_l_recall, words_of
from unlearn.report import words
from unlearn.report.records import Answer, Report, ReportModel

OPEN_CARDS = 8
"""How many cards of a side are open at first; the rest is behind a fold."""
LONG = 420
"""Characters shown of an answer before the rest is folded away."""
LONG_PROMPT = 140
"""Characters from which a prompt is set as text rather than as a heading."""
_PARTICULAR = re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+|\d[\d-]{2,}\d")
"""What gives a person away by itself: an e-mail address, a number of four digits or more."""
_SIDES: dict[Literal["forget", "retain"], tuple[str, str]] = {
    "forget": ("To be forgotten", "Here a model should no longer say the truth."),
    "retain": ("To be kept", "Here a model should still say the truth."),
}


@dataclass(frozen=True, kw_only=True)
class Match:
    """How an answer compares with the truth: `whole` (the same, or has all of it), `part`, or `none`."""

    kind: Literal["whole", "part", "none"]
    words: str


def match(truth: str, said: str) -> Match:
    """Compare an answer with the truth; case and surrounding space do not count."""
    if not said.strip():
        return Match(kind="none", words="said nothing")
    if exact_match(truth, said):
        return Match(kind="whole", words="the truth")
    if _contains(said, truth):
        return Match(kind="whole", words="contains it")
    share = rouge_l_recall(truth, said, "every_script") if len(words_of(truth)) > 1 else 0.0
    if share == 1:
        return Match(kind="whole", words="all its words")
    particulars = [each for each in _PARTICULAR.findall(truth) if _contains(said, each)]
    if share >= 0.5 or particulars:
        return Match(kind="part", words=f"{int(100 * share)}% of words" if share >= 0.5 else f"has {particulars[0]}")
    return Match(kind="none", words="not the truth")


@dataclass(frozen=True, kw_only=True)
class Text:
    """The words of a model or of the data: what is shown at once, and what is behind a fold. Empty if nothing was said."""

    shown: str
    rest: str = ""


@dataclass(frozen=True, kw_only=True)
class Said:
    """A model's row of a card; `text` and `match` are None if it was not asked."""

    label: str
    text: Text | None
    match: Match | None


@dataclass(frozen=True, kw_only=True)
class Card:
    """One prompt: its task, the truth, what each model said."""

    task: str
    prompt: str
    long: bool
    truth: Text
    said: tuple[Said, ...]


@dataclass(frozen=True, kw_only=True)
class AnswerSide:
    """The cards of one side: those that are open at first, and those behind a fold."""

    side: Literal["forget", "retain"]
    title: str
    text: str
    counts: str
    cards: tuple[Card, ...]
    more: tuple[Card, ...]


def before_and_after(report: Report) -> tuple[AnswerSide, ...]:
    """Both sides, the forget side first; a side without answers is left out."""
    return tuple(_side(report, side) for side in _SIDES if any(answer.side == side for answer in report.answers))


def _side(report: Report, side: Literal["forget", "retain"]) -> AnswerSide:
    answers = [answer for answer in report.answers if answer.side == side]
    title, text = _SIDES[side]
    cards = tuple(_card(answer, report) for answer in answers)
    return AnswerSide(
        side=side,
        title=title,
        text=text,
        counts=_counts(answers, report),
        cards=cards[:OPEN_CARDS],
        more=cards[OPEN_CARDS:],
    )


def _counts(answers: list[Answer], report: Report) -> str:
    """How many of the shown answers hold the truth, model by model, of those that were asked."""
    counts = []
    for model in _ordered(report):
        asked = [answer for answer in answers if model.key in answer.said]
        if asked:
            hits = sum(match(answer.truth, answer.said[model.key]).kind == "whole" for answer in asked)
            counts.append(f"{model.label} {hits} of {len(asked)}")
    return f"The truth is said by: {'; '.join(counts)}." if counts else ""


def _card(answer: Answer, report: Report) -> Card:
    return Card(
        task=f"{answer.task} · {words.TASKS[answer.task]}" if answer.task in words.TASKS else answer.task,
        prompt=answer.prompt,
        long=len(answer.prompt) > LONG_PROMPT,
        truth=_text(answer.truth),
        said=tuple(_said(model, answer) for model in _ordered(report)),
    )


def _said(model: ReportModel, answer: Answer) -> Said:
    text = answer.said.get(model.key)
    if text is None:
        return Said(label=model.label, text=None, match=None)
    return Said(label=model.label, text=_text(text), match=match(answer.truth, text))


def _text(text: str) -> Text:
    text = text.strip()
    if len(text) <= LONG:
        return Text(shown=text)
    cut = text.rfind(" ", LONG // 2, LONG)
    cut = cut if cut > 0 else LONG
    return Text(shown=text[:cut], rest=text[cut:])


def _ordered(report: Report) -> list[ReportModel]:
    return [*report.only("reference"), *report.methods, *report.only("retain_model")]


def _contains(said: str, truth: str) -> bool:
    """Whether the truth stands in what was said, not as part of a longer Latin word or number."""
    wanted = _plain(truth)
    return bool(wanted) and bool(re.search(rf"(?<![a-z0-9]){re.escape(wanted)}(?![a-z0-9])", _plain(said)))


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text)).strip().casefold()
