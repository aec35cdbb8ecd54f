"""Rows to forget and to retain, documents for membership, questions for utility: from a file, a folder or the
built-in world, checked before anything else starts.

Only `load_*` touch the disk; everything below them is a pure function of records. How a file is parsed is
`lm.data.files`; how rows become token batches is not here.
"""

from __future__ import annotations

import hashlib
import json
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

from lm.data.files import Record, column, find_files, read_file, text_column
from lm.data.rows import Question, Row, RowKind
from lm.errors import UserError, did_you_mean

FIELDS = ("id", "input", "output", "task")
BUILTIN_ROWS = (
    *("forget", "retain", "calibration", "held_out"),
    *("forget_paraphrase", "retain_paraphrase", "forget_reworded", "retain_reworded"),
)
BUILTIN_QUESTIONS = ("utility",)
Half = Literal["first", "second"]


# ------------------------------------------------------------------------------------------------------ loading


def load_rows(
    source: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    kind: RowKind = "qa",
    task: str = "Task1",
) -> tuple[Row, ...]:
    """Rows in LUME's schema (columns `id`, `input`, `output`, `task`; others are ignored).

    Args:
        source: `builtin:forget` (or retain, calibration, held_out, forget_paraphrase, retain_paraphrase, forget_reworded,
            retain_reworded: see `lm.builtin.world.World`); a .jsonl, .json or .parquet file; or a folder (see
            `lm.data.files.find_files` for which of its files are read).
        columns: for files with other names, our field -> their column, as in
            `{"input": "question", "output": "answer"}`. Only with it may `id` and `task` be missing: then the id
            is made from the text (equal rows get equal ids), of the kind `kind`, and the task is `task`.
        kind: what generated ids say the rows are: question answering or sentence completion.
        task: the task of rows without a task column.

    Raises:
        UserError: a missing or unreadable file, wrong columns, no rows, duplicate ids, a value that is not text.
    """
    if is_builtin(source):
        return _builtin_rows(str(source))
    return rows_from_records(_records(source), str(source), columns=columns, kind=kind, task=task)


def load_questions(source: str | Path) -> tuple[Question, ...]:
    """Multiple-choice questions: `builtin:utility`, or a file with `question`, `choices`, `answer` (0-based) and
    perhaps `subject`, which is the layout of the MMLU file."""
    if is_builtin(source):
        _builtin_name(str(source), BUILTIN_QUESTIONS)
        from lm.builtin import world

        return tuple(world.build().utility)
    return questions_from_records(_records(source), str(source))


def load_documents(
    source: str | Path,
    *,
    task: str | None = None,
    columns: Mapping[str, str] | None = None,
    without: Iterable[Row] = (),
) -> tuple[str, ...]:
    """Whole documents for membership inference.

    A file with a `document` column (the challenge's membership files) gives that column. Anything that
    `load_rows` reads (with the same `columns`) gives the sentence-completion rows as `input + " " + output`, of one
    task if asked. Texts of `without` are left out: those that something was calibrated on (`load_calibration`) must not be
    scored, and the challenge's non-members hold all of its validation non-members.
    """
    if is_builtin(source):
        found = documents(_builtin_rows(str(source)), str(source), task=task)
    else:
        records = _records(source)
        if records and "document" in records[0].values:
            found = tuple(text_column(record, "document") for record in records)
        else:
            found = documents(rows_from_records(records, str(source), columns=columns), str(source), task=task)
    used = {row.text for row in without}
    left = tuple(text for text in found if text not in used)
    if found and not left:
        raise UserError(f"{source} holds no document but those to be left out: name another source")
    return left


