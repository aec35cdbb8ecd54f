"""Configs written before a name changed: read as what they meant, with a notice for every word that is another one now.

A saved config must outlive a refactoring, or `--resume` is worth nothing. Four things may be old: a class path with the
module a class used to be in (now the bare class name is written), the name of a class (`formerly` on the class), a key
(`old_keys` on the dataclass: the old dotted key -> the new one; `short_keys` likewise, for what may be written short and is
no news) and a value (`old_values`: a field -> old value -> new one). And a list of one may be written without brackets, now as
ever. Nothing here knows of any particular experiment.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from lm.errors import UserError

PACKAGES = ("lm", "tracing", "sae", "unlearn")
"""Whose classes are written by their bare names; anybody else's keep their module, which is how they are found."""
_PLAIN = (str, int, float)
_PATH = re.compile(rf"(?:{'|'.join(PACKAGES)})(?:\.[a-z_]\w*)+\.([A-Za-z]\w*)")


def class_name(cls: type[Any]) -> str:
    """How a config names a class: bare, or with its module if it is not one of this project's."""
    own = cls.__module__.partition(".")[0] in PACKAGES
    return cls.__qualname__ if own else f"{cls.__module__}.{cls.__qualname__}"


def subclasses(axis: type[Any]) -> dict[str, type[Any]]:
    """Every class of an axis that is imported, by its bare name."""
    named: dict[str, type[Any]] = {}
    for sub in axis.__subclasses__():
        named[sub.__name__] = sub
        named.update(subclasses(sub))
    return named


def axis_of(hint: Any) -> type[Any] | None:
    """The axis that a type hint stands for, or None."""
    return hint if isinstance(hint, type) and getattr(hint, "config_axis", False) else None


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The default of a field, made anew where it is made; `dataclasses.MISSING` where it has none."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def upgraded(values: Any, cls: type[Any], notices: list[str] | None = None) -> Any:
    """A config as plain data, as `cls` spells it today. What is not understood stays as it is: the parser will refuse it.

    Args:
        values: what YAML held.
        cls: a dataclass.
        notices: gets a sentence for every key or class that has another name now.
    """
    heard = [] if notices is None else notices
    if (axis := _axis_itself(values, cls)) is not None:
        return _of_axis(copy.deepcopy(values), axis, heard, "")
    return _of_dataclass(copy.deepcopy(values), cls, heard, "")


def completed(values: Any, cls: type[Any]) -> Any:
    """A saved config as plain data with the settings that are younger than it, at any depth, at the defaults they have.

    The defaults stand in it as they are in Python, not as plain data.

    Args:
        values: what was saved of one, every setting of that time, spelled as today (`upgraded`).
        cls: its dataclass.
    """
    if (axis := _axis_itself(values, cls)) is not None:
        return _complete_of_hint(values, axis, None)
    return _complete(values, cls, None)


def upgraded_words(words: Sequence[str], cls: type[Any], notices: list[str]) -> list[str]:
    """Command-line words, `--twin.path MODEL` say, with the keys and classes of today."""
    keys = list(_old_keys(cls))
    classes = dict(_old_classes(cls))
    known = {part.__name__ for _, part in _parts(cls)} | set(classes)
    classes |= _old_values(cls)
    out: list[str] = []
    for word in words:
        flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        name = flag.removeprefix("--")
        for old, new, is_news in keys:  # a key inside one that has another name may have another name as well
            inside = name.startswith(f"{old}.") and not new.startswith(f"{old}.")
            if name == old or inside:
                if is_news:
                    notices.append(_renamed(old, new))
                name = new + name.removeprefix(old)
        if (path := _PATH.fullmatch(value)) and path.group(1) in known:
            value = path.group(1)
        if value in classes:
            notices.append(_renamed(value, classes[value]))
            value = classes[value]
        out.append(f"--{name}{equals}{value}" if flag else value)
    return out


def words_with_lists(words: Sequence[str], cls: type[Any]) -> list[str]:
    """Command-line words in which a list of one plain value, `--scope.layers 1` say, has its brackets."""
    lists, out = _lists(cls), list(words)
    for index, word in enumerate(words):
        name, equals, value = word.removeprefix("--").partition("=")
        hint = lists.get(name.replace(".init_args", "")) if word.startswith("--") else None
        if hint is not None and equals:
            out[index] = f"--{name}={_bracketed(value, hint)}"
        elif hint is not None and index + 1 < len(words):
            out[index + 1] = _bracketed(words[index + 1], hint)
    return out


def with_lists(values: Any, cls: type[Any]) -> Any:
    """A config as plain data in which every list of one plain value that was written without brackets is a list."""
    return _with_lists(values, _lists(cls), "")


