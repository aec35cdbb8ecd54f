"""How the code stands: no import runs in a circle, no name hides a module, no folder is a crowd, no file is long.

`make floors` says the same of the order of the packages (import-linter's contracts in pyproject.toml); here are the rules that it
has no contract for, read from the files alone.
"""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("lm", "tracing", "sae", "unlearn", "palimpsest", "tools")
MOST_FILES = 15
MOST_LINES = 400


def modules(root: Path) -> dict[str, Path]:
    """Every module of the packages by its dotted name; a package stands for its `__init__`."""
    paths = {path for package in PACKAGES for path in (root / package).rglob("*.py")}
    names = {path: path.relative_to(root).with_suffix("").parts for path in paths}
    return {".".join(parts[:-1] if parts[-1] == "__init__" else parts): path for path, parts in names.items()}


def imports(path: Path, known: Mapping[str, Path]) -> set[str]:
    """The known modules that a file imports, wherever in it: inside functions and for types alone as well."""
    named: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            named |= {name if (name := f"{node.module}.{alias.name}") in known else node.module for alias in node.names}
    return named & set(known)


def relative_imports(known: Mapping[str, Path]) -> Iterator[str]:
    """`from . import x` and its like, which `imports` does not follow: an import names its module in full."""
    for name, path in known.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level > 0:
                yield f"{name}:{node.lineno}"


@cache
def graph(root: Path) -> dict[str, set[str]]:
    """From each module to those that it imports."""
    known = modules(root)
    return {name: imports(path, known) - {name} for name, path in known.items()}


def rooms(edges: Mapping[str, set[str]], package: str) -> dict[str, set[str]]:
    """The same between what stands side by side in a package: its files, and its folders with all that is in them."""

    def room(name: str) -> str | None:
        inside = name.startswith(f"{package}.")
        return f"{package}.{name.removeprefix(f'{package}.').partition('.')[0]}" if inside else None

    between: dict[str, set[str]] = {}
    for name, imported in edges.items():
        if (here := room(name)) is not None:
            others = {there for one in imported if (there := room(one)) not in (None, here)}
            between.setdefault(here, set()).update(there for there in others if there is not None)
    return between


