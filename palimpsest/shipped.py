"""The configs that come with the project: which there are, what each is for, and the file that a name stands for.

They stand in `configs/` of the checkout and are installed as `palimpsest/configs/`; names and first lines are all that is read
here. A config that names another is followed by `lm.config.find_config`.
"""

from __future__ import annotations

from pathlib import Path

_INSTALLED = Path(__file__).resolve().parent / "configs"
CONFIGS = _INSTALLED if _INSTALLED.is_dir() else _INSTALLED.parents[1] / "configs"
SUFFIXES = (".yaml", ".yml")


def shipped_in(folder: str) -> list[str]:
    """The shipped configs of a folder of `configs/`, by name."""
    return sorted(path.stem for path in (CONFIGS / folder).glob("*.yaml"))


def all_shipped() -> list[str]:
    """Every shipped config with its folder, `unlearn/builtin` say."""
    return sorted(path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.rglob("*.yaml"))


def shipped_path(name: str) -> Path:
    """The file of a shipped config, `unlearn/builtin` say; it may not be there."""
    return CONFIGS / f"{name}.yaml"


def purpose(name: str) -> str:
    """What a shipped config is for: the line of comment that it begins with, without a sentence that goes on below."""
    line = shipped_path(name).read_text(encoding="utf-8").partition("\n")[0]
    comment = line.removeprefix("#").strip() if line.startswith("#") else ""
    whole, stop, _ = comment.rpartition(". ")
    return f"{whole}." if stop and not comment.endswith(".") else comment


def is_path(word: str) -> bool:
    """Whether what follows `--config` is a file rather than the name of a shipped config."""
    return "/" in word or "\\" in word or word.endswith(SUFFIXES) or Path(word).is_file()
