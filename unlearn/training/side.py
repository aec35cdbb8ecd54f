"""The rows of one side, forget or retain, as the trainer holds them: token ids, alternates, and what is known of them already."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from lm.data.rows import Row
from lm.errors import UserError
from lm.model import LanguageModel
from lm.prompts import Encoded, PromptSpec, check_ids, encode_pair, max_positions
from lm.row_files import row_name
from unlearn.training.tensor_store import RowStore


@dataclass(frozen=True)
class Side:
    """The rows of one side and what goes with them.

    Attributes:
        rows: the rows, encoded.
        alternates: for each row its alternate answers to the same question, or nothing.
        original: the original model's log-probabilities of `texts`, (supervised tokens,) each, where they are known already.
        below: the stream that the first block that may change reads for `texts`, (tokens, hidden) each, likewise.
        known: what is kept of the original's logits, (supervised tokens, …) each (`unlearn.forward.known_logits`), likewise.
        of: what the rows were made of, as far as that is known: of the first so many.
        general: of a retain side, how many texts of general language stand after its own rows.
        held: of a retain side, how many forget rows stand after those, to be held while their fold is not yet forgotten.
    """

    rows: Sequence[Encoded]
    alternates: Sequence[tuple[Encoded, ...]] = ()
    original: RowStore | None = None
    below: RowStore | None = None
    known: RowStore | None = None
    of: Sequence[Row] = ()
    general: int = 0
    held: int = 0

    @cached_property
    def tokens(self) -> frozenset[int]:
        """The ids that occur in the side's own rows and in general text."""
        kept = self.rows[: self.own + self.general]
        return frozenset(itertools.chain.from_iterable(text.ids for text in kept))

    @property
    def own(self) -> int:
        """How many rows are the side's own."""
        return len(self.rows) - self.general - self.held

    @cached_property
    def texts(self) -> list[Encoded]:
        """The rows, then every alternate, row by row."""
        return [*self.rows, *itertools.chain.from_iterable(self.alternates)]

    def alternate(self, row: int, epoch: int) -> int:
        """The place in `texts` of the alternate that a row takes in an epoch: each in its turn."""
        return len(self.rows) + self._firsts[row] + epoch % len(self.alternates[row])

    def streams(self, places: Sequence[int]) -> list[Tensor] | None:
        """What the first block that may change reads for some of `texts`, if it is known."""
        return None if self.below is None else [self.below[place] for place in places]

    def logits(self, places: Sequence[int]) -> list[Tensor] | None:
        """What is kept of the original's logits for some of `texts`, if it is."""
        return None if self.known is None else [self.known[place] for place in places]

    @cached_property
    def _firsts(self) -> list[int]:
        return [0, *itertools.accumulate(len(several) for several in self.alternates)]


@dataclass(frozen=True)
class Micro:
    """A micro-batch: rows of one side that go through the model at once on one process.

    Attributes:
        rows: their places among the rows of their side; `epoch` says which alternates go with them.
        padded: tokens with the padding, alternates included.
        supervised: targets.
    """

    forget: bool
    rows: tuple[int, ...]
    epoch: int
    padded: int
    supervised: int


def encode_rows(
    model: LanguageModel, rows: Sequence[Row], prompt: PromptSpec, *, documents: bool = False
) -> list[Encoded]:
    """Rows as token ids, in order; with `documents` completions are supervised from their second token on.

    Raises:
        UserError: a row that is longer than the model can read, or with a token that it has no embedding for.
    """
    encoded = [encode_pair(model.tokenizer, row.input, row.output, prompt) for row in rows]
    check_ids(model, (text.ids for text in encoded))
    if documents:
        encoded = [
            Encoded(text.ids, min(1, text.answer_start)) if row.kind == "sc" else text
            for row, text in zip(rows, encoded, strict=True)
        ]
    limit = max_positions(model)
    for row, text in zip(rows, encoded, strict=True):
        if limit is not None and len(text.ids) > limit:
            raise UserError(
                f"row {row_name(row)} has {len(text.ids)} tokens and {model.name} reads {limit}: shorten or split it"
            )
    return encoded
