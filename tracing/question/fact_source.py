"""Facts to trace from wherever they are named: rows of a forget or retain set, or files of facts.

How a row file is read is `lm.row_files`, how rows become facts is `tracing.question.facts`; this puts the two together for
every stage. Whether a model knows the facts is found out later (`tracing.known`).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lm.data.files import find_files, read_file
from lm.devices import is_main
from lm.errors import UserError
from lm.row_files import FIELDS, is_builtin, load_rows
from tracing.question.facts import FACT_FIELDS, Fact, facts_from_rows, is_known_facts, load_known_facts

Sources = tuple[str, ...] | str
"""One source of rows or facts, or several."""


@dataclass(frozen=True, kw_only=True)
class FactSource:
    """Where facts are read from, and which of them are asked about."""

    sources: tuple[str, ...] | str = ("builtin:forget",)
    """One source or several: a JSONL or Parquet file of rows, or of facts (also JSON; records with prompt, subject, and answer or
    attribute), a folder of either, or a part of the built-in world."""
    columns: dict[str, str] | None = None
    """For files with other column names: our field -> their column, e.g. {"input": "question", "output": "answer"} for rows, or
    {"prompt": "question", "answer": "target"} for facts."""
    tasks: tuple[str, ...] = ("Task2",)
    """Only rows of these tasks; Task2 asks about people by name. Empty: all."""
    subject: str | None = None
    """A regular expression whose group `subject` (else first group, else whole match) is the subject of a question; null
    finds the person's name by comparing rows."""
    leave_out_unnamed: bool = False
    """Leave out questions whose subject is not found instead of refusing the file (TOFU's "What is the full name of …?")."""
    max_facts: int | None = None
    """Only so many of the facts that the model knows, drawn at random with the config's seed; null takes all. A corruption is
    that of all facts."""

    def __post_init__(self) -> None:
        if not _each(self.sources):
            raise UserError("facts.sources is empty: name at least one source, such as builtin:forget")
        if self.max_facts is not None and self.max_facts < 1:
            raise UserError(f"facts.max_facts is {self.max_facts}: give at least 1, or null")

    def read(self, sources: Sources | None = None) -> list[Fact]:
        """The facts of every source, in order: files of facts whole, of rows those of `tasks`. All of them, whatever `max_facts`.

        Args:
            sources: other sources to read in the same way (what must stay, say); None reads those of this.

        Raises:
            UserError: a file that is not there or cannot be read, columns that it lacks, no row of the tasks, a question whose
                subject is not found.
        """
        columns = dict(self.columns or {})
        if unknown := sorted(set(columns) - {*FIELDS, *FACT_FIELDS}):
            known = ", ".join(dict.fromkeys((*FIELDS, *FACT_FIELDS)))
            raise UserError(f"facts.columns maps {unknown[0]!r}, which neither a row nor a fact has: choose of {known}")
        facts: list[Fact] = []
        for source in _each(self.sources if sources is None else sources):
            facts += self._read(source, columns)
        return facts

    def _read(self, source: str, columns: Mapping[str, str]) -> list[Fact]:
        of_facts = {field: name for field, name in columns.items() if field in FACT_FIELDS}
        if is_known_facts(source, of_facts):
            return load_known_facts(source, of_facts)
        _refuse_neither(source, columns)
        rows = load_rows(source, columns={field: name for field, name in columns.items() if field in FIELDS})
        kept = [row for row in rows if not self.tasks or row.task in self.tasks]
        if not kept:
            have = ", ".join(sorted({row.task for row in rows}))
            raise UserError(
                f"{source} has no rows of {', '.join(self.tasks)} (it has {have}): set facts.tasks to what it has"
            )
        facts = facts_from_rows(kept, self.subject, leave_out_unnamed=self.leave_out_unnamed)
        lost = sum(row.kind == "qa" for row in kept) - len(facts)
        if lost and is_main():
            print(f"{source}: left out {lost} of {lost + len(facts)} questions, which name no subject", file=sys.stderr)
        return facts


SHORT_KEYS = {"facts": "facts.sources"}
"""What a config with a `facts: FactSource` may be written like: `facts: [builtin:forget]` (`lm.old_configs`)."""
OLD_KEYS = {name: f"facts.{name}" for name in ("columns", "tasks", "subject", "leave_out_unnamed", "max_facts")}
"""What stood at the top of such a config before `facts` was a `FactSource`."""


def _each(sources: Sources) -> tuple[str, ...]:
    """The sources, always as a tuple."""
    return (sources,) if isinstance(sources, str) else sources


def _refuse_neither(source: str, columns: Mapping[str, str]) -> None:
    """Refuse a file whose first record is neither a row nor a fact, with what each of them has."""
    if is_builtin(source):
        return
    first = next((record for path in find_files(Path(source)) for record in read_file(path)), None)
    if first is None:
        raise UserError(
            f"{source} holds no records: give rows with input and output, or facts with prompt, subject and answer"
        )
    missing = {
        what: [name for name in names if columns.get(name, name) not in first.values]
        for what, names in {"rows": ("input", "output"), "facts": ("prompt", "subject", "answer")}.items()
    }
    if missing["rows"]:
        raise UserError(
            f"{first.where} has {', '.join(first.values) or 'no columns'}: as a row it lacks {', '.join(missing['rows'])}, as a "
            f"fact {', '.join(missing['facts'])}: say which columns these are, as in "
            """--facts.columns '{"input": "question", "output": "answer"}' or '{"prompt": "question", "subject": "person"}'"""
        )
