"""Text that pictures can show: in fonts that are installed, or escaped where none of them has the letter.

matplotlib's own font lacks Chinese, most emoji and many scripts; it would draw boxes, and warn. No font is shipped for them.
"""

from __future__ import annotations

from functools import cache

from matplotlib.font_manager import fontManager, get_font

FAMILY = "DejaVu Sans"
"""Comes with matplotlib, and is asked first."""


def readable(text: str) -> str:
    """The text as it can be drawn: line breaks and lone spaces as signs, `\\u4e2d` for a letter that no installed font has.
    Dollars are escaped, since they would begin mathematics."""
    if text and not text.strip(" "):
        return "␣" * len(text)
    return "".join(_shown(letter) for letter in text).replace("$", r"\$")


def families(*texts: str) -> list[str]:
    """The fonts that these texts need, in the order in which matplotlib is to look for each letter."""
    needed = (_family_of(letter) for text in texts for letter in text)
    return list(dict.fromkeys([FAMILY, *(name for name in needed if name is not None)]))


def _shown(letter: str) -> str:
    if letter == "\n":
        return "⏎"
    if not letter.isprintable():
        return "�"
    if _family_of(letter) is not None:
        return letter
    return f"\\u{ord(letter):04x}" if ord(letter) < 0x10000 else f"\\U{ord(letter):08x}"


@cache
def _family_of(letter: str) -> str | None:
    """The first installed font that has the letter, upright and of regular weight; None if none has it."""
    for name, path in _fonts():
        if get_font(path).get_char_index(ord(letter)):
            return name
    return None


@cache
def _fonts() -> list[tuple[str, str]]:
    """(family, file) of what is installed, ours first. Last Resort, which has a box for every letter, is no font to read."""
    found = {
        (one.name, one.fname)
        for one in fontManager.ttflist
        if one.style == "normal" and one.weight == 400 and not one.name.startswith("Last Resort")
    }
    return sorted(found, key=lambda one: (one[0] != FAMILY, one))