def refuse_nulls(values: Any, cls: type[Any], where: str, prefix: str = "") -> None:
    """Refuse null for a setting that is never null: nested ones would lose their defaults in it, or fail somewhere inside."""
    hints = typing.get_type_hints(cls)
    for name, value in values.items() if isinstance(values, dict) else ():
        hint = hints.get(name, Any)
        options = (hint, *typing.get_args(hint))
        if value is None and hint is not Any and type(None) not in options:
            raise UserError(
                f"{where}: {prefix}{name} is null, and it needs a value: give one, or leave it out for the default"
            )
        for option in options if isinstance(value, dict) else ():
            axis = axis_of(option)
            if axis is not None and "class_path" in value:
                chosen = subclasses(axis).get(str(value["class_path"]).rpartition(".")[2], axis)
                refuse_nulls(value.get("init_args"), chosen, where, f"{prefix}{name}.")
            elif isinstance(option, type) and dataclasses.is_dataclass(option):
                refuse_nulls(value, option, where, f"{prefix}{name}.")


def nested(dotted: str) -> dict[str, Any]:
    """`a.b` as `{"a": {"b": None}}`."""
    first, _, rest = dotted.partition(".")
    return {first: nested(rest) if rest else None}


def say(notices: Sequence[str]) -> None:
    """Print each notice once."""
    for notice in dict.fromkeys(notices):
        print(f"notice: {notice}", file=sys.stderr)


def _renamed(old: str, new: str) -> str:
    return f"{old} is called {new} now; the old name is still read"


def _of_dataclass(values: Any, cls: type[Any], notices: list[str], prefix: str) -> Any:
    if not isinstance(values, dict):
        return values
    for old, new in _keys(cls):
        if _present(values, old, new):
            if old in getattr(cls, "old_keys", {}):
                notices.append(_renamed(prefix + old, prefix + new))
            _put(values, new, _taken(values, old))
    for name, renamed in getattr(cls, "old_values", {}).items():
        if isinstance(values.get(name), str) and values[name] in renamed:
            notices.append(_renamed(values[name], renamed[values[name]]))
            values[name] = renamed[values[name]]
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.name in values:
            values[field.name] = _of_hint(values[field.name], hints[field.name], notices, f"{prefix}{field.name}.")
    return values


def _of_hint(value: Any, hint: Any, notices: list[str], prefix: str) -> Any:
    if (axis := axis_of(hint)) is not None:
        return _of_axis(value, axis, notices, prefix)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _of_dataclass(value, hint, notices, prefix)
    for part in typing.get_args(hint):
        if axis_of(part) is None and not (dataclasses.is_dataclass(part) or typing.get_args(part)):
            continue
        if isinstance(value, list):
            value = [_of_hint(item, part, notices, prefix) for item in value]
        elif isinstance(value, dict) and typing.get_origin(hint) in (dict, Mapping):
            value = {name: _of_hint(item, part, notices, f"{prefix}{name}.") for name, item in value.items()}
        else:
            value = _of_hint(value, part, notices, prefix)
    return value


def _of_axis(value: Any, axis: type[Any], notices: list[str], prefix: str) -> Any:
    """A chosen class: its bare name or a mapping with `class_path`, or (of the default's class) its settings alone."""
    if isinstance(value, str):
        return _class_today(value, axis, notices)
    if not isinstance(value, dict):
        return value
    known = subclasses(axis)
    if "class_path" not in value:
        for cls in known.values():
            value = _of_dataclass(value, cls, notices, prefix)
        return value
    value["class_path"] = _class_today(str(value["class_path"]), axis, notices)
    chosen = known.get(value["class_path"].rpartition(".")[2])
    if chosen is not None and "init_args" in value:
        value["init_args"] = _of_dataclass(value["init_args"], chosen, notices, prefix)
    return value


def _axis_itself(values: Any, cls: type[Any]) -> type[Any] | None:
    """The axis of `cls`, where a config is not a whole experiment but one choice, saved with its class."""
    if axis_of(cls) is None or not isinstance(values, dict) or "class_path" not in values:
        return None
    return next(base for base in cls.__mro__ if "config_axis" in vars(base))


def _complete(values: Any, cls: type[Any], default: Any) -> Any:
    """`default`: an instance of `cls` that holds the defaults, or None: the class's own."""
    if not isinstance(values, dict):
        return values
    hints, out = typing.get_type_hints(cls), dict(values)
    for field in dataclasses.fields(cls):
        usual = getattr(default, field.name) if isinstance(default, cls) else default_of(field)
        if field.name in out:
            out[field.name] = _complete_of_hint(out[field.name], hints[field.name], usual)
        elif usual is not dataclasses.MISSING:
            out[field.name] = usual
    return out


def _complete_of_hint(value: Any, hint: Any, usual: Any) -> Any:
    if (axis := axis_of(hint)) is not None:
        if not isinstance(value, dict) or "class_path" not in value:
            return value
        chosen = subclasses(axis).get(str(value["class_path"]).rpartition(".")[2])
        if chosen is None:
            return value
        default = usual if type(usual) is chosen else None
        return {**value, "init_args": _complete(value.get("init_args") or {}, chosen, default)}
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        known = {field.name for field in dataclasses.fields(hint)}
        return _complete(value, hint, usual) if isinstance(value, dict) and known.issuperset(value) else value
    for part in typing.get_args(hint):
        if isinstance(value, list):
            value = [_complete_of_hint(item, part, None) for item in value]
        elif isinstance(value, dict) and typing.get_origin(hint) in (dict, Mapping):
            value = {name: _complete_of_hint(item, part, None) for name, item in value.items()}
        else:
            value = _complete_of_hint(value, part, usual)
    return value


