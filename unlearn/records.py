"""Reading records: a JSON-lines, JSON or Parquet file as dictionaries, each with the place it was read from.

It knows nothing of rows, questions or tasks (`unlearn.data` does): only files, encodings and columns. Whatever
is wrong with a file is one `UserError` that names the file, the line, the value and what to do.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from lm.errors import UserError

SUFFIXES = (".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class Record:
    """One object of a file. `where` is how a person finds it again, for example `forget.jsonl line 12`."""

    where: str
    values: Mapping[str, object]


def find_files(source: Path) -> tuple[Path, ...]:
    """The data files that a path stands for.

    A file stands for itself. A folder stands for every `*.jsonl` in it, by name; if it has none, for every
    `*.parquet`. The competition's folders hold the same rows in both formats, so reading both would read each
    row twice. Sub-folders and hidden files are not read.
    """
    if source.is_file():
        if source.suffix.lower() not in SUFFIXES:
            raise UserError(f"{source} is not a data file this can read: give a .jsonl, .json or .parquet file.")
        return (source,)
    if not source.is_dir():
        raise UserError(
            f"{source} does not exist{_near_miss(source)}; give a data file, a folder of them, or builtin:..."
        )
    for suffix in (".jsonl", ".parquet"):
        found = sorted(path for path in source.glob(f"*{suffix}") if not path.name.startswith(".") and path.is_file())
        if found:
            return tuple(found)
    raise UserError(f"folder {source} holds no .jsonl and no .parquet file; put the rows there, or name the file.")


def read_file(path: Path) -> tuple[Record, ...]:
    """All records of one file. An empty file gives an empty tuple."""
    try:
        data = path.read_bytes()
    except OSError as problem:
        raise UserError(f"{path} cannot be read ({problem.strerror}); check its permissions.") from None
    if path.suffix.lower() == ".parquet":
        return parse_parquet(data, str(path))
    return parse_json(data, str(path))


def parse_json(data: bytes, name: str) -> tuple[Record, ...]:
    """JSON lines, or one JSON array of objects, from UTF-8 bytes (a byte-order mark and blank lines are skipped)."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        line = data.count(b"\n", 0, problem.start) + 1
        bad = data[problem.start : problem.start + 1].hex()
        raise UserError(
            f"{name} line {line} is not UTF-8 (byte 0x{bad} at offset {problem.start}); save the file as UTF-8."
        ) from None
    if text.lstrip().startswith("["):
        return _parse_array(text, name)
    records = []
    # Only "\n" ends a line of JSON lines: str.splitlines would also cut at U+2028 inside a string.
    for number, content in enumerate(text.split("\n"), start=1):
        if not content.strip():
            continue
        where = f"{name} line {number}"
        try:
            value = json.loads(content)
        except json.JSONDecodeError as problem:
            raise UserError(
                f"{where} is not JSON ({problem.msg} at column {problem.colno}); write one JSON object a line."
            ) from None
        records.append(_record(where, value))
    return tuple(records)


def _parse_array(text: str, name: str) -> tuple[Record, ...]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as problem:
        raise UserError(
            f"{name} line {problem.lineno} is not JSON ({problem.msg}); write one array, or one object a line."
        ) from None
    return tuple(_record(f"{name} item {number}", value) for number, value in enumerate(values, start=1))


def parse_parquet(data: bytes, name: str) -> tuple[Record, ...]:
    """All rows of a Parquet file, nested lists as Python lists."""
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(pyarrow.BufferReader(data)).to_pylist()
    except (pyarrow.ArrowException, OSError) as problem:
        reason = str(problem).splitlines()[0].rstrip(".")
        raise UserError(
            f"{name} is not a readable Parquet file ({reason}); write it again, or use JSON lines."
        ) from None
    return tuple(Record(f"{name} row {number}", values) for number, values in enumerate(rows, start=1))


def _record(where: str, value: object) -> Record:
    if not isinstance(value, dict):
        raise UserError(f'{where} is {_show(value)}, not an object; write it as {{"id": ..., "input": ...}}.')
    return Record(where, value)


def column(record: Record, name: str, *, meaning: str | None = None) -> object:
    """The value of one column, or a `UserError` with the columns there are and the likeliest one."""
    if name in record.values:
        return record.values[name]
    what = f'"{name}"' if meaning in (None, name) else f'"{name}" (for {meaning})'
    raise UserError(
        f"{record.where} has no column {what}{did_you_mean(name, record.values)}; it has "
        f"{', '.join(record.values) or 'none'}: rename the column, or map it with columns."
    )


def text_column(record: Record, name: str, *, meaning: str | None = None) -> str:
    """The value of one column as text that is not blank."""
    value = column(record, name, meaning=meaning)
    if not isinstance(value, str):
        raise UserError(f'{record.where}: column "{name}" is {_show(value)}, not text; write it as a string.')
    if not value.strip():
        raise UserError(f'{record.where}: column "{name}" is blank ({_show(value)}); fill it in or drop the row.')
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(
            f'{record.where}: column "{name}" holds half of a surrogate pair, which is not text; remove it.'
        ) from None
    return value


def did_you_mean(name: str, known: Collection[str]) -> str:
    """` (did you mean "x"?)` for the closest known name, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f' (did you mean "{near[0]}"?)' if near else ""


def _near_miss(path: Path) -> str:
    if not path.parent.is_dir():
        return ""
    return did_you_mean(path.name, [other.name for other in path.parent.iterdir()])


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
