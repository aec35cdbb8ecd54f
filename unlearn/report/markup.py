"""HTML and SVG elements, escaped by default: text becomes markup only as the child of an element that is built here.

Text from models and files passes through `escape` in one place, so a page cannot be made to run or load anything by
what a model says. It is no template engine and knows nothing of reports.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from typing import TypeAlias

_VOID = frozenset({"meta", "br", "col"})
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


class Html(str):
    """Markup that is safe to write as it stands. Any other `str` is text, and is escaped."""

    __slots__ = ()


Child: TypeAlias = "str | Iterable[str] | None"


def escape(text: str) -> Html:
    """Text as markup, for content and for quoted attributes.

    Control characters and lone surrogates, which HTML and UTF-8 cannot hold, become U+FFFD, and so do overrides of
    the writing direction, which could make a text look like another. CR LF becomes LF.
    """
    if isinstance(text, Html):
        return text
    return Html(html.escape(_CONTROLS.sub("\ufffd", text.replace("\r\n", "\n")), quote=True))


def el(name: str, /, *children: Child, **attributes: str | float | None) -> Html:
    """One element.

    Args:
        name: the tag.
        children: text (escaped), `Html` (kept), several of these, or None (left out).
        attributes: `class_` for `class`, `fill_opacity` for `fill-opacity`, `viewBox` as it is; None is left out.
    """
    opened = name
    for key, value in attributes.items():
        if value is not None:
            spelled = key.rstrip("_").replace("_", "-")
            opened += f' {spelled}="{escape(number(value) if isinstance(value, float) else str(value))}"'
    if name in _VOID:
        return Html(f"<{opened}>")
    return Html(f"<{opened}>{join(*children)}</{name}>")


def join(*children: Child) -> Html:
    """Children one after the other."""
    out = []
    for child in children:
        if child is None:
            continue
        out += [escape(child)] if isinstance(child, str) else [escape(one) for one in child]
    return Html("".join(out))


def number(value: float) -> str:
    """A drawing coordinate: two decimals at most."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if value % 1 else f"{value:.0f}"
