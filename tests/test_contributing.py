"""What CONTRIBUTING.md says of adding to an axis holds: each guide is three steps whose code runs in order and checks itself."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.forked import run_forked

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
AXES = ("an objective", "a score", "a tracing metric", "a localizer", "an attack", "an architecture")


def guide(axis: str) -> str:
    """The section that says how to add to an axis."""
    found = re.search(rf"^### Add {axis}\n(.*?)(?=^##|\Z)", TEXT, re.DOTALL | re.MULTILINE)
    assert found, f"CONTRIBUTING.md has no section 'Add {axis}'"
    return found[1]


def blocks(section: str) -> list[str]:
    """Its Python code, block by block."""
    return [
        re.sub("^   ", "", block, flags=re.MULTILINE)
        for block in re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    ]


@pytest.mark.parametrize("axis", AXES)
def test_a_guide_is_three_steps_with_code_and_the_last_one_checks(axis: str) -> None:
    section = guide(axis)
    assert re.findall(r"^(\d)\. ", section, re.MULTILINE) == ["1", "2", "3"]
    code = blocks(section)
    assert len(code) == 3
    assert any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(code[2])))


@pytest.mark.parametrize("axis", AXES)
def test_the_code_of_a_guide_runs_as_it_stands(axis: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "guide.py"
    script.write_text("\n\n".join(blocks(guide(axis))))
    monkeypatch.chdir(tmp_path)
    done = run_forked(script)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", re.findall(r"`((?:lm|tracing|unlearn|sae|palimpsest|tests|docs)/[\w/.]+)`", TEXT))
def test_every_file_that_it_names_is_there(name: str) -> None:
    assert (ROOT / name).exists()
