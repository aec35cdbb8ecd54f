"""Token roles: what a prompt's tokens are to its subject, so that effects can be averaged over prompts of other lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from lm.errors import UserError

Aggregation = Literal["fixed", "authors"]
ROLES = ("before", "first_subject", "middle_subject", "last_subject", "first_after", "further", "last")
SUBJECT_ROLES = ("first_subject", "middle_subject", "last_subject")


def token_roles(tokens: int, span: tuple[int, int], aggregation: Aggregation = "fixed") -> dict[str, list[int]]:
    """The prompt positions of each role; with `fixed`, every position has exactly one.

    A one-token subject is `last_subject` (it ends there, and that row carries the claim about subjects). The last
    prompt token is `last` unless it belongs to the subject; `first_after` is the token after the subject unless it
    is the last one.

    Args:
        tokens: how many tokens the prompt has.
        span: `[start, end)` of the subject.
        aggregation: `authors` gives the positions that the authors of the joint method drew, to compare with their
            pictures: their last subject token is the first one again, their first token after the subject is the one
            after that, and `further` begins with it.
    """
    start, end = span
    if not 0 <= start < end <= tokens:
        raise UserError(f"a subject span of {start}:{end} does not lie in a prompt of {tokens} tokens")
    last = [tokens - 1] if end < tokens else []
    if aggregation == "authors":
        return {
            "before": list(range(start)),
            "first_subject": [start],
            "middle_subject": list(range(start + 1, end - 1)),
            "last_subject": [start],
            "first_after": [end + 1] if end + 1 < tokens else [],
            "further": list(range(end + 1, tokens - 1)),
            "last": [tokens - 1],
        }
    return {
        "before": list(range(start)),
        "first_subject": [start] if end - start > 1 else [],
        "middle_subject": list(range(start + 1, end - 1)),
        "last_subject": [end - 1],
        "first_after": [end] if end < tokens - 1 else [],
        "further": list(range(end + 1, tokens - 1)),
        "last": last,
    }


def check_roles(roles: Sequence[str]) -> None:
    """Raise UserError for no roles or one that does not exist."""
    wrong = [role for role in roles if role not in ROLES]
    if wrong or not roles:
        raise UserError(f"the token roles {tuple(wrong or roles)} are not usable: choose of {', '.join(ROLES)}")


def check_reached(roles: Sequence[str], positions: str) -> None:
    """Raise UserError for roles that do not exist, or of which none has tokens where these positions are traced."""
    check_roles(roles)
    if positions == "subject_and_last" and not set(roles) & {*SUBJECT_ROLES, "last"}:
        raise UserError(
            f"the roles {', '.join(roles)} are not traced with positions subject_and_last: use positions: all"
        )
