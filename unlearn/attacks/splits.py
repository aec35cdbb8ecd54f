"""What an attacker may have, and what is then asked: pure splits of rows, drawn by a seed.

A document is one person, figure or story: rows are drawn by documents, since what two rows of one person have in common would
otherwise pass for something remembered. No model here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np

from lm.data.rows import Row
from lm.errors import UserError
from lm.row_files import canonical_id, row_name

Given = Literal["other_people", "same_people", "retain", "unrelated"]
"""Some of the forget documents, whole, and the others are asked; some of each document's questions, and its other questions
are asked; the retain rows, or rows that have nothing to do with either, and all forget rows are asked."""
Split = tuple[tuple[Row, ...], tuple[Row, ...]]


def other_people(forget: Sequence[Row], share: float, seed: int) -> Split:
    """(given, asked): all rows of a share of the documents of each task (at least one), and all rows of the others."""
    generator = np.random.default_rng((seed, 0))
    chosen: set[str] = set()
    for task in sorted({row.task for row in forget}):
        documents = sorted({row.document for row in forget if row.task == task})
        count = max(1, round(share * len(documents)))
        chosen.update(documents[place] for place in generator.permutation(len(documents))[:count])
    return _split(forget, {row.id for row in forget if row.document in chosen})


def same_people(forget: Sequence[Row], share: float, seed: int) -> Split:
    """(given, asked): a share of each document's questions (at least one), and its other questions.

    Completions are neither given nor asked, for they hold the answers; nor is a document with a single question.
    """
    generator = np.random.default_rng((seed, 1))
    questions = [row for row in forget if row.kind == "qa"]
    chosen: set[str] = set()
    kept: list[Row] = []
    for document in sorted({row.document for row in questions}):
        own = sorted((row for row in questions if row.document == document), key=lambda row: row.id)
        if len(own) > 1:
            count = min(max(1, round(share * len(own))), len(own) - 1)
            chosen.update(own[place].id for place in generator.permutation(len(own))[:count])
            kept += own
    return _split(kept, chosen)


def without_told(given: Sequence[Row], asked: Sequence[Row]) -> tuple[Row, ...]:
    """The asked rows whose answer does not stand in a given row, letters and digits compared alone.

    Such an answer would be learned, not remembered: by the retain model as well.
    """
    told = "\n".join(_plain(row.text) for row in given)
    return tuple(row for row in asked if not _plain(row.output) or _plain(row.output) not in told)


def check_apart(given: Iterable[Row], asked: Iterable[Row], name: str) -> None:
    """Raise UserError if a row is on both sides, by id or by text."""
    given = tuple(given)
    ids, texts = {canonical_id(row.id) for row in given}, {(row.input, row.output) for row in given}
    both = [row_name(row) for row in asked if canonical_id(row.id) in ids or (row.input, row.output) in texts]
    if both:
        raise UserError(
            f"row {both[0]} is both given to the attacker ({name}) and asked: relearning it would prove nothing; take it out of "
            "the rows that are given"
        )


def check_some(given: Sequence[Row], asked: Sequence[Row], name: str) -> None:
    """Raise UserError unless there are rows on both sides."""
    for what, rows in (("to give to the attacker", given), ("to ask for whose answer no given row tells", asked)):
        if not rows:
            raise UserError(
                f"attack.given names {name}, and there is no row {what}: bring more people or questions, another attack.share, "
                f"or leave {name} out"
            )


def _split(rows: Sequence[Row], given: set[str]) -> Split:
    return tuple(row for row in rows if row.id in given), tuple(row for row in rows if row.id not in given)


def _plain(text: str) -> str:
    return "".join(character for character in text.casefold() if character.isalnum())
