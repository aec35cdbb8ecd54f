"""The command: `palimpsest STAGE [--config NAME|FILE] [--dotted.setting value]`, and `palimpsest configs`.

It reads the first word, imports the packages of that stage alone, and leaves the rest to `lm.config.script`. Whatever needs no
stage (`--help`, `--version`, `configs`) is answered without importing any of them, which would take seconds.
"""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from palimpsest.shipped import all_shipped, is_path, purpose, shipped_in, shipped_path
from palimpsest.stages import STAGES, Stage

_USAGE = """\
usage: palimpsest STAGE [--config NAME|FILE] [--SETTING VALUE ...]
       palimpsest STAGE --help            the settings of a stage
       palimpsest configs [NAME]          the configs that are shipped; of one, where its file is
       palimpsest --version

Find where a language model stores what it must not keep, take it out, prove that it is gone, and look inside.

stages, in the order of the work:
{stages}

On several processes:
  accelerate launch --config_file "$(palimpsest configs accelerate/cpu2_ddp)" -m palimpsest unlearn --config builtin
"""


def main(words: Sequence[str] | None = None) -> None:
    """Run the command with these words; None takes the command line.

    Exits with status 2 after one line on stderr for whatever the user can mend, with 130 after Ctrl-C.
    """
    first, *rest = [*(sys.argv[1:] if words is None else words)] or ["--help"]
    if first in ("--help", "-h", "help"):
        print(_USAGE.format(stages=_columns([(stage.name, stage.line) for stage in STAGES])), end="")
    elif first == "--version":
        from palimpsest import __version__

        print(f"palimpsest {__version__}")
    elif first == "configs":
        print(_configs(rest))
    else:
        _run(_stage(first), rest)


def run_script(file: str) -> None:
    """Be `palimpsest STAGE` with the words of the command line, for `scripts/<stage>.py`, whose `__file__` is given.

    A script's folder stands first on the path of imports, where `scripts/unlearn.py` would hide the package `unlearn`, here and
    in every process that this one starts: it is taken off before any package is imported.
    """
    script = Path(file).resolve()
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != script.parent]
    main([script.stem.replace("_", "-"), *sys.argv[1:]])


def _stage(name: str) -> Stage:
    stages = {stage.name: stage for stage in STAGES}
    if name not in stages:
        _refuse(f"there is no stage {name!r}{_near(name, [*stages, 'configs'])}: palimpsest --help lists them")
    return stages[name]


def _configs(words: Sequence[str]) -> str:
    """The list of shipped configs, or the path of the one that is named."""
    if not words:
        return _columns([(name, purpose(name)) for name in all_shipped()])
    if words[0] not in all_shipped():
        _refuse(f"no config {words[0]!r} is shipped{_near(words[0], all_shipped())}: palimpsest configs lists them")
    return str(shipped_path(words[0]))


def _run(stage: Stage, words: Sequence[str]) -> None:
    arguments = arguments_of(stage, words)
    from lm.config import ending_in_one_line, script
    from lm.devices import is_main
    from lm.errors import printable

    def run(config: Any) -> None:
        result = stage.run()(config)
        if is_main():
            print(printable(stage.describe()(config, result)))

    with ending_in_one_line():  # a stage may need a package that is not installed
        program = f"palimpsest {stage.name}" + (" RUN..." if stage.operands else "")
        script(run, stage.config_class(), description=_description(stage), argv=arguments, program=program)


def _description(stage: Stage) -> str:
    names = shipped_in(stage.folder)
    return stage.help().strip() + (f"\n\nshipped configs: {', '.join(names)}" if names else "")


def arguments_of(stage: Stage, words: Sequence[str]) -> list[str]:
    """The words with the file in the place of a shipped config's name, and operands under the setting that takes them."""
    arguments: list[str] = []
    operands: list[str] = []
    rest = iter(words)
    for word in rest:
        flag, equals, beside = word.partition("=")
        if flag == "--config" and (named := beside if equals else next(rest, None)) is not None:
            arguments += ["--config", _config_file(stage, named)]
        elif word in ("--help", "-h") or equals:
            arguments.append(word)
        elif word.startswith("--"):
            arguments += [word, *([value] if (value := next(rest, None)) is not None else [])]
        elif stage.operands:
            operands.append(word)
        else:
            arguments.append(word)
    if operands:
        arguments += [f"--{stage.operands}", json.dumps(operands)]
    if stage.default and not any(word == "--config" for word in arguments):
        arguments = ["--config", _config_file(stage, stage.default), *arguments]
    return arguments


def _config_file(stage: Stage, word: str) -> str:
    """The file of `--config WORD`: a path as it stands, else the shipped config of that name."""
    if is_path(word):
        return word
    known = shipped_in(stage.folder)
    if word not in known:
        listed = (
            f"give one of {', '.join(known)}, or a file" if known else "give a file: none is shipped for this stage"
        )
        _refuse(f"palimpsest {stage.name} has no shipped config {word!r}{_near(word, known)}: {listed}")
    return str(shipped_path(f"{stage.folder}/{word}" if stage.folder else word))


def _near(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _refuse(sentence: str) -> NoReturn:
    """End as for a `UserError` (which is not imported: its package takes seconds)."""
    print(f"error: {sentence}", file=sys.stderr)
    raise SystemExit(2)


def _columns(rows: Sequence[tuple[str, str]]) -> str:
    width = max(len(first) for first, _ in rows)
    return "\n".join(f"  {first:<{width}}  {second}".rstrip() for first, second in rows)
