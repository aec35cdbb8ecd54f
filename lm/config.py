"""An experiment as data: a frozen dataclass, one YAML file, dotted overrides; refused before anything loads.

`parse_config` turns command-line words into one checked dataclass (jsonargparse does the type work); `script` wraps a
`main(config)` so that whatever the user can mend ends in one line and exit status 2. This module knows nothing of
any particular experiment: an *axis* (a base dataclass marked with `config_axis = True`, such as the objective) is
chosen by class name, every other field by value.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib
import os
import re
import shutil
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import jsonargparse
import yaml

from lm.data.yaml_files import read_yaml
from lm.errors import UserError, did_you_mean, more_memory, out_of_memory, printable
from lm.old_configs import (
    axis_of,
    class_name,
    completed,
    default_of,
    nested,
    refuse_nulls,
    say,
    subclasses,
    upgraded,
    upgraded_words,
    with_lists,
    words_with_lists,
)
from lm.signals import Terminated, asked_to_end

T = TypeVar("T")

_AXIS = "CLASS"
"""What `--help` shows in the place of an axis's value."""
_NESTED_AXIS = re.compile(
    r"\(type: <class '\w+'>, default: \{'class_path': '(?:\w+\.)*(\w+)'.*\}, known subclasses: ([\w, ]+)\)"
)
_UNKNOWN = (
    r"[Oo]ption '([^']+)' is not accepted",
    r"does not accept option '([^']+)'",
    r"[Uu]nrecognized arguments: --([\w.\-]+)",
    r"Expected a dot import path string: (\S+)",
    r"Got value: (\S+)",
)


def parse_config(
    cls: type[T], argv: Sequence[str] | None = None, *, description: str = "", program: str | None = None
) -> T:
    """Read `--config FILE.yaml` and dotted overrides (`--trainer.steps 50`) into `cls`, later words winning.

    Args:
        cls: a frozen, keyword-only dataclass; nested dataclasses and axes allowed.
        argv: the words; None takes the command line.
        description: the first lines of `--help`, shown as they stand.
        program: what the usage line calls the program; None takes its file's name.

    Raises:
        UserError: a wrong key, type, value or combination, with the nearest known name.
    """
    words = _upgraded(list(sys.argv[1:] if argv is None else argv), cls)
    parser = _parser(cls, description, program=program)
    try:
        axes = [field for field, hint in _fields(cls) if axis_of(hint) is not None]
        parsed = parser.parse_args(words)
        for axis in axes:  # made below: here fields of the default's class stand in it
            parsed.pop(axis.name, None)
        values = parser.instantiate(parsed)
        chosen = {field.name: values[field.name] for field, _ in _fields(cls) if field not in axes}
        if isinstance(chosen.get("out"), str):
            chosen["out"] = os.path.expanduser(chosen["out"])  # a shell does it only at the beginning of a word
        chosen |= {axis.name: _axis_value(cls, words, axis.name, default_of(axis)) for axis in axes}
        return cls(**chosen)
    except UserError:
        raise
    except (jsonargparse.ArgumentError, ValueError, TypeError, OSError, yaml.YAMLError) as error:
        raise UserError(_explain(error, cls)) from error


def find_config(name: str) -> str:
    """The path of a config file: as given, or, if nothing is there and it begins with `configs/`, of the one that is shipped.

    The configs that come with the project name each other as they stand in the checkout (`configs/unlearn/builtin.yaml`). They
    stand beside the packages there, and in the package `palimpsest` once it is installed.
    """
    packages = Path(__file__).resolve().parents[1]
    if Path(name).parts[:1] == ("configs",) and not Path(name).exists():
        for shipped in (packages / "palimpsest" / name, packages / name):
            if shipped.is_file():
                return str(shipped)
    return name


