"""Facts to trace from wherever they are named: rows of a forget or retain set, or a known-facts file.

Reading rows is `unlearn.data`, which stands above `tracing`; this puts the two together for every entry point.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from lm.devices import is_main
from lm.errors import UserError
from tracing import Fact, facts_from_rows, load_known_facts
from tracing.config import TraceConfig
from unlearn.data import load_rows


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
    facts: list[Fact] = []
    for source in sources:
        if is_known_facts(source):
            facts += load_known_facts(source)
            continue
        rows = load_rows(source, columns=columns)
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


def is_known_facts(source: str) -> bool:
    """Whether a source is a file of facts rather than of rows: its first record has a `prompt` and a `subject`."""
    path = Path(source)
    if path.suffix not in (".json", ".jsonl") or not path.is_file():
        return False
    with open(path, encoding="utf-8", errors="replace") as file:
        start = file.read(4096)
    return '"prompt"' in start and '"subject"' in start
