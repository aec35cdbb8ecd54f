"""The ways to compute cells, behind one face: some facts of one shape in, their scores out."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from lm.anatomy import Kind
from lm.config import known_or_near
from lm.errors import UserError
from lm.model import LanguageModel
from tracing.engine.estimate import Passes, cost, embedded_row_bytes, row_bytes, rows_within, trunk_row_bytes
from tracing.engine.reference import Traced, in_parts, score_cells, trace_fact
from tracing.engine.wavefront import Wavefront
from tracing.question.encoded_fact import EncodedFact
from tracing.question.metrics import metric_of
from tracing.question.sweep import Sweep, count_cells, swept_positions

EngineName = Literal["wavefront", "reference"]
"""`wavefront`: exact and fast; `reference`: the published loop, one forward pass a cell."""

Advance = Callable[[int], None]


class Engine(Protocol):
    """Computes all cells of a sweep for a model."""

    def together(self, tokens: int, answer: int, samples: int) -> int:
        """How many facts of `tokens` tokens, of which the answer has `answer`, it is best given at once."""
        ...

    def takes(self, tokens: int, answer: int, samples: int) -> int:
        """About how many bytes it takes beside the model for such facts: an upper bound in ordinary models."""
        ...

    def passes(self, encoded_facts: Sequence[EncodedFact], samples: int) -> Passes:
        """What `trace` runs for facts of one shape, which have `samples` corrupted rows each."""
        ...

    def trace(
        self, encoded_facts: Sequence[EncodedFact], batches: Sequence[Tensor], advance: Advance = ...
    ) -> list[Traced]:
        """The scores of facts whose prompts, answers and batches have equal sizes. Raises UserError for NaN."""
        ...


class Reference:
    """`tracing.engine.reference`, a fact at a time."""

    def __init__(self, model: LanguageModel, sweep: Sweep) -> None:
        self.model, self.sweep = model, sweep

    def together(self, tokens: int, answer: int, samples: int) -> int:
        return 1

    def takes(self, tokens: int, answer: int, samples: int) -> int:
        return (1 + samples) * trunk_row_bytes(self.model, tokens, answer, self.sweep)

    def passes(self, encoded_facts: Sequence[EncodedFact], samples: int) -> Passes:
        cells = sum(count_cells(encoded, self.model.anatomy.layers, self.sweep) for encoded in encoded_facts)
        units = cost(encoded_facts, [samples] * len(encoded_facts), self.model.anatomy.layers, self.sweep).reference
        return Passes(count=len(encoded_facts) + cells, rows=1 + samples, token_blocks=units)

    def trace(
        self, encoded_facts: Sequence[EncodedFact], batches: Sequence[Tensor], advance: Advance = lambda cells: None
    ) -> list[Traced]:
        return [
            trace_fact(self.model, encoded, batch, self.sweep, advance)
            for encoded, batch in zip(encoded_facts, batches, strict=True)
        ]


class Checked:
    """The wavefront engine, which before it is believed has a few cells of its first fact computed by the reference.

    Half of `memory` is for what the cells leave from, half for the cells. Where a device has less than it was said to, both are
    halved and the facts computed again.
    """

    def __init__(self, model: LanguageModel, sweep: Sweep, memory: int) -> None:
        self.model, self.sweep, self.memory = model, sweep, memory
        self._checked = False

    def together(self, tokens: int, answer: int, samples: int) -> int:
        cells = len(self.sweep.kinds) * self.model.anatomy.layers
        trunk, rows = self._rows(tokens, answer)
        return max(1, min(8, rows // (cells * samples), trunk // (1 + samples)))

    def takes(self, tokens: int, answer: int, samples: int) -> int:
        facts = self.together(tokens, answer, samples)
        trunk, rows = self._rows(tokens, answer)
        cells = len(self.sweep.kinds) * self.model.anatomy.layers * facts * samples
        first = min(max(2, trunk), facts * (1 + samples)) * trunk_row_bytes(self.model, tokens, answer, self.sweep)
        embedded = facts * (1 + samples) * embedded_row_bytes(self.model, tokens)
        return embedded + first + min(rows, cells) * row_bytes(self.model, tokens)

    def passes(self, encoded_facts: Sequence[EncodedFact], samples: int) -> Passes:
        tokens, layers = len(encoded_facts[0].input_ids), self.model.anatomy.layers
        trunk, rows = self._rows(tokens, len(encoded_facts[0].answer_ids))
        wave = Wavefront(self.model, self.sweep, rows)
        if len(encoded_facts) * (1 + samples) <= trunk:
            together: list[tuple[Sequence[EncodedFact], int]] = [(encoded_facts, samples)]
        else:
            share = min(samples, max(1, trunk - 1))
            parts = [min(share, samples - start) for start in range(0, samples, share)]
            together = [([encoded], part) for encoded in encoded_facts for part in parts]
        ordinary = [len(group) * (1 + part) for group, part in together]
        waves = [size for group, part in together for size in wave.sizes(group, part)]
        repeated_rows = sum(ordinary) - len(encoded_facts) * (1 + samples)  # clean rows that other parts had, too
        least = cost(encoded_facts, [samples] * len(encoded_facts), layers, self.sweep).wave
        return Passes(
            count=len(ordinary) + len(waves),
            rows=max(*ordinary, *waves, 0),
            token_blocks=least + repeated_rows * tokens * layers,
        )

    def trace(
        self, encoded_facts: Sequence[EncodedFact], batches: Sequence[Tensor], advance: Advance = lambda cells: None
    ) -> list[Traced]:
        traced = self._within_memory(encoded_facts, batches, advance)
        if not self._checked:
            check(
                self.model,
                encoded_facts[0],
                batches[0],
                self.sweep,
                traced[0],
                rows=self.ordinary_rows(encoded_facts[0]),
            )
            self._checked = True
        return traced

    def ordinary_rows(self, encoded: EncodedFact) -> int:
        """How many rows of a fact an ordinary pass may have; a clean and a corrupted one are the least there is."""
        return max(2, self._rows(len(encoded.input_ids), len(encoded.answer_ids))[0])

    def score_cells(self, encoded: EncodedFact, batch: Tensor, wanted: Sequence[tuple[Kind, int, int]]) -> list[float]:
        """The scores of chosen cells, as `Wavefront.score_cells` gives them. Raises UserError for what that refuses."""
        wave = Wavefront(self.model, self.sweep, self._rows(len(encoded.input_ids), len(encoded.answer_ids))[1])
        return _mean(
            [
                (share, wave.score_cells(encoded, part, wanted))
                for share, part in in_parts(batch, self.ordinary_rows(encoded))
            ]
        )

    def _rows(self, tokens: int, answer: int) -> tuple[int, int]:
        """How many rows may run together: of ordinary passes, and of cells."""
        each = trunk_row_bytes(self.model, tokens, answer, self.sweep)
        return self.memory // 2 // each, rows_within(self.model, tokens, self.memory // 2)

    def _within_memory(
        self, encoded_facts: Sequence[EncodedFact], batches: Sequence[Tensor], advance: Advance
    ) -> list[Traced]:
        while True:
            done = 0

            def count(cells: int) -> None:
                nonlocal done
                done += cells
                advance(cells)

            try:
                return self._traced(encoded_facts, batches, count)
            except torch.OutOfMemoryError as error:
                advance(-done)
                if max(self._rows(len(encoded_facts[0].input_ids), len(encoded_facts[0].answer_ids))) <= 1:
                    raise UserError(
                        f"{self.model.name} leaves no memory for even one row of fact {encoded_facts[0].fact.label!r}: "
                        "load it in bfloat16, or on a larger device"
                    ) from error
            self.memory //= 2  # outside the handler, which holds what the failed pass made
            torch.cuda.empty_cache()

    def _traced(
        self, encoded_facts: Sequence[EncodedFact], batches: Sequence[Tensor], advance: Advance
    ) -> list[Traced]:
        trunk, rows = self._rows(len(encoded_facts[0].input_ids), len(encoded_facts[0].answer_ids))
        wave = Wavefront(self.model, self.sweep, rows)
        if sum(map(len, batches)) <= trunk:
            return wave.trace(encoded_facts, batches, advance)
        traced = []
        for encoded, batch in zip(encoded_facts, batches, strict=True):
            parts = in_parts(batch, trunk)
            last = len(parts) - 1
            joined = [
                (share, wave.trace([encoded], [part], *([advance] if index == last else []))[0])
                for index, (share, part) in enumerate(parts)
            ]
            traced.append(_joined(joined))
        return traced


def _joined(parts: Sequence[tuple[float, Traced]]) -> Traced:
    """One fact's scores from those of parts of its corrupted rows, each with its share of them."""
    kinds, also = parts[0][1].restored, parts[0][1].also
    return Traced(
        clean=parts[0][1].clean,
        corrupted=sum(share * part.corrupted for share, part in parts),
        restored={
            kind: np.sum([share * part.restored[kind] for share, part in parts], axis=0, dtype=np.float64)
            for kind in kinds
        },
        also={metric: _joined([(share, part.also[metric]) for share, part in parts]) for metric in also},
    )


