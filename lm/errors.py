"""The one error that a user can mend: bad input, a bad file, an impossible combination.

Every message is a sentence that names the thing, the value and the remedy. Scripts print it on one line and
exit with status 2; anything else that is raised is a defect of this project.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection


class UserError(ValueError):
    """Something the user can put right. The message says what, and how."""


class NotWritten(UserError):
    """A file that could not be written: a full disk, a missing right."""


def did_you_mean(word: str, known: Collection[str]) -> str:
    """`" (did you mean 'x'?)"` for the closest known word, or nothing."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean '{near[0]}'?)" if near else ""
