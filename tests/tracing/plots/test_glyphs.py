"""Pictures show every text: in a font that has it, or escaped; no boxes, and no warnings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from matplotlib.font_manager import fontManager, get_font
from tiny_tracing import made_up

from tracing import plot, plot_severed
from tracing.plots import glyphs
from tracing.plots.glyphs import FAMILY, families, readable

pytestmark = pytest.mark.filterwarnings("error")
STRANGE = ("中文", "🐢", "ᶁ", " ", "\n\u0000", "$x$")


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No font is installed but matplotlib's own."""
    own = [font for font in glyphs._fonts() if font[0] == FAMILY]
    glyphs._family_of.cache_clear()
    monkeypatch.setattr(glyphs, "_fonts", lambda: own)
    yield
    glyphs._family_of.cache_clear()


def test_letters_that_no_font_has_are_escaped(alone: None) -> None:
    assert [readable(text) for text in STRANGE] == [
        r"\u4e2d\u6587",
        r"\U0001f422",
        r"\u1d81",
        "␣",
        "⏎�",
        r"\$x\$",
    ]
    assert readable("żółw a b, Østergaun") == "żółw a b, Østergaun"
    assert readable("") == ""
    assert families(*STRANGE) == [FAMILY]


def test_a_font_that_is_installed_is_taken_where_it_has_the_letter() -> None:
    path = next(one.fname for one in fontManager.ttflist if one.name == FAMILY)
    assert not get_font(path).get_char_index(ord("ᶁ"))
    assert readable("ᶁa") == "ᶁa"  # STIX comes with matplotlib and has it
    first, other = families("ᶁa")
    assert first == FAMILY
    assert not other.startswith("Last Resort")
    assert any(get_font(one.fname).get_char_index(ord("ᶁ")) for one in fontManager.ttflist if one.name == other)
    assert families("abc", "żółw") == [FAMILY]


@pytest.mark.parametrize("fonts", ["alone", None])
def test_pictures_of_strange_tokens_neither_warn_nor_fail(fonts: str | None, request: pytest.FixtureRequest) -> None:
    if fonts:
        request.getfixturevalue(fonts)
    effects = made_up([0.1, 0.4, 0.2], facts=2)
    strange = replace(
        effects, facts=(replace(effects.facts[0], id="事实 🐢 ᶁ $"), *effects.facts[1:]), tokens=(STRANGE,) * 2
    )
    assert plot(strange, 0).png != plot(replace(strange, tokens=(("a",) * 6,) * 2), 0).png
    assert plot(strange).png.startswith(b"\x89PNG")
    assert plot_severed({"什么 🐢 $a$": effects}, kind="mlp").png.startswith(b"\x89PNG")
