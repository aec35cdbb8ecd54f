"""One package that has the public names of all: each is the thing itself, and none stands for two."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import pytest

import lm
import palimpsest
import tracing
import unlearn

ROOT = Path(__file__).resolve().parents[2]


def test_the_names_are_those_of_the_packages() -> None:
    assert palimpsest.load is lm.load
    assert palimpsest.trace is tracing.trace
    assert palimpsest.Scope is unlearn.Scope
    assert palimpsest.lm is lm
    assert palimpsest.unlearn is unlearn
    assert {"load", "trace", "Scope", "SparseAutoencoder", "lm", "unlearn", "__version__"} <= set(dir(palimpsest))
    for package in palimpsest.PACKAGES:
        module = importlib.import_module(package)
        for name in module.__all__:
            if name not in palimpsest.PACKAGES:
                assert getattr(palimpsest, name) is getattr(module, name), name


def test_no_public_name_stands_for_two_things_or_hides_a_module() -> None:
    packages = [importlib.import_module(package) for package in palimpsest.PACKAGES]
    things = {(name, id(getattr(package, name))) for package in packages for name in package.__all__}  # Row is in two
    names = Counter(name for name, _ in things)
    assert [name for name, count in names.items() if count > 1] == []
    modules = {module.name for module in pkgutil.iter_modules(palimpsest.__path__)}
    assert modules & set(names) == set()


def test_an_unknown_name_is_refused_as_python_does() -> None:
    with pytest.raises(AttributeError, match="module 'palimpsest' has no attribute 'trase'"):
        palimpsest.trase  # noqa: B018


def test_the_version_is_that_of_the_installed_distribution() -> None:
    assert palimpsest.__version__ == version("palimpsest-unlearning")


def test_importing_it_imports_nothing_heavy() -> None:
    code = "import sys, palimpsest; print([name for name in ('torch', 'lm', 'unlearn') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
