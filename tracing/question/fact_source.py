"""Facts to trace from wherever they are named: rows of a forget or retain set, or a known-facts file.

Reading rows is `lm.row_files`, which stands above `tracing`; this puts the two together for every entry point.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from lm.data.files import find_files, read_file
from lm.devices import is_main
from lm.errors import UserError
from lm.row_files import FIELDS, is_builtin, load_rows
from tracing import Fact, facts_from_rows, load_known_facts
from tracing.question.facts import FACT_FIELDS, is_known_facts
from tracing.stages.trace.config import TraceConfig


def read_facts(config: TraceConfig) -> list[Fact]:
    """The facts of every source of a trace, in order."""
    return read_sources(
        config.sources,
        columns=config.columns,
        tasks=config.tasks,
        subject=config.subject,
        leave_out_unnamed=config.leave_out_unnamed,
    )


def read_sources(
    sources: Sequence[str],
    *,
    columns: Mapping[str, str] | None,
    tasks: Sequence[str],
    subject: str | None,
    leave_out_unnamed: bool,
) -> list[Fact]:
    """The facts of every source, in order: files of facts whole, of rows those of `tasks` (see `TraceConfig` for all five)."""
    given = dict(columns or {})
    if unknown := sorted(set(given) - {*FIELDS, *FACT_FIELDS}):
        known = ", ".join(dict.fromkeys((*FIELDS, *FACT_FIELDS)))
        raise UserError(f"columns maps {unknown[0]!r}, which neither a row nor a fact has; choose of {known}")
    named = {field: name for field, name in given.items() if field in FACT_FIELDS}
    facts: list[Fact] = []
    for source in sources:
        if is_known_facts(source, named):
            facts += load_known_facts(source, named)
            continue
        _refuse_neither(source, given)
        rows = load_rows(source, columns={field: name for field, name in given.items() if field in FIELDS})
        kept = [row for row in rows if not tasks or row.task in tasks]
        if not kept:
            have = ", ".join(sorted({row.task for row in rows}))
            raise UserError(f"{source} has no rows of {', '.join(tasks)} (it has {have}); set tasks to what it has")
        found = facts_from_rows(kept, subject, leave_out_unnamed=leave_out_unnamed)
        lost = sum(row.kind == "qa" for row in kept) - len(found)
        if lost and is_main():
            print(f"{source}: left out {lost} of {lost + len(found)} questions, which name no subject", file=sys.stderr)
        facts += found
    return facts


def _refuse_neither(source: str, columns: Mapping[str, str]) -> None:
    """Refuse a file whose first record is neither a row nor a fact, with what each of them has."""
    if is_builtin(source):
        return
    first = next((record for path in find_files(Path(source)) for record in read_file(path)), None)
    if first is None:
        raise UserError(
            f"{source} holds no records; give rows with input and output, or facts with prompt, subject and answer"
        )
    missing = {
        what: [name for name in names if columns.get(name, name) not in first.values]
        for what, names in {"rows": ("input", "output"), "facts": ("prompt", "subject", "answer")}.items()
    }
    if missing["rows"]:
        raise UserError(
            f"{first.where} has {', '.join(first.values) or 'no columns'}: as a row it lacks {', '.join(missing['rows'])}, as a "
            f"fact {', '.join(missing['facts'])}; say which columns these are, as in "
            """--columns '{"input": "question", "output": "answer"}' or '{"prompt": "question", "subject": "person"}'"""
        )
