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
            raise UserError(f"the corruption's samples is {self.samples}; give at least 1 (10 is usual).")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"the corruption's seed is {self.seed}; give a number from 0 to 4294967295.")

    def bind(self, model: LanguageModel, probes: Sequence[EncodedFact]) -> Corruptor:
        return _Swapped(model, self, probes)


class _Swapped(Corruptor):
    """Tokens of other subjects, length by length. What is compared is tokens, so that a donor changes the span and no more."""

    def __init__(self, model: LanguageModel, asked: TokenReplacement, probes: Sequence[EncodedFact]) -> None:
        self.model, self.asked = model, asked
        self._pool: dict[tuple[object, ...], dict[tuple[int, ...], set[str]]] = {}
        """place -> another subject's tokens -> the answers that it has there"""
        for probe in probes:
            start, end = probe.span
            own = self._pool.setdefault(self._place(probe), {})
            own.setdefault(probe.prompt_ids[start:end], set()).add(probe.fact.answer)

    def why_not(self, probe: EncodedFact) -> str | None:
        if self._names(probe):
            return None
        length = probe.span[1] - probe.span[0]
        return f"no other subject of {length} token{'s' if length > 1 else ''} fits its question with another answer"

    def rows(self, probe: EncodedFact) -> int:
        return len(self._names(probe))

    def batch(self, probe: EncodedFact) -> Tensor:
        start, end = probe.span
        rows = [probe.input_ids]
        rows += [[*probe.input_ids[:start], *name, *probe.input_ids[end:]] for name in self._names(probe)]
        return torch.stack([embed(self.model, row) for row in rows]).detach()

    def key(self, probe: EncodedFact) -> str:
        return f"replaced by {self._names(probe)}"

    def _place(self, probe: EncodedFact) -> tuple[object, ...]:
        """What a donor must share with a fact: the tokens round the subject; or the subject's length, and whether it begins with
        a space."""
        start, end = probe.span
        if self.asked.any_question:
            piece = str(self.model.tokenizer.convert_ids_to_tokens(probe.prompt_ids[start]))
            return end - start, piece.startswith(_SPACES)
        return probe.prompt_ids[:start], probe.prompt_ids[end:]

    def _names(self, probe: EncodedFact) -> list[tuple[int, ...]]:
        """The other subjects' tokens, drawn once for each fact by the seed."""
        start, end = probe.span
        own, answer = probe.prompt_ids[start:end], probe.fact.answer
        pool = self._pool.get(self._place(probe), {})
        fit = sorted(
            name for name, said in pool.items() if len(name) == len(own) and name != own and answer not in said
        )
        order = np.random.RandomState(self.asked.seed).permutation(len(fit))[: self.asked.samples]
        return [fit[place] for place in order]
