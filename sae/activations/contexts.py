"""Documents cut or packed into contexts: what the model reads at once, and where each token of it came from.

The order is fixed by the seed. Where the next context begins is three numbers (epoch, place in the epoch's order of
documents, token of that document), so a stream goes on by reading again from that document. Every epoch ends its last
context, so no context holds a document twice. Nothing here knows of activations.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from lm.errors import UserError, one_line
from sae.activations.documents import Documents

Bos = Literal["tokenizer", "always", "never"]
Ints = NDArray[np.int64]
_AT_ONCE = 64  # documents tokenized in one call
_LONGEST, _SEAM = 1 << 16, 200
"""Characters that are tokenized in one piece, and of either side of a cut that are looked at: what a tokenizer takes for a
text grows faster than the text."""


@dataclass(frozen=True, kw_only=True)
class ContextSpec:
    """How documents become contexts."""

    length: int = 128
    """Tokens of a context, with its BOS."""
    pack: bool = True
    """Join documents, as in pretraining; otherwise each context holds (a part of) one document."""
    separator: bool = True
    """When packing, put EOS behind every document."""
    bos: Bos = "tokenizer"
    """BOS at the start of every context: where the tokenizer puts one before a text; always; or never."""
    shuffle: bool = True
    """Read the documents of each epoch in an order of its own."""
    epochs: int | None = None
    """How often the source is read; null: for as long as there is demand."""

    def __post_init__(self) -> None:
        if self.length < 2:
            raise UserError(f"contexts of {self.length} tokens are too short: give 2 or more, 128 is usual")
        if self.bos not in get_args(Bos):
            raise UserError(f"bos {self.bos!r} is unknown: use one of {', '.join(get_args(Bos))}")
        if self.epochs is not None and self.epochs < 1:
            raise UserError(f"epochs {self.epochs} reads nothing: give 1 or more, or null to go round for ever")


class Context(NamedTuple):
    """One context, without padding; each `(tokens,)` int64, as `ActivationBatch` describes them."""

    ids: Ints
    documents: Ints
    positions: Ints


class Contexts(Iterator[Context]):
    """The contexts of a source, one after the other; `state` says where the next one begins."""

    def __init__(
        self,
        documents: Documents,
        tokenizer: PreTrainedTokenizerBase,
        spec: ContextSpec,
        *,
        seed: int = 0,
        state: dict[str, int] | None = None,
    ) -> None:
        self.spec = spec
        self._documents, self._tokenizer = documents, tokenizer
        self._seed = seed if spec.shuffle else None
        self._bos = _bos(tokenizer, spec)
        self._eos: int | None = tokenizer.eos_token_id if spec.pack and spec.separator else None
        if spec.pack and spec.separator and self._eos is None:
            raise UserError("the tokenizer has no EOS token to put between documents: set separator: false")
        begin = state or {"epoch": 0, "place": 0, "offset": 0, "count": 0}
        self.epoch, self._place, self._offset, self.count = (
            int(begin[key]) for key in ("epoch", "place", "offset", "count")
        )
        self._walk = self._epochs()

    @property
    def state(self) -> dict[str, int]:
        """Epoch, place, token and number of the next context: what the constructor takes."""
        return {"epoch": self.epoch, "place": self._place, "offset": self._offset, "count": self.count}

    def __next__(self) -> Context:
        context, self._place, self._offset = next(self._walk)
        self.count += 1
        return context

    def _epochs(self) -> Iterator[tuple[Context, int, int]]:
        while self.spec.epochs is None or self.epoch < self.spec.epochs:
            whole, found = self._place == 0 and self._offset == 0, False
            for made in self._packed() if self.spec.pack else self._apart():
                found = True
                yield made
            if whole and not found:
                raise UserError(
                    f"{self._documents.name} holds no text: give a source with documents that are not empty"
                )
            self.epoch, self._place, self._offset = self.epoch + 1, 0, 0

    def _apart(self) -> Iterator[tuple[Context, int, int]]:
        room = self._room
        for place, number, start, ids in self._tokens():
            for at in range(0, len(ids), room):
                end = at + room
                after = (place, start + end) if end < len(ids) else (place + 1, 0)
                yield self._context([(number, start + at, ids[at:end])]), *after

    def _packed(self) -> Iterator[tuple[Context, int, int]]:
        held: deque[tuple[int, int, int, Ints]] = deque()
        total = 0
        for piece in self._tokens():
            held.append(piece)
            total += len(piece[3])
            while total >= self._room:
                taken = self._take(held)
                total -= self._room
                after = (held[0][0], held[0][2]) if held else (piece[0] + 1, 0)
                yield self._context(taken), *after
        if total:
            last = held[-1][0]
            yield self._context(self._take(held)), last + 1, 0

    def _take(self, held: deque[tuple[int, int, int, Ints]]) -> list[tuple[int, int, Ints]]:
        """Take up to one context's tokens from the front: `(document, position of the first, ids)` a piece."""
        taken, room = [], self._room
        while held and room:
            place, number, start, ids = held.popleft()
            taken.append((number, start, ids[:room]))
            if len(ids) > room:
                held.appendleft((place, number, start + room, ids[room:]))
            room -= min(room, len(ids))
        return taken

    def _context(self, pieces: list[tuple[int, int, Ints]]) -> Context:
        ids = [piece for _, _, piece in pieces]
        documents = [np.full(len(piece), number, np.int64) for number, _, piece in pieces]
        positions = [np.arange(start, start + len(piece), dtype=np.int64) for _, start, piece in pieces]
        if self._bos is not None and int(ids[0][0]) != self._bos:  # a rendered chat brings its own: not two
            ids.insert(0, np.array([self._bos], np.int64))
            documents.insert(0, documents[0][:1])
            positions.insert(0, np.array([-1], np.int64))
        return Context(np.concatenate(ids), np.concatenate(documents), np.concatenate(positions))

    @property
    def _room(self) -> int:
        """Tokens of a context that are not its BOS."""
        return self.spec.length - (self._bos is not None)

    def _tokens(self) -> Iterator[tuple[int, int, int, Ints]]:
        """`(place, document, position of the first token, ids)` of what is left of this epoch; no empty documents."""
        place, offset = self._place, self._offset
        texts = self._documents.read(epoch=self.epoch, start=place, seed=self._seed)
        while batch := list(islice(texts, _AT_ONCE)):
            for (number, _), ids in zip(batch, self._encode(batch), strict=True):
                if len(ids) > offset:
                    yield place, number, offset, ids[offset:]
                place, offset = place + 1, 0

    def _encode(self, batch: list[tuple[int, str]]) -> list[Ints]:
        try:
            pieces = [self._pieces(text) for _, text in batch]
            each = iter(self._plain([piece for own in pieces for piece in own]))
            rows = [[token for _ in own for token in next(each)] for own in pieces]
        except Exception as error:  # the tokenizers library raises what it likes
            raise UserError(
                f"{self._documents.name}, records {batch[0][0]} and on, cannot be tokenized: {one_line(error)}"
            ) from error
        tail = [] if self._eos is None else [self._eos]
        return [np.array([*ids, *tail] if ids else [], np.int64) for ids in rows]

    def _plain(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = []
        for first in range(0, len(texts), _AT_ONCE):
            some = texts[first : first + _AT_ONCE]
            ids += self._tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _pieces(self, text: str) -> list[str]:
        """A long text in pieces that give the tokens of the whole: cut before a lone space where that changes no token nearby."""
        pieces, start = [], 0
        while len(text) - start > _LONGEST:
            seams = [hit.start() for hit in _LONE_SPACE.finditer(text, start + _LONGEST // 2, start + _LONGEST)]
            for cut in reversed(seams[-8:]):  # of a tokenizer that no seam suits, the text stays whole
                left, right = text[max(cut - _SEAM, start) : cut], text[cut : cut + _SEAM]
                whole, one, other = self._plain([left + right, left, right])
                if whole == one + other:
                    break
            else:
                break
            pieces.append(text[start:cut])
            start = cut
        return [*pieces, text[start:]]


_LONE_SPACE = re.compile(r"(?<=\w) (?=\w)")


def tokenizer_facts(tokenizer: PreTrainedTokenizerBase, spec: ContextSpec) -> dict[str, Any]:
    """Whether contexts begin with BOS, and the id."""
    bos = _bos(tokenizer, spec)
    return {"bos": bos is not None, "bos_token_id": bos}


def _bos(tokenizer: PreTrainedTokenizerBase, spec: ContextSpec) -> int | None:
    bos: int | None = tokenizer.bos_token_id
    if spec.bos == "never":
        return None
    if spec.bos == "always":
        if bos is None:
            raise UserError("the tokenizer has no BOS token: set bos: tokenizer or never")
        return bos
    return bos if bos is not None and list(tokenizer("a")["input_ids"])[:1] == [bos] else None
