"""Whom is a question about? Names found by comparing rows, without a list of names and without a model.

What a name looks like is a guess from capitals; what decides is where it recurs. Making facts of it is `tracing.question.facts`.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from lm.data.rows import Row
from lm.errors import UserError

_WORD = re.compile(r"\w+(?:[-.'’]\w+)*")
_POSSESSIVE = re.compile(r"['’]s$")
_GAP = re.compile(r"\.? ")
_QUESTION_WORD = re.compile(
    r"(?:What|Who|Whom|Whose|Where|When|Which|Why|How|Is|Are|Was|Were|Did|Does|Do|Has|Can|In|On|At|For|The|A|Please)\b"
)
_LONGEST_NAME = 6  # words
_OFTEN = 4  # questions


def find_subjects(rows: Iterable[Row]) -> dict[str, str]:
    """The name each document is about, by document id; documents without a recognizable name are absent.

    A name is a run of at most six words that begins and ends with a capital (or with a letter of a script without
    case), stands in every question of the document and in its sentence-completion text where there is one, and does
    not stand in the questions of more than half of the documents (that would be the template). The longest such run
    wins; of equally long ones the first. Question words and runs that hold the answer do not count.
    """
    questions: dict[str, list[Row]] = defaultdict(list)
    texts: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        if row.kind == "qa":
            questions[row.document].append(row)
        elif row.kind == "sc":
            texts[row.document].append(row.text)
    candidates = {
        document: [
            run
            for run in _capital_runs(asked[0].input)
            if all(_occurs(run, other) for other in [*(q.input for q in asked[1:]), *texts[document]])
            and not any(_occurs(q.output, run) for q in asked)
        ]
        for document, asked in questions.items()
    }
    spread = Counter(run for runs in candidates.values() for run in set(runs))
    most = max(1, len(questions) // 2)
    found: dict[str, str] = {}
    for document, runs in candidates.items():
        own = [run for run in runs if spread[run] <= most]
        if own:
            found[document] = max(own, key=lambda run: (len(run.split()), len(run)))
    return found


def recurring_names(rows: Sequence[Row]) -> dict[str, str]:
    """The name each question is about, by row id, where no document says which questions belong together (as in TOFU).

    A name is a run of two to six words that begins and ends with a capital and stands in at least four questions but not in
    more than half of them, or is the one person whom most questions are about (`name_of_most`). Of a question's names the one
    in most questions wins; of those in equally many the longest. Questions that name nobody ("What is the full name of the
    author born in …?") are absent.

    Raises:
        UserError: words stand in most questions, and whether they are a person or the template cannot be told.
    """
    most = name_of_most(rows)
    runs = {row.id: [run for run in dict.fromkeys(_capital_runs(row.input)) if " " in run] for row in rows}
    spread = Counter(run for own in runs.values() for run in own)
    found: dict[str, str] = {}
    for row in rows:
        often = [run for run in runs[row.id] if _OFTEN <= spread[run] <= len(rows) // 2]
        if most is not None and _occurs(most, row.input) and not _occurs(row.output, most):
            found[row.id] = most
        elif names := [run for run in often if not _occurs(row.output, run)]:
            found[row.id] = max(names, key=lambda run: (spread[run], len(run.split()), len(run)))
    return found


def name_of_most(rows: Sequence[Row]) -> str | None:
    """The person whom more than half of the questions (and at least four) name, or None if these have nobody in common.

    Words that stand in most questions are a template's ("According to the City Register, …") where most of those questions name
    somebody else beside them. Where they name nobody else, the words are a person if what stands before and after them changes
    from question to question.

    Raises:
        UserError: it does not change, so that it cannot be told.
    """
    runs = {row.id: list(dict.fromkeys(_capital_runs(row.input))) for row in rows}
    spread = Counter(run for own in runs.values() for run in own)
    common = [run for run, count in spread.items() if count >= _OFTEN and 2 * count > len(rows)]
    for run in sorted(common, key=lambda run: (-(" " in run), -spread[run], -len(run))):
        naming = [row for row in rows if run in runs[row.id]]
        beside = [any(" " in other and not _overlap(run, other) for other in runs[row.id]) for row in naming]
        if 2 * sum(beside) > len(naming):
            continue
        around = Counter(_neighbors(run, row.input) for row in naming)
        if 2 * max(around.values()) > len(naming):
            raise UserError(
                f"{run!r} stands in {len(naming)} of {len(rows)} questions, always between the same words, so that it may be "
                "whom they are about or a part of the template: say how to find the subject with facts.subject (subject_of)"
            )
        return run
    return None


def _overlap(one: str, other: str) -> bool:
    return bool(set(_WORD.findall(one)) & set(_WORD.findall(other)))


def _neighbors(words: str, text: str) -> tuple[str, str]:
    """The word before and the word after some words of a text, in lower case; empty at its ends."""
    before, _, after = text.partition(words)
    earlier, later = _WORD.findall(before), _WORD.findall(re.sub(r"^['’]s\b", "", after))
    return earlier[-1].lower() if earlier else "", later[0].lower() if later else ""


def _occurs(words: str, text: str) -> bool:
    """Whether `words` stand in `text`, not as a part of longer words."""
    return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text) is not None


def _capital_runs(text: str) -> list[str]:
    """Every run of one to six words that could be a name, in order of appearance."""
    words: list[tuple[int, int, bool]] = []  # start, end, ends a run (possessive)
    for hit in _WORD.finditer(text):
        own = _POSSESSIVE.search(hit[0])
        words.append((hit.start(), hit.start() + own.start() if own else hit.end(), own is not None))
    runs = []
    for first in range(len(words)):
        for last in range(first, min(first + _LONGEST_NAME, len(words))):
            if last > first:
                gap = text[words[last - 1][1] : words[last][0]]
                if words[last - 1][2] or not _GAP.fullmatch(gap):
                    break
            start, end = words[first][0], words[last][1]
            head, tail = text[start], text[words[last][0]]
            if head.isalpha() and not head.islower() and tail.isalpha() and not tail.islower():
                runs.append(text[start:end])
    return [run for run in runs if not _QUESTION_WORD.match(run)]