def load_calibration(
    source: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    kind: RowKind = "qa",
    task: str | None = None,
    half: Half | None = None,
    together: int = 1,
) -> tuple[Row, ...]:
    """Rows of the kind to be forgotten that the model never saw: what something is calibrated on, and what no score may ask.

    Anything that `load_rows` reads; or a file with a `document` column (the challenge's membership files), whose whole
    documents become completions: the first word is the input, all after the space behind it the output, so that `Row.text`
    is the document again.

    Args:
        columns, kind: as for `load_rows`.
        task: of rows and documents without a task column. Null: Task1 for rows, as `load_rows` has it, and Task3 for
            documents, which those of the challenge are.
        half: first or second, of a source that calibration and scoring must share: every other document from the first or
            from the second one on, in the order of the source, with all its rows. Null: all rows.
        together: for a source whose rows have no ids to say so: how many rows in a row are about one person (20 in TOFU).

    Raises:
        UserError: as `load_rows`; a document of a single word; a half without a document.
    """
    if is_builtin(source):
        return halved(_builtin_rows(str(source)), str(source), half, together=together)
    records = _records(source)
    if records and "document" in records[0].values:
        rows = whole_documents(records, task=task or "Task3")
    else:
        rows = rows_from_records(records, str(source), columns=columns, kind=kind, task=task or "Task1")
    return halved(rows, str(source), half, together=together)


def _records(source: str | Path) -> list[Record]:
    return [record for path in find_files(Path(source)) for record in read_file(path)]


def is_builtin(source: str | Path) -> bool:
    """Whether a source names a part of the built-in world rather than a path."""
    return isinstance(source, str) and (source == "builtin" or source.startswith("builtin:"))


def _builtin_name(source: str, known: Sequence[str]) -> str:
    name = source.partition(":")[2]
    if name not in known:
        choices = ", ".join(f"builtin:{part}" for part in known)
        raise UserError(
            f'"{source}" is not a part of the built-in world{did_you_mean(name, known)}: choose of {choices}'
        )
    return name


def _builtin_rows(source: str) -> tuple[Row, ...]:
    name = _builtin_name(source, BUILTIN_ROWS)
    from lm.builtin import world

    return world.build().parts[name]


# ------------------------------------------------------------------------------------------------- pure functions


def rows_from_records(
    records: Sequence[Record],
    source: str,
    *,
    columns: Mapping[str, str] | None = None,
    kind: RowKind = "qa",
    task: str = "Task1",
) -> tuple[Row, ...]:
    """Checked rows from parsed records; the arguments and errors are those of `load_rows`."""
    mapping = {field: field for field in FIELDS} | dict(columns or {})
    for field in columns or {}:
        if field not in FIELDS:
            raise UserError(
                f'columns maps "{field}", which is no field of a row{did_you_mean(field, FIELDS)}: '
                f"name one of {', '.join(FIELDS)}"
            )
    if not records:
        raise UserError(f"{source} holds no rows: give a split with at least one")
    rows: list[Row] = []
    seen: dict[str, str] = {}
    for record in records:
        prompt = text_column(record, mapping["input"], meaning="input")
        answer = text_column(record, mapping["output"], meaning="output")
        may_lack = columns is not None
        if may_lack and "id" not in (columns or {}) and "id" not in record.values:
            identity = generated_id(prompt, answer, kind)
        else:
            identity = text_column(record, mapping["id"], meaning="id")
        if may_lack and "task" not in (columns or {}) and "task" not in record.values:
            name = task
        else:
            name = text_column(record, mapping["task"], meaning="task")
        key = canonical_id(identity)
        if key in seen:
            raise UserError(
                f"{record.where}: id {identity} is already that of {seen[key]}: drop or "
                "rename one of the two rows, ids must differ"
            )
        seen[key] = record.where
        rows.append(Row(id=identity, input=prompt, output=answer, task=name))
    return tuple(rows)


def whole_documents(records: Sequence[Record], *, task: str = "Task3") -> tuple[Row, ...]:
    """The `document` column as completion rows, their first word the input; see `load_calibration`."""
    rows = []
    for record in records:
        text = text_column(record, "document")
        start = len(text) - len(text.lstrip())
        cut = text.find(" ", start)
        if cut < 0 or not text[cut:].strip():
            raise UserError(
                f'{record.where}: column "document" is a single word, which leaves nothing to complete: drop it'
            )
        own = {"input": text[:cut], "output": text[cut + 1 :]}
        own["id"] = generated_id(own["input"], own["output"], "sc")
        own["task"] = task
        if "id" in record.values:
            own["id"] = text_column(record, "id")
            own["id"] += "" if Row(own["id"], "", "", "").kind == "sc" else "sc1"
        if "task" in record.values:
            own["task"] = text_column(record, "task")
        rows.append(Record(record.where, own))
    return rows_from_records(rows, "documents")


