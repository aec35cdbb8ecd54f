"""General text for healing: a third stream of rows, whole texts of the kind that the model was pretrained on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from lm.errors import UserError
from lm.model import LanguageModel
from lm.prompts import Encoded, check_ids, max_positions
from sae.activations.sources import NoSource, Source, TextSource


@dataclass(frozen=True, kw_only=True)
class GeneralText:
    """Texts that are held by the retain term beside the retain rows (`trainer.pairing: streams`)."""

    source: Source = field(default_factory=NoSource)
    """Where they come from: `TextFiles`, `Datasets`, `Rows`, `Builtin`; `NoSource` for none."""
    longest: int = 256
    """Tokens; a longer text is cut into pieces."""
    most: int = 20_000
    """At most so many pieces are read, from the front of the source."""

    def __post_init__(self) -> None:
        if not isinstance(self.source, TextSource | NoSource):
            raise UserError(f"general is {type(self.source).__name__}, which holds no text: take TextFiles or Datasets")
        if not 2 <= self.longest < math.inf or not 1 <= self.most < math.inf:
            raise UserError(
                f"general_longest is {self.longest} and general_most {self.most}: give at least 2 tokens and 1 piece"
            )

    def encode(self, model: LanguageModel) -> list[Encoded]:
        """The pieces, each supervised from its second token on; EOS ends a text. Raises UserError for a source without text."""
        if not isinstance(self.source, TextSource):
            return []
        pieces = []
        for piece in self._pieces(model, self.source):
            pieces.append(piece)
            if len(pieces) == self.most:
                break
        if not pieces:
            raise UserError(f"general {self.source.described()} holds no text of two tokens: give another")
        return pieces

    def _pieces(self, model: LanguageModel, source: TextSource) -> Iterator[Encoded]:
        tokenizer, limit = model.tokenizer, max_positions(model)
        longest = self.longest if limit is None else min(self.longest, limit)
        for _, text in source.open(tokenizer).read(epoch=0, start=0, seed=None):
            ids = [int(index) for index in tokenizer(text)["input_ids"]]
            if tokenizer.eos_token_id is not None and (not ids or ids[-1] != tokenizer.eos_token_id):
                ids.append(int(tokenizer.eos_token_id))
            check_ids(model, [ids])
            for first in range(0, len(ids), longest):
                piece = ids[first : first + longest]
                if len(piece) > 1:
                    yield Encoded(piece, 1)
