"""Local files as records or texts: JSON lines, JSON, Parquet, plain text; what is wrong is said with file and line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from lm.errors import UserError
from lm.sources import one_line


def find_files(path: Path, suffixes: Sequence[str]) -> list[Path]:
    """The file itself, or the files of a folder that have the first suffix of which there are any, by name."""
    if path.is_file():
        if path.suffix.lower() not in suffixes:
            raise UserError(f"{path} is no file this can read: give one of {', '.join(suffixes)}")
        return [path]
    if not path.is_dir():
        raise UserError(f"{path} does not exist: give a file or a folder of files ({', '.join(suffixes)})")
    for suffix in suffixes:
        found = sorted(file for file in path.glob(f"*{suffix}") if file.is_file() and not file.name.startswith("."))
        if found:
            return found
    raise UserError(f"the folder {path} holds none of {', '.join(suffixes)}: give one that does, or a file")


def read_records(file: Path) -> Iterator[tuple[str, Mapping[str, object]]]:
    """`(where, record)` of each record of a JSON-lines, JSON (one array) or Parquet file."""
    if file.suffix.lower() == ".parquet":
        yield from _parquet(file)
        return
    text = read_text(file)
    if text.lstrip().startswith("["):
        items = _json(text, str(file))
        assert isinstance(items, list)  # it begins with a bracket
        yield from ((f"{file} item {place}", _record(item, f"{file} item {place}")) for place, item in enumerate(items))
        return
    for place, line in enumerate(text.split("\n"), start=1):  # not splitlines: U+2028 may stand inside a string
        if line.strip():
            where = f"{file} line {place}"
            yield where, _record(_json(line, where), where)


def value_of(record: Mapping[str, object], where: str, column: str, *, blank: bool = False) -> str:
    """The text in a column; with `blank`, null and empty ones are the empty text."""
    if column not in record:
        raise UserError(f"{where} has no column {column!r}, it has {', '.join(record) or 'none'}: name the right one")
    value = record[column]
    if blank and value is None:
        return ""
    if not isinstance(value, str) or (not blank and not value.strip()):
        raise UserError(f"{where}: the column {column!r} is {value!r:.60} and not text: mend it or leave the row out")
    return value


def text_documents(file: Path, new_document: str | None) -> list[str]:
    """A text file as one document, or one from each line that matches the pattern (see `TextFiles`)."""
    text = read_text(file)
    if new_document is None:
        return [text]
    try:
        pattern = re.compile(new_document)
    except re.error as error:
        raise UserError(f"new_document {new_document!r} is no regular expression: {one_line(error)}") from error
    documents: list[list[str]] = [[]]
    for line in text.split("\n"):
        if pattern.match(line) and documents[-1]:
            documents.append([])
        documents[-1].append(line)
    return [joined for lines in documents if (joined := "\n".join(lines)).strip()]


def read_text(file: Path) -> str:
    """A whole UTF-8 file, without a byte-order mark; line ends become `\\n`."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text (byte {error.start}): save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read: {one_line(error)}") from error


def _json(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON ({error.msg}): write one object a line, or one array") from error


def _record(value: object, where: str) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise UserError(f"{where} is {value!r:.60} and not an object: write one JSON object a record")
    return value


def _parquet(file: Path) -> Iterator[tuple[str, Mapping[str, object]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(file).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file} is not a readable Parquet file, write it again: {one_line(error)}") from error
    yield from ((f"{file} row {place}", row) for place, row in enumerate(rows))