def _mean(parts: Sequence[tuple[float, Sequence[float]]]) -> list[float]:
    """Scores of all corrupted rows from those of parts of them, each with its share."""
    shares, scores = zip(*parts, strict=True)
    return [float(value) for value in np.array(shares) @ np.array(scores, dtype=np.float64).reshape(len(shares), -1)]


def make_engine(name: str, model: LanguageModel, sweep: Sweep, memory: int) -> Engine:
    """The engine of that name; `memory` in bytes is what its batches may take. Raises UserError for an unknown one."""
    check_engine(name)
    return Checked(model, sweep, memory) if name == "wavefront" else Reference(model, sweep)


def check_engine(name: str) -> None:
    """Raise UserError for an engine that does not exist."""
    known = get_args(EngineName)
    if name not in known:
        raise UserError(f"the engine {name!r} is unknown{known_or_near(name, known)}: use one of {', '.join(known)}")


def check(
    model: LanguageModel, encoded: EncodedFact, batch: Tensor, sweep: Sweep, traced: Traced, few: int = 3, *, rows: int
) -> None:
    """Raise UserError unless the reference gives the same for the cell with the largest effect, for the first layer's at the
    last subject token (where a restoration that does nothing would show), and for `few` random ones."""
    positions = [
        p for p in swept_positions(len(encoded.prompt_ids), encoded.span, sweep.positions) if p >= encoded.span[0]
    ]
    cells = [(kind, p, layer) for kind in sweep.kinds for p in positions for layer in range(model.anatomy.layers)]
    largest = max(cells, key=lambda cell: abs(_value(traced, cell) - traced.corrupted))
    telling: list[tuple[Kind, int, int]] = [(kind, encoded.span[1] - 1, 0) for kind in sweep.kinds]
    chance = random.Random(0).sample(cells, min(few, len(cells)))
    wanted = list(dict.fromkeys([largest, *telling, *chance]))
    compare(model, encoded, batch, sweep, {cell: _value(traced, cell) for cell in wanted}, traced.corrupted, rows=rows)


