"""Perplexity on text that has nothing to do with either side: what unlearning costs the language.

Badge: **faithful**, it is the usual one over pieces of a fixed length.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from unlearn.evaluation.scores.base import Direction, Need, Score, Statistics


@dataclass(frozen=True)
class GeneralPerplexity(Score):
    """How unlikely the model finds general text."""

    name = "general_perplexity"
    title = "Perplexity of general text"
    meaning = (
        "exp of the mean nats a token over all tokens of the pieces but the first of each. Compare with the model before "
        "unlearning, on the same text alone."
    )
    group = "General text"

    @property
    def direction(self) -> Direction:
        """The language should stay."""
        return "lower"

    @property
    def needs(self) -> tuple[Need, ...]:
        """The nats of every piece."""
        return ("general",)

    def value(self, statistics: Statistics) -> float | None:
        """`exp(sum of nats / sum of tokens)`."""
        text = statistics.general
        assert text is not None
        return math.exp(sum(text.nats) / sum(text.tokens))

    def per_example(self, statistics: Statistics) -> Mapping[str, float]:
        """The perplexity of each piece."""
        text = statistics.general
        assert text is not None
        pieces = zip(text.nats, text.tokens, strict=True)
        return {f"piece {index}": math.exp(nats / tokens) for index, (nats, tokens) in enumerate(pieces)}

    def text(self, value: float) -> str:
        """Two decimals."""
        return f"{value:.2f}"