def _upgraded(words: list[str], cls: type[Any]) -> list[str]:
    """The words with config files found and with today's names; of a file that has older ones, its text with today's."""
    notices: list[str] = []
    words = words_with_lists(upgraded_words(words, cls, notices), cls)
    for index, word in enumerate(words):
        in_next_word = word == "--config" and index + 1 < len(words)
        if not in_next_word and not word.startswith("--config="):
            continue
        file = find_config(words[index + 1] if in_next_word else word.removeprefix("--config="))
        if not os.path.isfile(file):
            continue  # the parser says that it is not there
        text, values = read_yaml(Path(file))
        if not isinstance(values, dict | None):
            raise UserError(f"{file} holds no settings: write NAME: VALUE, one a line")
        values, text = ({}, "{}") if values is None else (values, text)
        newer = with_lists(upgraded(values, cls, notices), cls)
        refuse_nulls(newer, cls, file)
        # The text and not the file, which the parser would read in the locale's encoding.
        value = text if newer == values else yaml.safe_dump(newer, sort_keys=False, allow_unicode=True)
        words[index + in_next_word] = value if in_next_word else f"--config={value}"
    for word, value in zip(words, [*words[1:], ""], strict=False):
        name, equals, joined = word.removeprefix("--").partition("=")
        if word.startswith("--") and (joined if equals else value) == "null":
            refuse_nulls(nested(name), cls, "the command line")
    say(notices)
    return words


def script(
    main: Callable[[T], None],
    cls: type[T],
    *,
    description: str,
    argv: Sequence[str] | None = None,
    program: str | None = None,
) -> None:
    """Run `main` on the parsed config (see `parse_config`), ending as `ending_in_one_line` says."""
    known = _known(cls)
    with ending_in_one_line(resumes="resume" in known, settings=known):
        config = parse_config(cls, argv, description=description, program=program)
        _quiet()
        from lm.devices import reporting

        reporting(main)(config)


@contextmanager
def ending_in_one_line(*, resumes: bool = True, settings: Sequence[str] = ()) -> Iterator[None]:
    """What a command does: a `UserError`, or too little memory, prints one line on stderr and exits with status 2, Ctrl-C with
    status 130, a request to end (SIGTERM) with status 143.

    The process group, if one was opened, is left in the end.

    Args:
        resumes: whether the command goes on with finished work when it is told to (`--resume true`) rather than by itself.
        settings: the command's, of which some say how much memory is needed.
    """
    try:
        with asked_to_end():
            yield
    except UserError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt as error:
        how = " with --resume true" if resumes else ""
        print(f"stopped: finished work is kept; the same command{how} goes on", file=sys.stderr)
        raise SystemExit(143 if isinstance(error, Terminated) else 130) from None
    except (MemoryError, RuntimeError) as error:
        said = out_of_memory(error)
        if said is None:
            raise
        print(f"error: out of memory ({said}): {more_memory(settings)}", file=sys.stderr)
        raise SystemExit(2) from None
    finally:
        from lm.devices import leave_process_group

        leave_process_group()


def _quiet() -> None:
    """One progress bar is enough: transformers' own for loading and writing are off in scripts."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def as_dict(config: Any) -> Any:
    """The config as plain data that YAML can hold and `parse_config` reads back; an axis keeps its class name."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        values = {field.name: as_dict(getattr(config, field.name)) for field in dataclasses.fields(config)}
        if getattr(config, "config_axis", False):
            return {"class_path": class_name(type(config)), "init_args": values}
        return values
    if isinstance(config, (list, tuple)):
        return [as_dict(item) for item in config]
    if isinstance(config, dict):
        return {str(key): as_dict(value) for key, value in config.items()}
    return str(config) if isinstance(config, Path) else config


def as_of_today(saved: Any, cls: type[Any]) -> Any:
    """What `as_dict` gave of a config some time ago, as it would today: with today's names, and defaults for what is younger."""
    return as_dict(completed(upgraded(saved, cls), cls))


def dump_yaml(config: Any) -> str:
    """The config as YAML text, in field order."""
    return str(yaml.safe_dump(as_dict(config), sort_keys=False, allow_unicode=True))


def known_or_near(word: str, known: Sequence[str]) -> str:
    """`" (did you mean 'x'?)"`, or the whole list when nothing is near and it is short, or nothing."""
    if near := did_you_mean(word, known):
        return near
    tails = {name.rsplit(".", 1)[-1]: name for name in known}  # a dotted key may be right but for its prefix
    if tail := difflib.get_close_matches(word.rsplit(".", 1)[-1], list(tails), n=1, cutoff=0.75):
        return f" (did you mean '{tails[tail[0]]}'?)"
    return f" (known: {', '.join(known)})" if 0 < len(known) <= 16 else ""