def compare(
    model: LanguageModel,
    encoded: EncodedFact,
    batch: Tensor,
    sweep: Sweep,
    scores: Mapping[tuple[Kind, int, int], float],
    corrupted: float,
    *,
    rows: int,
) -> None:
    """Raise UserError unless the reference, at most `rows` rows at a time, gives the same scores for these cells
    `(kind, position, layer)`."""
    parts = in_parts(batch, rows)
    expected = _mean([(share, score_cells(model, encoded, part, sweep, list(scores))) for share, part in parts])
    nats = _rounding(next(model.model.parameters()).dtype, len(encoded.answer_ids))
    for (cell, got), value in zip(scores.items(), expected, strict=True):
        if abs(got - value) > metric_of(sweep.metric).tolerance(nats, max(abs(value), abs(corrupted))):
            kind, position, layer = cell
            raise UserError(
                f"the wavefront engine and the reference disagree on {model.name} ({kind} at token {position}, layer {layer}: "
                f"{got:.6g} and {value:.6g}): trace with engine: reference, and tell the authors which model this is"
            )


def _value(traced: Traced, cell: tuple[Kind, int, int]) -> float:
    kind, position, layer = cell
    return float(traced.restored[kind][position, layer])


def _rounding(dtype: torch.dtype, tokens: int) -> float:
    """In nats, of an answer of so many tokens: other shapes round otherwise, and each token anew."""
    return {torch.float64: 1e-8, torch.float32: 1e-3}.get(dtype, 0.3) * max(1.0, tokens / 4)