def halved(rows: Sequence[Row], source: str, half: Half | None, *, together: int = 1) -> tuple[Row, ...]:
    """Every other document of the rows, all of its rows; the arguments and errors are those of `load_calibration`."""
    if half not in (None, *get_args(Half)):
        raise UserError(f"half is {half!r}: write first or second, or leave it out for all rows")
    if together < 1:
        raise UserError(f"together is {together}: give 1 or more rows")
    if together > 1 and len({row.document for row in rows}) < len(rows):
        raise UserError(
            f"together is {together}, but the ids of {source} say which rows are of one document: leave it out"
        )
    if half is None:
        return tuple(rows)
    places: dict[str, int] = {}
    for number, row in enumerate(rows):
        places.setdefault(row.document, number // together if together > 1 else len(places))
    wanted = get_args(Half).index(half)
    chosen = tuple(row for row in rows if places[row.document] % 2 == wanted)
    if not chosen:
        raise UserError(f"{source} has no {half} half, for it holds a single document: give a source with two or more")
    return chosen


def questions_from_records(records: Sequence[Record], source: str) -> tuple[Question, ...]:
    """Checked multiple-choice questions from parsed records."""
    if not records:
        raise UserError(f"{source} holds no questions: give a file with at least one")
    return tuple(_question(record) for record in records)


def _question(record: Record) -> Question:
    text = text_column(record, "question")
    choices = column(record, "choices")
    if not isinstance(choices, list) or len(choices) < 2:
        raise UserError(f'{record.where}: column "choices" is {choices!r}: write a list of at least two answers')
    if not all(isinstance(choice, str) for choice in choices):  # MMLU itself has an empty one
        raise UserError(f'{record.where}: column "choices" is {choices!r}: write every choice as text')
    for choice in choices:
        text_column(Record(record.where, {"choices": choice}), "choices", blank=True)
    answer = column(record, "answer")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise UserError(
            f'{record.where}: column "answer" is {answer!r}: write the 0-based place of the right choice, '
            f"0 to {len(choices) - 1}"
        )
    subject = text_column(record, "subject") if "subject" in record.values else "general"
    return Question(question=text, choices=tuple(choices), answer=answer, subject=subject)


def documents(rows: Iterable[Row], source: str, *, task: str | None = None) -> tuple[str, ...]:
    """The texts of the sentence-completion rows, of one task if asked; a `UserError` if there are none."""
    texts = tuple(row.text for row in rows if row.kind == "sc" and task in (None, row.task))
    if not texts:
        which = "" if task is None else f" of {task}"
        raise UserError(
            f"{source} holds no sentence-completion row{which} (an id that ends in sc and a digit), so it "
            "gives no documents for membership: name another source"
        )
    return texts


def check_disjoint(forget: Iterable[Row], retain: Iterable[Row]) -> None:
    """Refuse a row that is both to be forgotten and to be retained (`"a"sc1` and `asc1` are the same id)."""
    wanted = {canonical_id(row.id) for row in retain}
    both = [row_name(row) for row in forget if canonical_id(row.id) in wanted]
    if both:
        more = f" and {len(both) - 1} more" if len(both) > 1 else ""
        raise UserError(f"row {both[0]}{more} is in both the forget and the retain rows: take it out of one of them")


def canonical_id(identity: str) -> str:
    """An id without the literal double quotes that LUME's Task1 ids carry."""
    return identity.replace('"', "")


def generated_id(prompt: str, answer: str, kind: RowKind) -> str:
    """An id for a row that has none: a digest of its text, with the suffix of its kind."""
    digest = hashlib.sha256(json.dumps([prompt, answer]).encode()).hexdigest()
    return f"{digest[:16]}{kind}{1 if kind == 'sc' else 0}"


def row_name(row: Row) -> str:
    """What a message calls a row: its id, or how its text begins where the id was made up from that."""
    made_up = row.id in {generated_id(row.input, row.output, kind) for kind in get_args(RowKind)}
    return repr(textwrap.shorten(row.input, 60, placeholder=" …")) if made_up else row.id


def data_hash(rows: Iterable[Row]) -> str:
    """sha256 of the rows in order, for manifests: the same rows from any file format give the same hash."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.id, row.input, row.output, row.task], ensure_ascii=False).encode())
        digest.update(b"\n")
    return digest.hexdigest()
