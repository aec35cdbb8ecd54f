"""Palimpsest: find where a language model stores what it must not keep, take it out, prove that it is gone, and look inside.

The public names of the four packages, to be had from one place: `palimpsest.load`, `palimpsest.trace`, `palimpsest.Scope`; and
the packages themselves: `palimpsest.lm`, `palimpsest.tracing`, `palimpsest.sae`, `palimpsest.unlearn`. A package comes first
where a function has its name: `palimpsest.unlearn.unlearn(model, …)`. Nothing is imported before it is asked for, so the
command (`palimpsest.command`) answers `--help` at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import lm as lm
    import sae as sae
    import tracing as tracing
    import unlearn as unlearn
    from lm import *  # noqa: F403
    from sae import *  # noqa: F403
    from tracing import *  # noqa: F403
    from unlearn import *  # type: ignore[no-redef]  # noqa: F403  # a package comes before a function of its name

    __version__: str

PACKAGES = ("lm", "tracing", "sae", "unlearn")
DISTRIBUTION = "palimpsest-unlearning"


def __getattr__(name: str) -> Any:
    if name in PACKAGES:
        return importlib.import_module(name)
    if name == "__version__":
        return _version()
    if not name.startswith("_"):
        for package in map(importlib.import_module, PACKAGES):
            if name in package.__all__:
                return getattr(package, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    names = {name for package in PACKAGES for name in importlib.import_module(package).__all__}
    return sorted({*globals(), *names, *PACKAGES, "__version__"})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return "0+uninstalled"  # a checkout on the path
