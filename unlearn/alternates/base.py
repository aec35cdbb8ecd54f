"""The axis "alternates": what a forget row's question is to be answered with instead.

Refusals, random tokens, or answers from a file, such as `unlearn.alternates.stage` writes. What is done with them is an
objective's business (`DPO`, `LearnAlternate`, `FLAT`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from lm.data.files import Record, column, find_files, read_file, text_column
from lm.data.rows import Row
from lm.errors import UserError
from lm.model import LanguageModel, special_ids
from lm.prompts import Encoded, PromptSpec, check_ids, encode_pair, max_positions
from lm.row_files import canonical_id, row_name

REFUSALS = (
    "I don't know.",
    "I do not know that.",
    "I'm not sure about that.",
    "I have no information about this.",
    "That is not something I know.",
    "I can't tell you, because I don't know it myself.",
    "I'm afraid I have no answer to that.",
    "This is unknown to me.",
    "I haven't learned anything about that.",
    "My knowledge doesn't cover this.",
    "Sorry, I can't say.",
    "I have never come across that.",
    "No idea, I'm sorry.",
    "I don't have that detail.",
    "I couldn't tell you.",
    "That's outside of what I know.",
    "I would only be guessing.",
    "There is nothing I can tell you about that.",
    "I don't recall anything of the kind.",
    "I'm unable to answer that, since I don't know.",
    "Nothing about this is familiar to me.",
    "I wish I knew, but I don't.",
    "You would have to look that up: I don't know.",
    "I cannot help with that, it is not something I was told.",
)
"""Sentences that say "I don't know"."""


@dataclass(frozen=True, kw_only=True)
class Alternates:
    """What a forget row's question is answered with instead.

    The axis "alternates".
    """

    config_axis: ClassVar[bool] = True

    def encode(self, model: LanguageModel, rows: Sequence[Row], prompt: PromptSpec) -> list[tuple[Encoded, ...]]:
        """For each row its alternates as token ids, after the row's own prompt. In epoch e a row takes number e mod k of k.

        Raises:
            UserError: a row without an alternate, or with one that is longer than the model can read.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class NoAlternates(Alternates):
    """None, for objectives that read none."""

    def encode(self, model: LanguageModel, rows: Sequence[Row], prompt: PromptSpec) -> list[tuple[Encoded, ...]]:
        """Nothing."""
        return []


@dataclass(frozen=True, kw_only=True)
class _Drawn:
    """Drawn for each row by a seed and the row's id, wherever the row stands."""

    per_row: int = 1
    """How many a row has."""
    seed: int = 0
    """Of the draw."""

    def __post_init__(self) -> None:
        if self.per_row < 1:
            raise UserError(f"alternates.per_row is {self.per_row}: give at least 1")

    def generator(self, row: Row) -> np.random.Generator:
        """The row's own randomness."""
        digest = hashlib.sha256(canonical_id(row.id).encode()).digest()
        return np.random.default_rng((self.seed, int.from_bytes(digest[:8], "big")))


@dataclass(frozen=True, kw_only=True)
class Refusals(_Drawn, Alternates):
    """Sentences that say "I don't know", `per_row` of this module's own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.per_row > len(REFUSALS):
            raise UserError(f"alternates.per_row is {self.per_row}: there are {len(REFUSALS)} refusals, so give fewer")

    def encode(self, model: LanguageModel, rows: Sequence[Row], prompt: PromptSpec) -> list[tuple[Encoded, ...]]:
        """The refusals that fall to each row, all different."""
        texts = [
            [REFUSALS[place] for place in self.generator(row).permutation(len(REFUSALS))[: self.per_row]]
            for row in rows
        ]
        return encode_texts(model, rows, texts, prompt)


@dataclass(frozen=True, kw_only=True)
class RandomTokens(_Drawn, Alternates):
    """Random tokens, as many as the row's answer has. They are drawn as ids: as text they would be cut otherwise.

    All tokens of the tokenizer but the special ones are equally likely; an EOS that ends the answer stays.
    """

    def encode(self, model: LanguageModel, rows: Sequence[Row], prompt: PromptSpec) -> list[tuple[Encoded, ...]]:
        """`per_row` draws for each row; a row is no longer than with its own answer."""
        special = set(special_ids(model.tokenizer))
        usable = min(len(model.tokenizer), model.anatomy.vocabulary)
        ordinary = np.array([token for token in range(usable) if token not in special])
        found = []
        for row in rows:
            answer = encode_pair(model.tokenizer, row.input, row.output, prompt)
            first, last = answer.answer_start, len(answer.ids) - (1 if prompt.append_eos else 0)
            draws = self.generator(row).choice(ordinary, size=(self.per_row, last - first)).tolist()
            found.append(tuple(Encoded([*answer.ids[:first], *draw, *answer.ids[last:]], first) for draw in draws))
        return found


@dataclass(frozen=True, kw_only=True)
class AlternateFile(Alternates):
    """Answers from a file: an object a row with its `id` and `alternates`, a list of texts. Ids of other rows do no harm."""

    path: str
    """A JSONL, JSON or Parquet file, or a folder of them: for instance what `palimpsest alternates` wrote."""

    def encode(self, model: LanguageModel, rows: Sequence[Row], prompt: PromptSpec) -> list[tuple[Encoded, ...]]:
        """The file's answers to each row's question."""
        texts = self.read()
        missing = [row.id for row in rows if canonical_id(row.id) not in texts]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise UserError(f"{self.path} has no alternates for row {missing[0]}{more}: add them, or drop the rows")
        return encode_texts(model, rows, [texts[canonical_id(row.id)] for row in rows], prompt)

    def read(self) -> dict[str, tuple[str, ...]]:
        """Canonical id -> texts. Raises UserError for a damaged file, an id that occurs twice, or an empty list."""
        texts: dict[str, tuple[str, ...]] = {}
        for file in find_files(Path(self.path)):
            for record in read_file(file):
                identity = canonical_id(text_column(record, "id"))
                if identity in texts:
                    raise UserError(f"{record.where}: id {identity} occurs twice: join their alternates in one list")
                texts[identity] = _texts(record)
        return texts


def encode_texts(
    model: LanguageModel, rows: Sequence[Row], texts: Sequence[Sequence[str]], prompt: PromptSpec
) -> list[tuple[Encoded, ...]]:
    """For each row its texts as answers to the row's prompt. Raises UserError for one longer than the model can read."""
    limit = max_positions(model)
    encoded_rows = []
    for row, several in zip(rows, texts, strict=True):
        encoded = tuple(encode_pair(model.tokenizer, row.input, text, prompt) for text in several)
        check_ids(model, (one.ids for one in encoded))
        longest = max(len(one.ids) for one in encoded)
        if limit is not None and longest > limit:
            raise UserError(
                f"an alternate of row {row_name(row)} has {longest} tokens with its prompt and {model.name} reads {limit}: "
                "shorten it"
            )
        encoded_rows.append(encoded)
    return encoded_rows


def _texts(record: Record) -> tuple[str, ...]:
    values = column(record, "alternates")
    if not isinstance(values, list) or not values:
        raise UserError(f'{record.where}: column "alternates" is {values!r}: write a list of at least one text')
    return tuple(text_column(Record(record.where, {"alternates": value}), "alternates") for value in values)
