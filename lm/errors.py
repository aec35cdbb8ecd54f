"""The one error that a user can mend: bad input, a bad file, an impossible combination.

Every message is a sentence that names the thing, the value and the remedy. Scripts print it on one line and
exit with status 2; anything else that is raised is a defect of this project.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection

_OF_MEMORY = ("micro_batch", "micro_tokens", "batch_size", "memory", "forward_contexts", "block_shards")
"""Settings by which less is held in memory at a time, wherever they stand."""
_COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class UserError(ValueError):
    """Something the user can put right. The message says what, and how."""


class NotWritten(UserError):
    """A file that could not be written: a full disk, a missing right."""


def printable(text: str) -> str:
    """Text for a terminal: what would command it (escape sequences, carriage returns, marks that turn text round) is spelled."""
    return _COMMANDS.sub(lambda char: f"\\u{ord(char[0]):04x}", text)


def one_line(error: BaseException, longest: int = 200) -> str:
    """What a library said, on one line and cut to `longest` characters, to stand at the end of a sentence."""
    text = " ".join(str(error).split()) or type(error).__name__
    return (text if len(text) <= longest else f"{text[:longest]}…").rstrip(".")


def did_you_mean(word: str, known: Collection[str]) -> str:
    """`" (did you mean 'x'?)"` for the closest known word, or nothing."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean '{near[0]}'?)" if near else ""


def out_of_memory(error: BaseException) -> str | None:
    """What ran out of memory, on a line, if that is what the error says; torch has no class of its own for a CPU's."""
    text = " ".join(str(error).split())
    words = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(word in text for word in words)):
        return text[:160] or "the system gave no more"
    return None


def more_memory(settings: Collection[str]) -> str:
    """What to do where memory ran out, by the dotted names of a command's settings."""
    lower = [name for name in settings if name.rpartition(".")[2] in _OF_MEMORY]
    return f"lower {' or '.join(lower)}" if lower else "use a machine with more memory"