def in_circles(edges: Mapping[str, set[str]]) -> list[str]:
    """The nodes from which a way leads back to themselves."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        ahead = [start]
        while ahead:
            new = edges.get(ahead.pop(), set()) - seen
            seen |= new
            ahead += new
        return seen

    return sorted(node for node in edges if node in reached(node))


def packages_of(known: Mapping[str, Path]) -> list[str]:
    return sorted(name for name, path in known.items() if path.name == "__init__.py")


def hidden(known: Mapping[str, Path], package: str) -> Iterator[str]:
    """Modules of a package that a name in its `__init__` stands in front of."""
    for node in ast.parse(known[package].read_text()).body:
        if isinstance(node, ast.ImportFrom):
            bound = {a.asname or a.name for a in node.names if f"{node.module}.{a.name}" not in known}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            bound = {node.name}
        elif isinstance(node, ast.Assign):
            bound = {target.id for target in node.targets if isinstance(target, ast.Name)}
        else:
            continue
        yield from (f"{package}.{name}" for name in sorted(bound) if f"{package}.{name}" in known)


def settings() -> dict[str, dict[str, object]]:
    tool: dict[str, dict[str, object]] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    return tool


# --- the house


def test_no_file_imports_itself_by_way_of_others() -> None:
    assert in_circles(graph(ROOT)) == []


@pytest.mark.parametrize("package", packages_of(modules(ROOT)))
def test_no_rooms_side_by_side_import_each_other_in_a_circle(package: str) -> None:
    assert in_circles(rooms(graph(ROOT), package)) == []


def test_no_module_is_hidden_by_a_name_of_its_package() -> None:
    known = modules(ROOT)
    assert [name for package in packages_of(known) for name in hidden(known, package)] == []


def test_every_import_names_its_module_in_full() -> None:
    assert list(relative_imports(modules(ROOT))) == []


def test_no_folder_is_a_crowd() -> None:
    folders = {
        *(path.parent for path in modules(ROOT).values()),
        *map(ROOT.joinpath, ("scripts", "benchmarks", "docs", "configs")),
    }
    files = {
        folder: [path for path in folder.iterdir() if path.is_file() and path.name != "py.typed"] for folder in folders
    }
    assert {folder: len(inside) for folder, inside in files.items() if len(inside) > MOST_FILES} == {}


def test_no_file_is_long() -> None:
    paths = [*modules(ROOT).values(), *(ROOT / "scripts").glob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    assert {path: n for path in paths if (n := len(path.read_text().splitlines())) > MOST_LINES} == {}


def test_nothing_patches_the_path_of_imports_but_the_command() -> None:
    """`scripts/` hides packages by files of their names; the command takes it off the path, for all of them."""
    patching = [
        path.relative_to(ROOT).as_posix()
        for folder in (*PACKAGES, "scripts", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        if "sys.path" in path.read_text()
    ]
    assert patching == ["palimpsest/command.py"]


def test_every_script_is_three_lines() -> None:
    for path in (ROOT / "scripts").glob("*.py"):
        docstring, *lines = ast.parse(path.read_text()).body
        assert isinstance(docstring, ast.Expr), path
        assert [ast.unparse(line) for line in lines] == [
            "from palimpsest.command import run_script",
            "if __name__ == '__main__':\n    run_script(__file__)",
        ], path


def test_types_imports_and_contracts_are_checked_in_every_package() -> None:
    tool = settings()
    ruff = tool["ruff"]["lint"]
    assert isinstance(ruff, dict)
    assert set(PACKAGES) == set(tool["mypy"]["packages"])  # type: ignore[call-overload]
    assert set(PACKAGES) == set(ruff["isort"]["known-first-party"])
    assert set(PACKAGES) == set(tool["importlinter"]["root_packages"])  # type: ignore[call-overload]


# --- the rules see what they are about


def written(folder: Path, files: Mapping[str, str]) -> Path:
    """A checkout of these files."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def crooked(tmp_path: Path) -> Path:
    """A package `lm` with a circle of files (one arrow of it lazy, one for types), one of rooms, and a hidden module."""
    files = {
        "lm/__init__.py": "from lm.load import load\n",
        "lm/load.py": "def load():\n    from lm.check import check\n",
        "lm/check.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from lm import load\n",
        "lm/near/__init__.py": "",
        "lm/near/one.py": "from lm.far import one\n",
        "lm/near/two.py": "",
        "lm/far/__init__.py": "",
        "lm/far/one.py": "",
        "lm/far/two.py": "import lm.near.two\n",
    }
    return written(tmp_path, files)


def test_the_rules_see_circles_and_hidden_modules(crooked: Path) -> None:
    edges = graph(crooked)
    assert in_circles(edges) == ["lm.check", "lm.load"]
    assert in_circles(rooms(edges, "lm")) == ["lm.check", "lm.far", "lm.load", "lm.near"]
    assert in_circles(rooms(edges, "lm.near")) == []
    assert list(hidden(modules(crooked), "lm")) == ["lm.load"]


def test_the_rules_see_relative_imports(tmp_path: Path) -> None:
    """Of the module beside, of the package itself, of the one above, and inside a function."""
    files = {
        "lm/__init__.py": "from lm.near import one\n",
        "lm/near/__init__.py": "from .one import two\n",
        "lm/near/one.py": "import lm\nfrom . import other\n",
        "lm/near/other.py": "def load():\n    from ..near import one\n",
    }
    assert sorted(relative_imports(modules(written(tmp_path, files)))) == [
        "lm.near.one:2",
        "lm.near.other:2",
        "lm.near:1",
    ]