def _class_today(name: str, axis: type[Any], notices: list[str]) -> str:
    """The bare name of today. A class that is not imported keeps its path, by which the parser may find it."""
    path = _PATH.fullmatch(name)
    bare = path.group(1) if path else name
    known = subclasses(axis)
    for cls in known.values():
        if bare in vars(cls).get("formerly", ()):
            notices.append(_renamed(bare, cls.__name__))
            return cls.__name__
    return bare if bare in known else name


def _parts(cls: type[Any]) -> Iterator[tuple[str, type[Any]]]:
    """Every dataclass inside a config with the dotted key it stands at, itself first; of an axis, each of its classes."""
    yield "", cls
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        for part in (hint, *typing.get_args(hint)):
            axis = axis_of(part)
            inner = [part] if axis is None else [axis, *subclasses(axis).values()]
            for candidate in inner:
                if dataclasses.is_dataclass(candidate) and isinstance(candidate, type):
                    for key, nested in _parts(candidate):
                        yield f"{field.name}.{key}" if key else field.name, nested


def _old_keys(cls: type[Any]) -> Iterator[tuple[str, str, bool]]:
    for at, part in _parts(cls):
        prefix = f"{at}." if at else ""
        for old, new in _keys(part):
            yield prefix + old, prefix + new, old in getattr(part, "old_keys", {})


def _keys(cls: type[Any]) -> list[tuple[str, str]]:
    return [*getattr(cls, "short_keys", {}).items(), *getattr(cls, "old_keys", {}).items()]


def _old_classes(cls: type[Any]) -> Iterator[tuple[str, str]]:
    for _, part in _parts(cls):
        for name in vars(part).get("formerly", ()):
            yield name, part.__name__


def _old_values(cls: type[Any]) -> dict[str, str]:
    return {
        old: new
        for _, part in _parts(cls)
        for renamed in getattr(part, "old_values", {}).values()
        for old, new in renamed.items()
    }


def _present(values: dict[str, Any], dotted: str, new: str) -> bool:
    """Whether the old key is there; where the new one is inside it, a mapping there is the new one already."""
    first, _, rest = dotted.partition(".")
    if first not in values:
        return False
    if not rest:
        return not (new.startswith(f"{dotted}.") and isinstance(values[first], dict))
    return isinstance(values[first], dict) and _present(values[first], rest, new.partition(".")[2])


def _taken(values: dict[str, Any], dotted: str) -> Any:
    first, _, rest = dotted.partition(".")
    return _taken(values[first], rest) if rest else values.pop(first)


def _put(values: dict[str, Any], dotted: str, value: Any) -> None:
    first, _, rest = dotted.partition(".")
    if not rest:
        values.setdefault(first, value)
        return
    inner = values.setdefault(first, {})
    if isinstance(inner, dict):
        _put(inner, rest, value)


def _lists(cls: type[Any]) -> dict[str, Any]:
    """Dotted key -> type, of every setting that is a list of plain values, in each class of an axis that has it."""
    found: dict[str, list[Any]] = {}
    for at, part in _parts(cls):
        hints = typing.get_type_hints(part)
        for field in dataclasses.fields(part):
            found.setdefault(f"{at}.{field.name}".removeprefix("."), []).append(hints[field.name])
    return {key: hints[0] for key, hints in found.items() if all(map(_is_list, hints))}


def _is_list(hint: Any) -> bool:
    """Whether a type is a list of plain values, or one beside words or null; not where one value is something else."""
    if typing.get_origin(hint) is tuple:
        inside = typing.get_args(hint)[0]
        return inside in _PLAIN or typing.get_origin(inside) is typing.Literal
    parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else ()
    return any(map(_is_list, parts)) and not any(part in _PLAIN for part in parts)


def _bracketed(word: str, hint: Any) -> str:
    """A word of the command line, in brackets if it is one plain value."""
    try:
        value = yaml.safe_load(word)
        if _in_list(value, hint) is value:
            return word
        return f"[{word}]" if yaml.safe_load(f"[{word}]") == [value] else json.dumps([word], ensure_ascii=False)
    except yaml.YAMLError:
        return word


def _in_list(value: Any, hint: Any) -> Any:
    literal = [part for part in typing.get_args(hint) if typing.get_origin(part) is typing.Literal]
    words = {each for part in literal for each in typing.get_args(part)} if typing.get_origin(hint) is not tuple else ()
    return [value] if isinstance(value, _PLAIN) and not isinstance(value, bool) and value not in words else value


def _with_lists(values: Any, lists: Mapping[str, Any], at: str) -> Any:
    if not isinstance(values, dict):
        return _in_list(values, lists[at]) if at in lists else values
    return {
        name: _with_lists(value, lists, at if name == "init_args" else f"{at}.{name}".removeprefix("."))
        for name, value in values.items()
    }
