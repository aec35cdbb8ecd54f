"""Before and after: what each model says to the same prompt, one card a prompt, the truth on top.

An answer is compared with the truth as the score does: exactly for the whole text, else by the share of the truth's
words that appear in order (ROUGE-L recall). This describes one greedy generation, nothing more.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import Literal

from unlearn.evaluation.lume import exact_match, rouge_l_recall
from unlearn.report import words
from unlearn.report.markup import Html, el, join
from unlearn.report.records import Answer, Report, ReportModel

OPEN_CARDS = 8
"""How many cards of a side are open at first; the rest is behind a fold."""
LONG = 420
"""Characters shown of an answer before the rest is folded away."""
LONG_PROMPT = 140
"""Characters from which a prompt is set as text rather than as a heading."""
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
    share = rouge_l_recall(truth, said) if _readable(truth) else 0.0
    if share == 1:
        return Match(kind="whole", words="all its words")
    if share >= 0.5:
        return Match(kind="part", words=f"{int(100 * share)}% of words")
    return Match(kind="none", words="not the truth")


def before_and_after(report: Report) -> Html:
    """Both sides, the forget side first."""
    return join(*(_side(report, side) for side in _SIDES))


def _side(report: Report, side: Literal["forget", "retain"]) -> Html | None:
    answers = [answer for answer in report.answers if answer.side == side]
    if not answers:
        return None
    title, text = _SIDES[side]
    cards = [_card(answer, report) for answer in answers]
    counts = _counts(answers, report)
    parts = [el("h3", title), el("p", text, " ", counts), el("div", cards[:OPEN_CARDS], class_="cards")]
    if len(cards) > OPEN_CARDS:
        more = el("summary", f"{len(cards) - OPEN_CARDS} more")
        parts.append(el("details", more, el("div", cards[OPEN_CARDS:], class_="cards")))
    return el("section", parts, class_=f"side {side}")


def _counts(answers: list[Answer], report: Report) -> str | None:
    """How many of the shown answers hold the truth, model by model, of those that were asked."""
    said = []
    for model in _ordered(report):
        asked = [answer for answer in answers if model.key in answer.said]
        if asked:
            hits = sum(match(answer.truth, answer.said[model.key]).kind == "whole" for answer in asked)
            said.append(f"{model.label} {hits} of {len(asked)}")
    return f"The truth is said by: {'; '.join(said)}." if said else None


def _card(answer: Answer, report: Report) -> Html:
    rows = [el("tr", el("th", "Truth", scope="row"), _text(answer.truth, span=2), class_="truth")]
    rows += [_row(model, answer) for model in _ordered(report)]
    task = f"{answer.task} · {words.TASKS[answer.task]}" if answer.task in words.TASKS else answer.task
    kind = "prompt long" if len(answer.prompt) > LONG_PROMPT else "prompt"
    caption = el("caption", el("small", task), el("span", answer.prompt, dir="auto", class_=kind))
    columns = el("colgroup", el("col", class_="who"), el("col"), el("col", class_="kind"))
    return el("div", el("table", caption, columns, el("tbody", rows), class_="card"), class_="item")


def _row(model: ReportModel, answer: Answer) -> Html:
    head = el("th", el("bdi", model.label), scope="row")
    if model.key not in answer.said:
        return el("tr", head, el("td", el("i", "(not asked)"), class_="said none", colspan=2))
    said = answer.said[model.key]
    found = match(answer.truth, said)
    return el("tr", head, _text(said), el("td", found.words, class_="found"), class_=f"match-{found.kind}")


def _text(said: str, *, span: int | None = None) -> Html:
    """The words of a model or of the data: their own direction, long ones folded."""
    text = said.strip()
    if not text:
        return el("td", el("i", "(nothing)"), class_="said none", colspan=span)
    if len(text) <= LONG:
        return el("td", el("span", text), dir="auto", class_="said", colspan=span)
    cut = text.rfind(" ", LONG // 2, LONG)
    cut = cut if cut > 0 else LONG
    rest = el("details", el("summary", f"{len(text) - cut} more characters"), el("span", text[cut:]))
    return el("td", el("span", text[:cut]), rest, dir="auto", class_="said", colspan=span)


def _ordered(report: Report) -> list[ReportModel]:
    return [*report.only("base"), *report.methods, *report.only("twin")]


def _contains(said: str, truth: str) -> bool:
    """Whether the truth stands in what was said, not as part of a longer Latin word or number."""
    wanted = _plain(truth)
    return bool(wanted) and bool(re.search(rf"(?<![a-z0-9]){re.escape(wanted)}(?![a-z0-9])", _plain(said)))


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text)).strip().casefold()


def _readable(truth: str) -> bool:
    """Whether the word score can see the truth: it knows only Latin letters and digits."""
    return len(re.findall(r"[a-z0-9]+", truth.casefold())) > 1
