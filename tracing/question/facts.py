"""What is asked of the model: a prompt, the subject inside it, and the answer it must give.

Here facts are made: from LUME-style rows (whose person is found by comparing rows) and from the known-facts file that
causal tracing is usually run on. Whether a model knows a fact is decided in `tracing.question.encoded_fact`, not here.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from lm.data.files import Record, find_files, read_file, text_column
from lm.data.rows import Row
from lm.errors import UserError
from lm.row_files import row_name
from tracing.question.subjects import find_subjects, recurring_names

SubjectOf = Callable[[Row], str | None]


@dataclass(frozen=True)
class Fact:
    """One thing the model should know.

    Attributes:
        prompt: the question, before any chat template.
        subject: the words of `prompt` that are corrupted; where they occur twice, the first occurrence is.
        answer: the whole answer, without a leading space (`PromptSpec.answer_prefix` adds it).
        id: a name for messages and pictures.
        group: facts that share a group (one person's questions) are resampled together; "" stands alone.
        foil: another answer, from which some metrics tell it apart; `with_foils` finds one among other facts.

    Raises:
        UserError: an empty field, one that is not text, or a subject that is not in the prompt.
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
                raise UserError(f"the {name} of fact {self.label!r} is {value!r}: give a text that is not empty")
        for name in FACT_FIELDS:
            try:
                getattr(self, name).encode()
            except (AttributeError, UnicodeEncodeError):
                value = getattr(self, name)
                raise UserError(
                    f"the {name} of a fact is {value!r}, which cannot be written as UTF-8 text: mend it"
                ) from None
        if self.subject not in self.prompt:
            raise UserError(
                f"the subject {self.subject!r} of fact {self.label!r} is not in its prompt {self.prompt!r}: "
                "give the subject as it is spelled there"
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


def facts_from_rows(
    rows: Iterable[Row],
    subject_of: SubjectOf | str | re.Pattern[str] | None = None,
    *,
    leave_out_unnamed: bool = False,
) -> list[Fact]:
    """The question-answering rows as facts. A row's document is the fact's group; where no document has several rows, its
    subject is.

    Args:
        rows: rows of any task. Sentence-completion rows are not traced, but help to find the subject.
        subject_of: how to find the subject of a row: a function; or a regular expression for `input`, whose group `subject`,
            else first group, else whole match is the subject; or None for the name that a document's rows share
            (`tracing.question.subjects.find_subjects`), or, where no document has several rows and names recur in more
            than a quarter of the questions, that name (`tracing.question.subjects.recurring_names`).
        leave_out_unnamed: leave out rows whose subject is not found instead of refusing them.

    Raises:
        UserError: no question-answering rows, or rows whose subject is not found (all are counted, some named).
    """
    rows = list(rows)
    questions = [row for row in rows if row.kind == "qa"]
    if not questions:
        raise UserError(
            f"none of the {len(rows)} rows is a question (id ending in qa0 … qa9): "
            "tracing needs question-answering rows"
        )
    find = _finder(rows, questions, subject_of)
    subjects = [find(row) for row in questions]
    lost = [row_name(row) for row, subject in zip(questions, subjects, strict=True) if not subject]
    if len(lost) == len(questions) or (lost and not leave_out_unnamed):
        shown = ", ".join(lost[:3]) + (", …" if len(lost) > 3 else "")
        raise UserError(
            f"no subject was found in the questions of {len(lost)} of {len(questions)} rows ({shown}): "
            "leave these rows out (Task2 asks about people by name, leave_out_unnamed does it) or say how to find it with "
            "subject_of"
        )
    together = _has_documents(rows)
    return [
        Fact(row.input, subject, row.output, id=row.id, group=row.document if together else subject)
        for row, subject in zip(questions, subjects, strict=True)
        if subject
    ]


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


def in_turn(facts: Sequence[Fact], seed: int) -> list[int]:
    """The places of the facts in the order in which some are chosen: one of each subject in turn, then a second of each, ….

    Intervals are over subjects (groups, where facts name them), and few facts of many tell more than many of few. Subjects, and
    the facts of each, are shuffled by `seed`.
    """
    turns: dict[str, int] = defaultdict(int)
    round_of = {}
    shuffled = np.random.default_rng(seed).permutation(len(facts)).tolist()
    for place in shuffled:
        subject = facts[place].group or facts[place].subject
        round_of[place] = turns[subject]
        turns[subject] += 1
    return sorted(shuffled, key=round_of.__getitem__)


def drawn(facts: Sequence[Fact], max_facts: int | None, seed: int) -> list[Fact]:
    """The facts in the order in which they are asked: as they come, or shuffled where only some are wanted."""
    if max_facts is None:
        return list(facts)
    return [facts[index] for index in np.random.default_rng(seed).permutation(len(facts))]


def facts_hash(facts: Sequence[Fact]) -> str:
    """The SHA-256 of the facts, in order."""
    return hashlib.sha256(json.dumps([asdict(fact) for fact in facts]).encode()).hexdigest()


FACT_FIELDS = ("prompt", "subject", "answer", "id", "group", "foil")
_FACT_FILES = (".json", ".jsonl", ".parquet")


def is_known_facts(path: str | Path, columns: Mapping[str, str] | None = None) -> bool:
    """Whether a file or folder holds facts rather than rows: its first record has a prompt and a subject."""
    try:
        records = read_file(find_files(Path(path), preferred=_FACT_FILES)[0])
    except UserError:  # not there, or broken: whoever reads it says so
        return False
    return bool(records) and {"prompt", "subject"} <= _renamed(records[0], columns).values.keys()


def load_known_facts(path: str | Path, columns: Mapping[str, str] | None = None) -> list[Fact]:
    """Facts from a JSON array, JSON lines or Parquet: objects with `prompt`, `subject` and `answer` (or `attribute`, as in the
    known-facts file of the published script), perhaps `known_id` or `id`, `group` and `foil`.

    `columns` names other columns: our field -> theirs, e.g. {"answer": "target"}. The answer is stripped of surrounding space;
    facts about one subject form a group unless they name another.

    Raises:
        UserError: a missing or broken file, no facts, or a record without one of the three texts (named by its place).
    """
    files = find_files(Path(path), preferred=_FACT_FILES)
    records = [_renamed(record, columns) for file in files for record in read_file(file)]
    if not records:
        raise UserError(f"the facts file {path} holds no facts: give objects with prompt, subject and answer")
    return [_known_fact(record) for record in records]


def _renamed(record: Record, columns: Mapping[str, str] | None) -> Record:
    """The record with the columns that are named otherwise under our names too; those that it lacks stay absent."""
    ours = {field: record.values[theirs] for field, theirs in (columns or {}).items() if theirs in record.values}
    return Record(where=record.where, values={**record.values, **ours})


def _known_fact(record: Record) -> Fact:
    prompt, subject = text_column(record, "prompt"), text_column(record, "subject")
    answer = text_column(record, "attribute" if "attribute" in record.values else "answer")
    name = str(record.values.get("known_id", record.values.get("id", record.where)))
    group, foil = (text_column(record, key, blank=True) if key in record.values else "" for key in ("group", "foil"))
    try:
        return Fact(prompt, subject, answer.strip(), id=name, group=group or subject, foil=foil.strip())
    except UserError as error:
        raise UserError(f"{record.where}: {error}") from error


def _has_documents(rows: Sequence[Row]) -> bool:
    """Whether any document has several rows."""
    return len({row.document for row in rows}) < len(rows)


def _finder(
    rows: Sequence[Row], questions: Sequence[Row], subject_of: SubjectOf | str | re.Pattern[str] | None
) -> SubjectOf:
    if subject_of is None:
        if not _has_documents(rows):
            recurring = recurring_names(questions)
            if 4 * len(recurring) > len(questions):  # else each may be about somebody of its own
                return lambda row: recurring.get(row.id)
        found = find_subjects(rows)
        return lambda row: found.get(row.document)
    if callable(subject_of):
        return subject_of
    try:
        pattern = re.compile(subject_of)
    except re.error as error:
        raise UserError(f"subject_of {subject_of!r} is not a regular expression ({error}): mend it") from error

    def match(row: Row) -> str | None:
        hit = pattern.search(row.input)
        if hit is None:
            return None
        if "subject" in pattern.groupindex:
            return str(hit["subject"] or "") or None
        return str(hit[1] if pattern.groups else hit[0]) or None

    return match
