"""Symmetric token replacement: the subject becomes another one of as many tokens, so that nothing leaves the distribution.

Gaussian noise puts a prompt where the model never was; another name does not, and what is restored then is what tells one
subject from the other (Zhang and Nanda 2023, arXiv:2309.16042). Names come from the other facts: those that fit the same
question, at the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lm.errors import UserError
from lm.model import LanguageModel
from tracing.corruption.noise import Corruption, Corruptor
from tracing.question.encoded_fact import EncodedFact, embed

_SPACES = ("Ġ", "▁", " ")
"""How tokenizers write a space that a token begins with: byte-level ones, sentence pieces, plain."""


@dataclass(frozen=True, kw_only=True)
class TokenReplacement(Corruption):
    """Put other facts' subjects in place of a fact's own: those of facts that ask the same question, as long in tokens.

    "The same question" is the same prompt but for the subject; `any_question` allows all subjects whose first token begins with
    a space where the fact's own does (a name that a sentence begins with has another form, which fits nowhere else). Subjects
    with the same answer do not count: with them nothing would be corrupted. A fact for which no subject fits is left out, with
    the reason. Badge: faithful to the practice of Zhang and Nanda (2023), whose pairs were made by hand.
    """

    samples: int = 10
    """How many other subjects a fact gets at most."""
    seed: int = 1
    """Of their choice."""
    any_question: bool = False
    """Also subjects of facts that ask something else."""

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise UserError(f"the corruption's samples is {self.samples}: give at least 1 (10 is usual)")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"the corruption's seed is {self.seed}: give a number from 0 to 4294967295")

    def bind(self, model: LanguageModel, encoded_facts: Sequence[EncodedFact]) -> Corruptor:
        return _Swapped(model, self, encoded_facts)


class _Swapped(Corruptor):
    """Tokens of other subjects, length by length. What is compared is tokens, so that a donor changes the span and no more."""

    def __init__(self, model: LanguageModel, asked: TokenReplacement, encoded_facts: Sequence[EncodedFact]) -> None:
        self.model, self.asked = model, asked
        self._pool: dict[tuple[object, ...], dict[tuple[int, ...], set[str]]] = {}
        """place -> another subject's tokens -> the answers that it has there"""
        for encoded in encoded_facts:
            start, end = encoded.span
            own = self._pool.setdefault(self._place(encoded), {})
            own.setdefault(encoded.prompt_ids[start:end], set()).add(encoded.fact.answer)

    def why_not(self, encoded: EncodedFact) -> str | None:
        if self._names(encoded):
            return None
        length = encoded.span[1] - encoded.span[0]
        return f"no other subject of {length} token{'s' if length > 1 else ''} fits its question with another answer"

    def rows(self, encoded: EncodedFact) -> int:
        return len(self._names(encoded))

    def batch(self, encoded: EncodedFact) -> Tensor:
        start, end = encoded.span
        rows = [encoded.input_ids]
        rows += [[*encoded.input_ids[:start], *name, *encoded.input_ids[end:]] for name in self._names(encoded)]
        return torch.stack([embed(self.model, row) for row in rows]).detach()

    def key(self, encoded: EncodedFact) -> str:
        return f"replaced by {self._names(encoded)}"

    def _place(self, encoded: EncodedFact) -> tuple[object, ...]:
        """What a donor must share with a fact: the tokens round the subject; or the subject's length, and whether it begins with
        a space."""
        start, end = encoded.span
        if self.asked.any_question:
            piece = str(self.model.tokenizer.convert_ids_to_tokens(encoded.prompt_ids[start]))
            return end - start, piece.startswith(_SPACES)
        return encoded.prompt_ids[:start], encoded.prompt_ids[end:]

    def _names(self, encoded: EncodedFact) -> list[tuple[int, ...]]:
        """The other subjects' tokens, drawn once for each fact by the seed."""
        start, end = encoded.span
        own, answer = encoded.prompt_ids[start:end], encoded.fact.answer
        pool = self._pool.get(self._place(encoded), {})
        fit = sorted(
            name for name, said in pool.items() if len(name) == len(own) and name != own and answer not in said
        )
        order = np.random.RandomState(self.asked.seed).permutation(len(fit))[: self.asked.samples]
        return [fit[place] for place in order]
