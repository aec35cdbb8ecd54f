"""Reading data files: JSON lines, JSON or Parquet as dictionaries, each with the place it was read from; plain text.

Nothing here knows of rows, questions, facts or documents: only files, encodings and columns. Whatever is wrong with a
file is one `UserError` that names the file, the line, the value and what to do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lm.errors import UserError, did_you_mean, one_line

SUFFIXES = (".jsonl", ".json", ".parquet")
PREFERRED = (".jsonl", ".parquet")


@dataclass(frozen=True)
class Record:
    """One object of a file. `where` is how a person finds it again, for example `forget.jsonl line 12`."""

    where: str
    values: Mapping[str, object]


def find_files(source: Path, *, suffixes: Sequence[str] = SUFFIXES, preferred: Sequence[str] = PREFERRED) -> list[Path]:
    """The data files that a path stands for.

    A file with one of the `suffixes` stands for itself. A folder stands for its files of the first `preferred` suffix of
    which it has any, by name: competition folders hold the same rows as JSON lines and as Parquet, so reading both would
    read each row twice. Sub-folders and hidden files are not read.
    """
    source = source.expanduser()
    if source.is_file():
        if source.suffix.lower() not in suffixes:
            raise UserError(f"{source} is not a data file this can read: give one of {', '.join(suffixes)}")
        return [source]
    if not source.is_dir():
        raise UserError(
            f"{source} does not exist{_near_miss(source)}: give a data file ({', '.join(suffixes)}), a folder of them, "
            "or builtin:..."
        )
    for suffix in preferred:
        files = sorted(path for path in source.glob(f"*{suffix}") if not path.name.startswith(".") and path.is_file())
        if files:
            return files
    raise UserError(f"the folder {source} holds none of {', '.join(preferred)}: put the data there, or name a file")


def read_file(path: Path) -> tuple[Record, ...]:
    """All records of one JSON-lines, JSON (one array) or Parquet file. An empty file gives an empty tuple."""
    if path.suffix.lower() == ".parquet":
        return _parquet(path)
    text = read_text(path)
    if text.lstrip().startswith("["):
        return _array(text, str(path))
    records = []
    # Only "\n" ends a line of JSON lines: str.splitlines would also cut at U+2028 inside a string.
    for number, content in enumerate(text.split("\n"), start=1):
        if not content.strip():
            continue
        where = f"{path} line {number}"
        records.append(_record(where, _parsed(content, where)))
    return tuple(records)


def read_text(path: Path) -> str:
    """A whole UTF-8 file, without a byte-order mark."""
    data = _bytes(path)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        line = data.count(b"\n", 0, problem.start) + 1
        bad = data[problem.start : problem.start + 1].hex()
        raise UserError(
            f"{path} line {line} is not UTF-8 (byte 0x{bad} at offset {problem.start}): save the file as UTF-8"
        ) from None


def column(record: Record, name: str, *, meaning: str | None = None) -> object:
    """The value of one column, or a `UserError` with the columns there are and the likeliest one."""
    if name in record.values:
        return record.values[name]
    what = f'"{name}"' if meaning in (None, name) else f'"{name}" (for {meaning})'
    raise UserError(
        f"{record.where} has no column {what}{did_you_mean(name, record.values)}, only "
        f"{', '.join(record.values) or 'none'}: rename the column, or name the right one in the settings"
    )


def text_column(record: Record, name: str, *, meaning: str | None = None, blank: bool = False) -> str:
    """The value of one column as text that is not blank; with `blank`, null and blank are text too."""
    value = column(record, name, meaning=meaning)
    if blank and value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f'{record.where}: column "{name}" is {_show(value)}, not text: write it as a string')
    if not blank and not value.strip():
        raise UserError(f'{record.where}: column "{name}" is blank ({_show(value)}): fill it in or drop the row')
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(
            f'{record.where}: column "{name}" holds half of a surrogate pair, which is not text: remove it'
        ) from None
    return value


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as problem:
        raise UserError(f"{path} cannot be read ({problem.strerror}): check its permissions") from None


def parse_json(text: str, where: str, *, remedy: str = "mend the file or write it again") -> object:
    """The value of a JSON text; whatever keeps it from being read is a `UserError`, and so is a key that stands twice.

    Args:
        where: the file, and the place in it, for messages.
        remedy: what to do about a text that is not JSON.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as problem:
        line = f" line {problem.lineno}" if "\n" in text else ""
        raise UserError(f"{where}{line} is not JSON ({problem.msg} at column {problem.colno}): {remedy}") from None
    except _Twice as problem:
        raise UserError(f"{where} has the key {_show(problem.args[0])} twice: leave one of them out") from None
    except RecursionError:
        raise UserError(f"{where} is JSON that is nested too deep to be read: {remedy}") from None
    except ValueError:  # an integer of thousands of digits
        raise UserError(f"{where} holds a number that is too long to be read: {remedy}") from None


class _Twice(Exception):
    """A key of an object that stands in it twice."""


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        raise _Twice(next(key for key, _ in pairs if key in seen or seen.add(key)))  # type: ignore[func-returns-value]
    return values


def _array(text: str, name: str) -> tuple[Record, ...]:
    values = _parsed(text, name)
    assert isinstance(values, list)  # it begins with a bracket
    return tuple(_record(f"{name} item {number}", value) for number, value in enumerate(values, start=1))


def _parsed(text: str, where: str) -> object:
    return parse_json(text, where, remedy="write one JSON object a line, or one array")


def _parquet(path: Path) -> tuple[Record, ...]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(pyarrow.BufferReader(_bytes(path))).to_pylist()
    except UserError:
        raise
    except Exception as problem:  # not Parquet, a column twice, strings that are not UTF-8, odd dates: no common base
        raise UserError(
            f"{path} is not a readable Parquet file ({one_line(problem)}): write it again, or use JSON lines"
        ) from None
    return tuple(Record(f"{path} row {number}", values) for number, values in enumerate(rows, start=1))


def _record(where: str, value: object) -> Record:
    if not isinstance(value, dict):
        raise UserError(f'{where} is {_show(value)}, not an object: write it as {{"id": ..., "input": ...}}')
    return Record(where, value)


def _near_miss(path: Path) -> str:
    if not path.parent.is_dir():
        return ""
    return did_you_mean(path.name, [other.name for other in path.parent.iterdir()])


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
