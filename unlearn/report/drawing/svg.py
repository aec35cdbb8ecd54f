"""SVG elements, escaped by default: text becomes markup only as the child of an element that is built here.

The page itself is a jinja2 template; drawings are computed mark by mark, so they are built here.
"""

from __future__ import annotations

import re

from markupsafe import Markup, escape

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


def printable(text: str) -> str:
    """Text that HTML and UTF-8 can hold; markup is left as it is.

    Control characters and lone surrogates become U+FFFD, and so do overrides of the writing direction, which could make a
    text look like another. CR LF becomes LF.
    """
    return text if isinstance(text, Markup) else _CONTROLS.sub("\ufffd", text.replace("\r\n", "\n"))


def el(name: str, /, *children: str | None, **attributes: str | float | None) -> Markup:
    """One element.

    Args:
        name: the tag.
        children: text (escaped), `Markup` (kept), or None (left out).
        attributes: `class_` for `class`, `fill_opacity` for `fill-opacity`, `viewBox` as it is; None is left out.
    """
    opened = name
    for key, value in attributes.items():
        if value is not None:
            spelled = key.rstrip("_").replace("_", "-")
            text = number(value) if isinstance(value, float) else str(value)
            opened += f' {spelled}="{escape(printable(text))}"'
    inside = "".join(escape(printable(child)) for child in children if child is not None)
    return Markup(f"<{opened}>{inside}</{name}>")


def drawing(
    width: float, height: float, description: str, *parts: Markup, class_: str = "chart", fixed: bool = False
) -> Markup:
    """An SVG element that says what it shows, and scales with its column unless it is `fixed`."""
    size = {"width": width, "height": height} if fixed else {}
    box = f"0 0 {width:g} {height:g}"
    return el("svg", *parts, class_=class_, viewBox=box, role="img", aria_label=description, **size)


def number(value: float) -> str:
    """A drawing coordinate: two decimals at most."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if value % 1 else f"{value:.0f}"
