"""Rows and questions: the two record types that data, the built-in world, training and evaluation share.

This is only their shape (LUME's schema, and a multiple-choice question). Reading files is `lm.row_files`;
inventing rows is `lm.builtin.world`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RowKind = Literal["sc", "qa"]


@dataclass(frozen=True)
class Row:
    """One row in LUME's schema: a prompt (`input`), what the model must answer (`output`), and where it belongs.

    `id` is `<document><kind><digit>`, for example `a1sc1` or `a1qa0`; `task` is `Task1` (stories),
    `Task2` (people) or `Task3` (public figures).
    """

    id: str
    input: str
    output: str
    task: str

    @property
    def kind(self) -> RowKind | None:
        """`"sc"` (sentence completion), `"qa"` (question answering), or None: read off the id as the official script does."""
        stem = self.id[:-1]
        if stem.endswith("sc"):
            return "sc"
        if stem.endswith("qa"):
            return "qa"
        return None

    @property
    def document(self) -> str:
        """The id of the document this row was cut from, without the literal quotes that LUME's Task1 ids carry."""
        return (self.id[:-3] if self.kind else self.id).strip('"')

    @property
    def text(self) -> str:
        """The whole document text of a sentence-completion row: `input + " " + output`."""
        return f"{self.input} {self.output}"


@dataclass(frozen=True)
class Question:
    """A multiple-choice question: `choices[answer]` is right."""

    question: str
    choices: tuple[str, ...]
    answer: int
    subject: str = "general"
