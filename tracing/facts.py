"""What is asked of the model: a prompt, the subject inside it, and the answer it must give.

Here facts are made: from LUME-style rows (whose person is found by comparing rows) and from the known-facts file that
causal tracing is usually run on. Whether a model knows a fact is decided in `tracing.probe`, not here.
"""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lm.errors import UserError
from lm.records import Record, find_files, read_file, text_column
from lm.rows import Row

SubjectOf = Callable[[Row], str | None]

_WORD = re.compile(r"\w+(?:[-.'’]\w+)*")
_POSSESSIVE = re.compile(r"['’]s$")
_GAP = re.compile(r"\.? ")
_QUESTION_WORD = re.compile(
    r"(?:What|Who|Whom|Whose|Where|When|Which|Why|How|Is|Are|Was|Were|Did|Does|Do|Has|Can|In|On|At|For|The|A|Please)\b"
)
_LONGEST_NAME = 6  # words


@dataclass(frozen=True)
class Fact:
    """One thing the model should know.

    Attributes:
        prompt: the question, before any chat template.
        subject: the words of `prompt` that are corrupted; where they occur twice, the first occurrence is.
        answer: the whole answer, without a leading space (`PromptSpec.answer_prefix` adds it).
        id: a name for messages and pictures.
        group: facts that share a group (one person's questions) are resampled together; "" stands alone.
        foil: another answer, from which `logit_difference` tells it apart; `with_foils` finds one among other facts.

    Raises:
        UserError: an empty field, or a subject that is not in the prompt.
    """

    prompt: str
    subject: str
    answer: str
    id: str = ""
    group: str = ""
    foil: str = ""

    def __post_init__(self) -> None:
        for name in ("prompt", "subject", "answer"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise UserError(f"the {name} of fact {self.label!r} is {value!r}; give a text that is not empty.")
        if self.subject not in self.prompt:
            raise UserError(
                f"the subject {self.subject!r} of fact {self.label!r} is not in its prompt {self.prompt!r}; "
                "give the subject as it is spelt there."
            )

    @property
    def question(self) -> tuple[str, str]:
        """The prompt before and after its subject."""
        before, _, after = self.prompt.partition(self.subject)
        return before, after

    @property
    def label(self) -> str:
        """The id, or the prompt where there is none."""
        return self.id or str(self.prompt)


def facts_from_rows(rows: Iterable[Row], subject_of: SubjectOf | str | re.Pattern[str] | None = None) -> list[Fact]:
    """The question-answering rows as facts; a row's document becomes the fact's group.

    Args:
        rows: rows of any task. Sentence-completion rows are not traced, but help to find the subject.
        subject_of: how to find the subject of a row: a function; or a regular expression for `input`, whose group
            `subject`, else first group, else whole match is the subject; or None for `find_subjects`.

    Raises:
        UserError: no question-answering rows, or rows whose subject is not found (all are counted, some named).
    """
    rows = list(rows)
    questions = [row for row in rows if row.kind == "qa"]
    if not questions:
        raise UserError(
            f"none of the {len(rows)} rows is a question (id ending in qa0 … qa9); "
            "tracing needs question-answering rows."
        )
    find = _finder(rows, subject_of)
    subjects = [find(row) for row in questions]
    lost = [row.id for row, subject in zip(questions, subjects, strict=True) if not subject]
    if lost:
        shown = ", ".join(lost[:3]) + (", …" if len(lost) > 3 else "")
        raise UserError(
            f"no subject was found in the questions of {len(lost)} of {len(questions)} rows ({shown}); "
            "leave these rows out (Task2 asks about people by name) or say how to find it with subject_of."
        )
    return [
        Fact(row.input, subject, row.output, id=row.id, group=row.document)
        for row, subject in zip(questions, subjects, strict=True)
        if subject
    ]


def find_subjects(rows: Iterable[Row]) -> dict[str, str]:
    """The name each document is about, by document id; documents without a recognisable name are absent.

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


def with_foils(facts: Sequence[Fact], seed: int = 0) -> list[Fact]:
    """The facts, those without a foil with the answer to the same question about another subject, drawn by `seed`.

    The same question is the same prompt but for the subject. Where nobody else is asked it, or all have the same answer, the
    foil stays empty.
    """
    answers: dict[tuple[str, str], list[str]] = defaultdict(list)
    for fact in facts:
        if fact.answer not in answers[fact.question]:
            answers[fact.question].append(fact.answer)
    draw, found = random.Random(seed), []
    for fact in facts:
        others = [answer for answer in sorted(answers[fact.question]) if answer != fact.answer]
        found.append(replace(fact, foil=draw.choice(others)) if others and not fact.foil else fact)
    return found


def load_known_facts(path: str | Path) -> list[Fact]:
    """Facts from a JSON array, JSON lines or Parquet: objects with `prompt`, `subject` and `answer` (or `attribute`, as in the
    known-facts file of the published script), perhaps `known_id` or `id`, `group` and `foil`.

    The answer is stripped of surrounding space; facts about one subject form a group unless they name another.

    Raises:
        UserError: a missing or broken file, no facts, or a record without one of the three texts (named by its place).
    """
    files = find_files(Path(path), preferred=(".json", ".jsonl", ".parquet"))
    records = [record for file in files for record in read_file(file)]
    if not records:
        raise UserError(f"the facts file {path} holds no facts; give objects with prompt, subject and answer.")
    return [_known_fact(record) for record in records]


def _known_fact(record: Record) -> Fact:
    prompt, subject = text_column(record, "prompt"), text_column(record, "subject")
    answer = text_column(record, "attribute" if "attribute" in record.values else "answer")
    name = str(record.values.get("known_id", record.values.get("id", record.where)))
    group, foil = (text_column(record, key, blank=True) if key in record.values else "" for key in ("group", "foil"))
    return Fact(prompt, subject, answer.strip(), id=name, group=group or subject, foil=foil.strip())


def _finder(rows: Sequence[Row], subject_of: SubjectOf | str | re.Pattern[str] | None) -> SubjectOf:
    if subject_of is None:
        found = find_subjects(rows)
        return lambda row: found.get(row.document)
    if callable(subject_of):
        return subject_of
    try:
        pattern = re.compile(subject_of)
    except re.error as error:
        raise UserError(f"subject_of {subject_of!r} is not a regular expression ({error}); mend it.") from error

    def match(row: Row) -> str | None:
        hit = pattern.search(row.input)
        if hit is None:
            return None
        if "subject" in pattern.groupindex:
            return str(hit["subject"] or "") or None
        return str(hit[1] if pattern.groups else hit[0]) or None

    return match


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
