"""What several sections show: a framed drawing with its caption, and the same numbers as a table."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A drawing with its caption: a title, a few words after it, a second line, a color key."""

    title: str
    drawing: Markup
    note: str = ""
    small: str = ""
    key: Markup | None = None


@dataclass(frozen=True, kw_only=True)
class NumberTable:
    """A plain table: a head for each column, the first that of the rows, and a row of cells, each with words to hover for."""

    caption: str
    label: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """Tables behind a fold: for those who cannot see colors or want to copy."""

    summary: str
    tables: tuple[NumberTable, ...]
