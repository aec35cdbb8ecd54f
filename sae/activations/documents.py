"""Documents: numbered texts in an order that a seed fixes, readable from any place on.

`Listed` holds what is at hand (a list, or a table that is read by row); `Streamed` what can only be read from the front.
Where texts come from is `sae.activations.sources`; tokens are `sae.activations.contexts`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Protocol

from lm.errors import UserError
from sae.activations.batch import permutation

_READ = 256  # records that are read, or hashed, at once


class Documents(Protocol):
    """Texts, each with its number in the source's own order."""

    name: str

    def read(self, *, epoch: int, start: int, seed: int | None) -> Iterator[tuple[int, str]]:
        """`(number, text)` of one epoch from place `start` of its order on; `seed=None` keeps the source's order."""
        ...

    def facts(self) -> dict[str, Any]:
        """What a manifest says of the content: how many there are, if that is known, and a hash of all that are in memory, of
        the first ones where reading all would take long."""
        ...


class Listed:
    """`size` documents, `fetch(numbers)` their texts: a true permutation each epoch."""

    def __init__(self, name: str, size: int, fetch: Callable[[Sequence[int]], Sequence[object]]) -> None:
        self.name, self.size = name, size
        self._fetch = fetch
        self._hashed = _READ

    @classmethod
    def of(cls, name: str, texts: Sequence[str]) -> Listed:
        """Documents that are in memory."""
        listed = cls(name, len(texts), lambda numbers: [texts[number] for number in numbers])
        listed._hashed = len(texts)
        return listed

    def read(self, *, epoch: int, start: int, seed: int | None) -> Iterator[tuple[int, str]]:
        order = range(self.size) if seed is None else permutation(self.size, "documents", seed, epoch).tolist()
        for begin in range(start, self.size, _READ):
            numbers = order[begin : begin + _READ]
            for number, value in zip(numbers, self._fetch(numbers), strict=True):
                yield number, checked(value, self.name, number)

    def facts(self) -> dict[str, Any]:
        first = (text for _, text in self.read(epoch=0, start=0, seed=None))
        return {
            "documents": self.size,
            "hashed": min(self.size, self._hashed),
            "sha256": _hash(islice(first, self._hashed)),
        }


class Streamed:
    """Documents that are read from the front, `begin(place)` from a place on: permuted within blocks of `block`.

    Going on at a place reads, at most, one block again; how quickly `begin` gets there is the source's affair.
    """

    def __init__(self, name: str, begin: Callable[[int], Iterable[object]], *, block: int) -> None:
        self.name = name
        self._begin, self._block = begin, block

    def read(self, *, epoch: int, start: int, seed: int | None) -> Iterator[tuple[int, str]]:
        first = start if seed is None else start - start % self._block
        records = enumerate(iter(self._begin(first)), start=first)
        if seed is None:
            for number, value in records:
                yield number, checked(value, self.name, number)
            return
        while block := list(islice(records, self._block)):
            at = block[0][0]
            order = permutation(len(block), "documents", seed, epoch, at).tolist()
            for place, chosen in enumerate(order, start=at):
                if place >= start:
                    number, value = block[chosen]
                    yield number, checked(value, self.name, number)

    def facts(self) -> dict[str, Any]:
        first = (text for _, text in self.read(epoch=0, start=0, seed=None))
        return {"documents": None, "hashed": 16, "sha256": _hash(islice(first, 16))}


def checked(value: object, name: str, number: int) -> str:
    """`value` as text that has a UTF-8 form; null is the empty text. UserError names the record."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{name}, record {number}: {value!r:.60} is not text: name the column that holds text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(
            f"{name}, record {number} holds half of a surrogate pair, which is not text: remove it"
        ) from None
    return value


def _hash(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        encoded = text.encode("utf-8")
        digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return digest.hexdigest()
