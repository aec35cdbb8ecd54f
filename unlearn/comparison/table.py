"""The table as Markdown and as plain data, and its place in a page. Nothing is read but the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lm.errors import UserError
from unlearn.comparison.columns import Column
from unlearn.comparison.rows import Row


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What a comparison came to.

    Attributes:
        rows: base and retain model first, then the methods in the order in which they began.
        columns: those that are shown.
        missing: headings of columns in which no run has a value.
        caveats: what the table does not say, in sentences.
        command: what printed it.
        made_by: what made the runs, where a benchmark says so.
    """

    rows: tuple[Row, ...]
    columns: tuple[Column, ...]
    missing: tuple[str, ...]
    caveats: tuple[str, ...]
    command: str
    made_by: tuple[str, ...] = ()

    @property
    def table(self) -> str:
        """The table alone. What is not known is an empty cell."""
        cells = any(row.worst_cell for row in self.rows) and any(column.name == "worst_gap" for column in self.columns)
        remarks = any(row.failed for row in self.rows)
        head = ["method", "seeds", *(column.head for column in self.columns)]
        head += (["where"] if cells else []) + (["failed"] if remarks else [])
        lines = [_line(head), "|" + "---|" * len(head)]
        for row in self.rows:
            line = [row.name, _seeds(row), *(column.text(row.values(column.name)) for column in self.columns)]
            line += ([row.worst_cell] if cells else []) + ([_failed(row)] if remarks else [])
            lines.append(_line(line))
        return "\n".join(lines)

    @property
    def markdown(self) -> str:
        """The command, the table, and what it does not say."""
        parts = ["\n".join(f"    {command}" for command in (*self.made_by, self.command)), self.table]
        if any(len(row.measures) > 1 for row in self.rows):
            parts.append("Of several seeds: the mean (smallest to largest).")
        if self.missing:
            parts.append(f"Not measured in any of these runs: {', '.join(self.missing)}.")
        return "\n\n".join([*parts, *self.caveats]) + "\n"

    def to_json(self) -> dict[str, Any]:
        """Everything as plain data: of each row the values of every seed, null where one is not known."""
        rows = [
            {
                "name": row.name,
                "part": row.part,
                "seeds": row.seeds,
                "folders": row.folders,
                "values": {column.name: row.values(column.name) for column in self.columns},
                "worst_cell": row.worst_cell,
                "failed": [{"seeds": seeds, "why": why} for seeds, why in row.failed],
                "commands": row.commands,
            }
            for row in self.rows
        ]
        columns = {column.name: {"head": column.head, "meaning": column.meaning} for column in self.columns}
        commands = {"command": self.command, "made_by": list(self.made_by)}
        return {**commands, "columns": columns, "rows": rows, "caveats": list(self.caveats)}


def placed(page: str, place: str, text: str, *, name: str) -> str:
    """A page with `text` between the two marker lines of a place, and all else as it was.

    Args:
        page: the page.
        place: the name in the marker lines.
        text: what stands between them from now on.
        name: what the page is called in errors.

    Raises:
        UserError: a marker line that is not there exactly once, or the end before the beginning.
    """
    lines = page.split("\n")
    markers = (f"<!-- table: {place} -->", f"<!-- end of table: {place} -->")
    at = []
    for marker in markers:
        where = [number for number, line in enumerate(lines) if line.strip() == marker]
        if len(where) != 1:
            raise UserError(
                f"{name} has {len(where)} lines {marker}: put {markers[0]} and {markers[1]} on lines of their own, each once, "
                "where the table is to be"
            )
        at += where
    begin, end = at
    if end < begin:
        raise UserError(f"{name} has {markers[1]} before {markers[0]}: put them in order")
    return "\n".join([*lines[: begin + 1], "", *text.strip("\n").split("\n"), "", *lines[end:]])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"


def _seeds(row: Row) -> str:
    """How many seeds a row is of; empty for a model that no run made."""
    made = sum(bool(seeds) for seeds in row.seeds)
    lost = len({seeds for seeds, _ in row.failed} - set(row.seeds))
    return f"{made} of {made + lost}" if lost else str(made or "")


def _failed(row: Row) -> str:
    """Why runs failed, each reason once with its seeds."""
    reasons: dict[str, list[str]] = {}
    for seeds, why in row.failed:
        reasons.setdefault(why, []).append(seeds)
    said = []
    for why, of in reasons.items():
        named = [seeds for seeds in of if seeds]
        said.append(f"seed {', '.join(named)}: {why}" if named else why)
    return "; ".join(said)
