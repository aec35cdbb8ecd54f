"""What rows of logits are scored against: the answers, the foils, the words that count, and the clean pass.

What is made of them is a metric's (`tracing.question.metrics`). Probabilities are taken in float32 (float64 stays), whatever the
model's type.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from einops import repeat
from torch import Tensor

_WORD = re.compile(r"[\w@][\w@.:/'’+-]*\w|\w")
_OPENER = re.compile(
    r"(?i)an?|and|at|by|for|from|he|her|his|i|in|is|its?|my|no|of|on|she|the|their|there|they|this|to|was|we|with|yes"
)


class Scored(Protocol):
    """What a target is made of: a `tracing.question.encoded_fact.EncodedFact`."""

    @property
    def answer_ids(self) -> Sequence[int]: ...
    @property
    def foil(self) -> tuple[int, int] | None: ...
    @property
    def counted(self) -> Sequence[int] | None: ...


@dataclass(frozen=True, kw_only=True)
class Target:
    """The answers of some rows, all of one length, and what they are to be told apart from.

    Attributes:
        answer: (rows, n) token ids.
        place: (rows,), the first of the n tokens in which answer and foil differ; or None without foils.
        foil: (rows,), the foil's token there; or None.
        counted: (rows, n) bool, the answer tokens of the words that count, for the metrics that count words; or None for all.
        clean: (facts, n, vocabulary), log-probabilities of each fact's clean pass, for the metrics that compare with it; or None.
        fact: (rows,), the place of each row's fact in `clean`; or None.
    """

    answer: Tensor
    place: Tensor | None = None
    foil: Tensor | None = None
    counted: Tensor | None = None
    clean: Tensor | None = None
    fact: Tensor | None = None

    @classmethod
    def of(cls, facts: Sequence[Scored], each: int) -> Target:
        """Of some facts, `each` rows a fact, one after the other."""
        answer = torch.tensor([list(fact.answer_ids) for fact in facts])
        counted = torch.ones_like(answer, dtype=torch.bool)
        for row, fact in enumerate(facts):
            if fact.counted is not None:
                counted[row] = False
                counted[row, list(fact.counted)] = True
        foils = [list(fact.foil) for fact in facts if fact.foil is not None]
        place, foil = torch.tensor(foils).T if len(foils) == len(facts) else (None, None)

        def rows(values: Tensor | None) -> Tensor | None:
            return None if values is None else repeat(values, "facts ... -> (facts each) ...", each=each)

        return cls(
            answer=repeat(answer, "facts n -> (facts each) n", each=each),
            place=rows(place),
            foil=rows(foil),
            counted=rows(None if bool(counted.all()) else counted),
            fact=repeat(torch.arange(len(facts)), "facts -> (facts each)", each=each),
        )

    def beside(self, clean: Tensor) -> Target:
        """The same with the logits of each fact's clean pass, (facts, n, vocabulary)."""
        return replace(self, clean=log_softmax(clean))

    def rows(self, chosen: Tensor | slice) -> Target:
        """Some of the rows."""
        return Target(
            answer=self.answer[chosen],
            place=None if self.place is None else self.place[chosen],
            foil=None if self.foil is None else self.foil[chosen],
            counted=None if self.counted is None else self.counted[chosen],
            clean=self.clean,
            fact=None if self.fact is None else self.fact[chosen],
        )

    def repeat(self, times: int) -> Target:
        """All rows, several times over."""
        return self.rows(torch.arange(len(self.answer)).repeat(times))


def distinguishing(prompt: str, answer: str) -> list[tuple[int, int]]:
    """`[start, end)` of the answer's words that tell it from other answers, in characters: names and numbers.

    Words with a digit, an @ or a capital letter that the prompt does not hold; a sentence's first word counts unless it is a
    common opener such as "The". Where there are none, all words that the prompt does not hold, and else the whole answer.
    """
    asked = {word.casefold() for word in _WORD.findall(prompt)}
    new = [word for word in _WORD.finditer(answer) if word[0].casefold() not in asked]
    telling = [word for word in new if _is_telling(word[0])]
    return [word.span() for word in telling or new] or [(0, len(answer))]


def _is_telling(word: str) -> bool:
    return any(letter.isdigit() or letter == "@" or letter.isupper() for letter in word) and not _OPENER.fullmatch(word)


def first_difference(answer: Sequence[int], foil: Sequence[int]) -> tuple[int, int] | None:
    """(place, the foil's token): where a foil first differs from the answer; None if it does not within the answer."""
    for place, (mine, other) in enumerate(zip(answer, foil, strict=False)):
        if mine != other:
            return place, int(other)
    return None


def token_log_probabilities(logits: Tensor, answer: Tensor) -> Tensor:
    """log p(answer_i | prompt, answer_<i), (rows, n) float64, of logits (rows, n, vocabulary) and token ids (rows, n)."""
    chosen = answer.to(logits.device).unsqueeze(-1)
    return log_softmax(logits).gather(-1, chosen).squeeze(-1).double()


def log_softmax(logits: Tensor) -> Tensor:
    """Log-probabilities in float32, or in float64 where the logits are."""
    return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)