class _Help(argparse.RawDescriptionHelpFormatter, jsonargparse.DefaultHelpFormatter):
    """`--help` with the description as it stands and types in words; choices that stand beside the name are not repeated."""

    def __init__(self, prog: str) -> None:
        width = min(shutil.get_terminal_size().columns, 120) - 2
        super().__init__(prog, max_help_position=28, width=width)  # type: ignore[no-untyped-call]

    def _get_help_string(self, action: argparse.Action) -> str:
        return str(action.help if action.metavar == _AXIS else super()._get_help_string(action))

    def _get_type_str(self, action: argparse.Action) -> str | None:
        text: str | None = super()._get_type_str(action)
        return None if text is None or text.startswith(("Literal[", "bool")) else _type_in_words(text)

    def _expand_help(self, action: argparse.Action) -> str:
        text = (
            super()._expand_help(action).replace("Path to a configuration file", "A YAML file with the settings below")
        )
        text = re.sub(r"known subclasses: [\w., ]+", lambda names: re.sub(r"[\w.]+\.(?=\w)", "", names[0]), text)
        text = _NESTED_AXIS.sub(r"One of: \2 (default: \1)", text)
        text = re.sub(r"default: \(([^()]*?),?\)", lambda default: f"default: [{default[1]}]".replace("'", ""), text)
        return re.sub(r"default: (True|False)", lambda default: default[0].lower(), text)


def _type_in_words(text: str) -> str:
    """`Optional[tuple[Literal['mlp', 'attn'], ...]]` as `list of mlp | attn | null`."""
    text = re.sub(r"Literal\[([^]]*)\]", lambda choices: choices[1].replace("'", "").replace(", ", " | "), text)
    before = ""
    while before != text:  # from the inside out
        before = text
        text = re.sub(r"tuple\[([^][]*), \.\.\.\]", r"list of \1", text)
        text = re.sub(r"dict\[([^][]*), ([^][]*)\]", r"mapping of \1 to \2", text)
        text = re.sub(r"Optional\[([^][]*)\]", r"\1 | null", text)
        text = re.sub(r"Union\[([^][]*)\]", lambda parts: parts[1].replace(", ", " | "), text)
    return text


def _parser(
    cls: type[Any], description: str, *, program: str | None = None, partial: bool = False
) -> jsonargparse.ArgumentParser:
    """`partial`: for some of the words, in which what is required may be missing."""
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog=program,
        usage=f"%(prog)s [--config {'NAME|FILE' if program else 'FILE'}] [--SETTING VALUE ...]",
        description=description,
        formatter_class=_Help,
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="A YAML file with any of the settings below.")
    docs = _attribute_docs(cls)
    for field, hint in _fields(cls):
        default = default_of(field)
        axis = axis_of(hint)
        if default is dataclasses.MISSING:
            parser.add_argument(f"--{field.name}", type=hint, required=not partial, help=docs.get(field.name))
        elif axis is not None:
            jsonargparse.set_parsing_settings(subclasses_enabled=[axis])
            chosen: type[Any] = type(default)
            values = {f.name: getattr(default, f.name) for f in dataclasses.fields(default)}
            parser.add_subclass_arguments(
                axis,
                field.name,
                default={"class_path": class_name(chosen), "init_args": values},
                metavar=_AXIS,
                help=f"{docs.get(field.name, '')}{_choices(axis)} "
                f"(default: {chosen.__name__}; its settings: --{field.name}.help CLASS)",
            )
        else:
            parser.add_argument(f"--{field.name}", type=hint, default=default, help=docs.get(field.name))
    return parser


def _choices(axis: type[Any]) -> str:
    names = sorted(subclasses(axis))
    return f" One of: {', '.join(names)}" if names else ""


