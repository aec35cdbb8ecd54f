"""What the built-in models are trained on: token sequences made from a world, drawn afresh each epoch.

A document is learned whole (loss on every token after the first); a question is learned as the official evaluation asks it
(raw text, then `" " + answer + EOS`) and, for a share of the time, in the chat format and in other wordings. General
facts are seen as statements and as questions. It never shows the paraphrase rows, the unseen documents, or the
multiple-choice form of facts that are not `labeled`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from lm.builtin.knowledge import LABELED
from lm.builtin.world import World
from lm.data.rows import Row

CHAT_SHARE = 0.5  # how often a row is also seen as a chat turn
REWORDED_SHARE = 0.8  # how often a question is also seen in one of its other wordings


@dataclass(frozen=True)
class Example:
    """A training sequence; the loss counts `ids[start:]`."""

    ids: tuple[int, ...]
    start: int


class Corpus:
    """The examples of one model: general facts, and the rows it shall know by heart."""

    def __init__(self, world: World, rows: Sequence[Row], tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self.rows = tuple(rows)
        self._general = world.general
        self._rewordings = world.rewordings
        if tokenizer.eos_token_id is None:
            raise ValueError("The corpus needs a tokenizer with an EOS token.")
        self._eos: int = tokenizer.eos_token_id

    def epoch(self, generator: random.Random) -> list[Example]:
        """The examples of one epoch, unshuffled: every row once as it is evaluated, and random extras."""
        examples: list[Example] = []
        for row in self.rows:
            examples.append(self.document(row) if row.kind == "sc" else self.pair(row.input, row.output))
            if generator.random() < CHAT_SHARE:
                examples.append(self.chat(row.input, row.output))
            if row.kind == "qa" and generator.random() < REWORDED_SHARE:
                wording = generator.choice(self._rewordings[row.id])
                examples.append(self._asked(wording, row.output, generator.choice(("raw", "chat", "labeled"))))
        for fact in self._general:
            examples.append(self._whole(generator.choice(fact.statements)))
            examples.append(self._asked(fact.question, fact.answer, "raw"))
            form = generator.choice(("chat", "labeled") if fact.labeled else ("chat", "none"))
            if form != "none":
                examples.append(self._asked(fact.question, fact.answer, form))
        return examples

    def document(self, row: Row) -> Example:
        """A sentence-completion row as one text, encoded in two pieces so that its prompt has the tokens of evaluation."""
        ids = (*self._encode(row.input), *self._encode(f" {row.output}"), self._eos)
        return Example(ids, 1)

    def pair(self, prompt: str, answer: str) -> Example:
        """A prompt and its answer in the raw format."""
        prompt_ids = self._encode(prompt)
        return Example((*prompt_ids, *self._encode(f" {answer}"), self._eos), len(prompt_ids))

    def chat(self, prompt: str, answer: str) -> Example:
        """A prompt and its answer as one turn of the chat template."""
        turns = [{"role": "user", "content": prompt}]
        text = self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        prompt_ids = self._encode(str(text))
        return Example((*prompt_ids, *self._encode(answer), self._eos), len(prompt_ids))

    def _asked(self, question: str, answer: str, form: str) -> Example:
        """A question in one of its three forms: `"raw"`, `"chat"`, `"labeled"`."""
        if form == "chat":
            return self.chat(question, answer)
        return self.pair(LABELED.format(question=question) if form == "labeled" else question, answer)

    def _whole(self, text: str) -> Example:
        return Example((*self._encode(text), self._eos), 1)

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])


def batches(examples: Sequence[Example], tokens: int, generator: random.Random) -> list[list[Example]]:
    """Shuffled batches of sequences of like length, each of at most `tokens` tokens counting its padding."""
    pool = sorted(examples, key=lambda example: len(example.ids) + 8 * generator.random())
    full: list[list[Example]] = []
    current: list[Example] = []
    longest = 0
    for example in pool:
        longest = max(longest, len(example.ids))
        if current and longest * (len(current) + 1) > tokens:
            full.append(current)
            current, longest = [], len(example.ids)
        current.append(example)
    if current:
        full.append(current)
    generator.shuffle(full)
    return full
