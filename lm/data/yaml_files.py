"""Reading YAML: a UTF-8 file as plain data, or one sentence that says what is wrong with it and where.

YAML allows what no config means: a key twice (the last would win in silence), aliases that unfold into billions of values,
a value inside itself. These are refused here. What the settings are called is not known here (`lm.config`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from lm.data.files import read_text
from lm.errors import UserError, one_line

LARGEST = 100_000
"""Values that a file may unfold into."""


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key that stands twice; what `<<` merges in, a key beside it may set anew."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if (key.tag, key.value) in seen:
                reason = f"the key {key.value!r} stands twice"
                raise yaml.constructor.ConstructorError(None, None, reason, key.start_mark)
            seen.add((key.tag, key.value))
        return node


def read_yaml(path: Path) -> tuple[str, Any]:
    """The text of a YAML file, and what it holds. Raises UserError for a file that cannot be read, by its name and line."""
    text = read_text(path)
    try:
        values = yaml.load(text, _Loader)
        size = _size(values, {}, frozenset())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or one_line(error)
        raise UserError(f"{path}{where} is not YAML ({reason}): mend it") from error
    except RecursionError:
        raise UserError(f"{path} is nested too deep to be read, or holds itself by an alias: mend it") from None
    except (ValueError, OverflowError, TypeError) as error:  # a date that is none, a number of thousands of digits
        raise UserError(
            f"{path} holds a value that cannot be read ({one_line(error)}): mend it, or put it in quotes"
        ) from None
    if size > LARGEST:
        raise UserError(f"{path} unfolds by its aliases into more than {LARGEST} values: write out what it means")
    return text, values


def _size(value: Any, known: dict[int, int], inside: frozenset[int]) -> int:
    """How many values a value holds, those that aliases repeat each time; each is counted once and remembered."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) in inside:
        raise RecursionError
    if id(value) not in known:
        children = [*value, *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_size(child, known, inside | {id(value)}) for child in children)
    return known[id(value)]