def _axis_value(cls: type[Any], words: list[str], name: str, default: Any) -> Any:
    """What an axis was set to: the chosen class with *its own* defaults and only the fields that were given for it.

    jsonargparse carries fields of equal name over from one class to the next (from the default's, or from a file's);
    another objective must not inherit this one's settings.
    """
    parser = _parser(cls, "", partial=True)
    setting = parser.parse_args(words, defaults=False).get(name)
    if setting is None:
        return default
    flags = [index for index, word in enumerate(words) if word == "--config" or word.startswith("--config=")]
    of_files = {index + step for index in flags for step in ((0, 1) if words[index] == "--config" else (0,))}
    in_files = parser.parse_args([words[index] for index in sorted(of_files)], defaults=False).get(name)
    if in_files is not None and in_files["class_path"] != setting["class_path"]:
        overrides = [word for index, word in enumerate(words) if index not in of_files]
        setting = parser.parse_args(overrides, defaults=False)[name]
    module, _, kind = str(setting["class_path"]).rpartition(".")
    chosen = getattr(importlib.import_module(module), kind)
    kept = {f.name: getattr(default, f.name) for f in dataclasses.fields(default)} if type(default) is chosen else {}
    hints, given = typing.get_type_hints(chosen), setting.get("init_args") or {}
    return chosen(**{**kept, **{name: _built(hints[name], value) for name, value in dict(given).items()}})


def _built(hint: Any, value: Any) -> Any:
    """What the parser left as names and values, as the dataclass that `hint` says; lists of them as tuples."""
    if typing.get_origin(hint) is tuple and isinstance(value, list | tuple):
        return tuple(_built(typing.get_args(hint)[0], each) for each in value)
    if isinstance(value, jsonargparse.Namespace | dict):
        options = (hint, *typing.get_args(hint))
        for option in options:
            if isinstance(option, type) and dataclasses.is_dataclass(option):
                hints = typing.get_type_hints(option)
                values = vars(value) if isinstance(value, jsonargparse.Namespace) else value
                if set(values) <= {"class_path", "init_args"}:  # as the parser names a class inside a list
                    values = dict(values.get("init_args") or {})
                return option(**{name: _built(hints[name], each) for name, each in values.items()})
    return value


def _fields(cls: type[Any]) -> list[tuple[dataclasses.Field[Any], Any]]:
    hints = typing.get_type_hints(cls)
    return [(field, hints[field.name]) for field in dataclasses.fields(cls)]


def _attribute_docs(cls: type[Any]) -> dict[str, str]:
    """The string that stands under each field in the class body, or in that of the class it is inherited from."""
    from docstring_parser import parse_from_object

    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            docs |= {
                item.arg_name: " ".join((item.description or "").split()) for item in parse_from_object(base).params
            }
    return docs


def _known(cls: type[Any], prefix: str = "") -> list[str]:
    names: list[str] = []
    for field, hint in _fields(cls):
        name = prefix + field.name
        names.append(name)
        for part in (hint, *typing.get_args(hint)):
            axis = axis_of(part)
            for kind, sub in subclasses(axis).items() if axis is not None else ():
                names += [kind, *_known(sub, name + ".")]
            if dataclasses.is_dataclass(part) and isinstance(part, type) and axis is None:
                names += _known(part, name + ".")
            if typing.get_origin(part) is typing.Literal:
                names += [str(value) for value in typing.get_args(part)]
        if typing.get_origin(hint) is typing.Literal:
            names += [str(value) for value in typing.get_args(hint)]
    return list(dict.fromkeys(names))


def _explain(error: Exception, cls: type[Any]) -> str:
    text = " ".join(str(error).split())
    if wrong := re.match(r'Parser key "([\w.]+)":', text):
        key = wrong.group(1)
        axis = axis_of({field.name: hint for field, hint in _fields(cls)}.get(key))
        if axis is not None and (word := re.search(r"Expected a dot import path string: (\S+)", text)):
            names = sorted(subclasses(axis))
            return f"{key} is {word.group(1)!r}{did_you_mean(word.group(1), names)}: choose one of {', '.join(names)}"
        if (given := re.search(r"Given value: (.+)$", text)) and "dict[" in text:
            return f'{key} is {given.group(1)!r} and takes names with values: write --{key} \'{{"name": "value"}}\''
    for pattern in _UNKNOWN:
        if unknown := re.search(pattern, text):
            hint = known_or_near(unknown.group(1).removeprefix("init_args."), _known(cls))
            if "Got value" in pattern and hint.startswith(" (known"):
                hint = ""  # a free value that is near no name
            return text.rstrip(".") + hint
    if text.startswith("unrecognized arguments"):
        text += ": write settings as --name value"
    return text.rstrip(".")
