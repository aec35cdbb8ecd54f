"""The comparison from run folders to files. Wiring only."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from lm.errors import UserError
from lm.run_folder import write_atomic, write_json
from unlearn.comparison.columns import COLUMNS, Column, further
from unlearn.comparison.config import CompareConfig
from unlearn.comparison.rows import Found, find_rows
from unlearn.comparison.table import Comparison, placed
from unlearn.report.runs.caveats import asked_alike
from unlearn.report.runs.folders import Run

_OF_AN_ATTACK = ("attack", "seeds", "tasks", "prompt", "max_new_tokens")


def run_compare(config: CompareConfig) -> Comparison:
    """Read the runs, and write `comparison.json` and `comparison.md` into `config.out` and the table into `config.page`.

    Raises:
        UserError: a folder that holds no run, runs that contradict each other, a page without the marker lines: nothing is
            written then.
    """
    found = find_rows(config)
    shown, missing = _columns(config, found)
    result = Comparison(
        rows=found.rows,
        columns=shown,
        missing=missing,
        caveats=(*asked_alike(found.evaluations), *_attacked_alike(found.attacks)),
        command=config.command,
        made_by=tuple(filter(None, map(_made_by, config.runs))),
    )
    page = None if config.page is None else placed(_read(config.page), config.place, result.markdown, name=config.page)
    out = Path(config.out)
    write_json(out / "comparison.json", result.to_json())
    write_atomic(out / "comparison.md", result.markdown)
    if page is not None and config.page is not None:
        write_atomic(Path(config.page), page, private=True)
    return result


def describe(config: CompareConfig, result: Comparison) -> str:
    """What the command prints: the table, and where it is."""
    page = f" and into {config.page}" if config.page is not None else ""
    return f"{result.markdown}\nwrote {config.out}/comparison.md and comparison.json{page}"


def _columns(config: CompareConfig, found: Found) -> tuple[tuple[Column, ...], tuple[str, ...]]:
    """The columns to show, and the headings of those that are left out for want of any value."""
    known = {column.name: column for column in (*COLUMNS, *map(further, config.also))}
    chosen = [known[name] for name in config.columns] if config.columns is not None else list(known.values())
    measured = {name for row in found.rows for each in row.measures for name in each.values}
    shown = tuple(column for column in chosen if config.columns is not None or column.name in measured)
    gone = (column.head for column in chosen if column not in shown and column.name != "gpu_memory")
    return shown, tuple(gone)


def _attacked_alike(attacks: Sequence[Run]) -> list[str]:
    """Whether all models were attacked in the same way."""
    differing = [name for name in _OF_AN_ATTACK if len({str(run.config.get(name)) for run in attacks}) > 1]
    if len({str((run.manifest.get("data") or {}).get("forget")) for run in attacks}) > 1:
        differing.append("forget rows")
    if not differing:
        return []
    return [f"The attacks differ in {', '.join(differing)}: their gaps and residues do not compare one to one."]


def _made_by(folder: str) -> str | None:
    """The command that a benchmark left in the folder of its runs."""
    path = Path(folder) / "benchmark.json"
    return str(json.loads(path.read_text(encoding="utf-8"))["command"]) if path.is_file() else None


def _read(page: str) -> str:
    try:
        return Path(page).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(
            f"the page {page} is not there: make it, with the marker lines where the table is to be"
        ) from None
