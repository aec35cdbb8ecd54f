"""The published tracing procedure, one forward pass a cell: slow, plain, and the oracle of every faster engine.

For one fact: row 0 of the batch is the clean prompt, the other rows carry the noise; for each kind, token and layer the
clean activation of row 0 is put back into the noisy rows and the answer's score is read off. Badge: faithful to the
script of Meng et al. (2022), with whole answers instead of first tokens as a *variant* (`first_token_probability` is the
script's metric). The row-0 activations are captured once, from a batch of the same shape, instead of in each cell.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from lm.anatomy import Kind, Site
from lm.errors import UserError
from lm.forward.hooks import Captured, Edit, capture, patch
from lm.model import LanguageModel
from tracing.arrays import Array
from tracing.question.encoded_fact import EncodedFact, forward
from tracing.question.metrics import MetricName, beside_clean, read_all
from tracing.question.sweep import Sweep, swept_positions, window_layers
from tracing.question.target import Target


@dataclass(frozen=True, kw_only=True, eq=False)
class Traced:
    """One fact's scores: see `tracing.Effects` for the meaning of each."""

    clean: float
    corrupted: float
    restored: dict[Kind, Array]
    also: Mapping[MetricName, Traced] = field(default_factory=dict)
    """By the sweep's further metrics."""

    @classmethod
    def of(cls, sweep: Sweep, scores: Array, cells: Mapping[Kind, Array]) -> Traced:
        """From the scores of all metrics of a sweep: (2, metrics), clean and corrupted; (tokens, layers, metrics) a kind."""
        first, *others = [
            cls(
                clean=float(scores[0, index]),
                corrupted=float(scores[1, index]),
                restored={kind: np.ascontiguousarray(values[..., index]) for kind, values in cells.items()},
            )
            for index in range(len(sweep.metrics))
        ]
        return replace(first, also=dict(zip(sweep.also, others, strict=True)))


@torch.inference_mode()
def trace_fact(
    model: LanguageModel,
    encoded: EncodedFact,
    batch: Tensor,
    sweep: Sweep,
    advance: Callable[[int], None] = lambda cells: None,
) -> Traced:
    """All cells of one fact.

    Args:
        batch: (1 + samples, tokens, hidden) embeddings, row 0 clean (`Corruptor.batch`).
        advance: told the number of cells done since the last call.

    Raises:
        UserError: a score is NaN.
    """
    passes = _Passes(model, encoded, batch, sweep)
    tokens, layers = len(encoded.prompt_ids), model.anatomy.layers
    positions = swept_positions(tokens, encoded.span, sweep.positions)
    restored: dict[Kind, Array] = {}
    for kind in sweep.kinds:
        cells = np.full((tokens, layers, len(sweep.metrics)), np.nan)
        if sweep.positions != "all":
            cells[: encoded.span[0]] = passes.scores[1]
        for position in positions:
            for layer in range(layers):
                cells[position, layer] = passes.cell(kind, position, layer)
                advance(1)
        restored[kind] = cells
        refuse_nan(model, encoded, passes.scores, [cells[positions]])
    return Traced.of(sweep, passes.scores, restored)


@torch.inference_mode()
def score_cells(
    model: LanguageModel,
    encoded: EncodedFact,
    batch: Tensor,
    sweep: Sweep,
    cells: Sequence[tuple[Kind, int, int]],
) -> list[float]:
    """The scores of some cells `(kind, position, layer)` by the sweep's metric, each by a forward pass of its own."""
    passes = _Passes(model, encoded, batch, sweep)
    return [float(passes.cell(*cell)[0]) for cell in cells]


class _Passes:
    """The forward passes of one fact: the ordinary one, made at once, and one a cell."""

    def __init__(self, model: LanguageModel, encoded: EncodedFact, batch: Tensor, sweep: Sweep) -> None:
        self.model, self.batch, self.sweep, self.layers = model, batch, sweep, model.anatomy.layers
        self.target, self.keep = Target.of([encoded], len(batch)), len(encoded.answer_ids)
        kinds = dict.fromkeys([*sweep.kinds, *([sweep.sever] if sweep.sever else [])])
        with capture(model, [Site(kind, layer) for kind in kinds for layer in range(self.layers)]) as self.states:
            logits = forward(model, batch, self.keep)
        self.target = beside_clean(self.target, logits[:1], sweep.metrics)
        self.scores = self._read(logits)
        """(2, metrics): clean, and corrupted without restoring."""

    def cell(self, kind: Kind, position: int, layer: int) -> Array:
        """(metrics,): the scores with one cell restored."""
        edits = restorations(self.sweep, kind, layer, self.layers, position, self.states)
        with patch(self.model, edits, allow_unchanged=True):
            restored: Array = self._read(forward(self.model, self.batch, self.keep))[1]
        return restored

    def _read(self, logits: Tensor) -> Array:
        return _clean_and_corrupted(logits, self.target, self.sweep.metrics)


@torch.inference_mode()
def total_effect(
    model: LanguageModel, encoded: EncodedFact, batch: Tensor, metric: MetricName, *, rows: int = 64
) -> float:
    """What the corruption takes of one fact: the clean score minus the mean corrupted one; at most `rows` rows run at once."""
    taken = 0.0
    for share, part in in_parts(batch, rows):
        logits = forward(model, part, len(encoded.answer_ids))
        target = beside_clean(Target.of([encoded], len(part)), logits[:1], [metric])
        clean, corrupted = _clean_and_corrupted(logits, target, [metric])[:, 0]
        taken += share * float(clean - corrupted)
    return taken


def in_parts(batch: Tensor, rows: int) -> list[tuple[float, Tensor]]:
    """A fact's batch in parts of at most `rows` rows, but two at least: the clean row with some of the corrupted ones, and their
    share of all. Every score is a mean over corrupted rows, so the shares of the parts' scores add up to it."""
    parts = torch.split(batch[1:], max(1, rows - 1))
    return [(len(some) / (len(batch) - 1), torch.cat([batch[:1], some])) for some in parts]


def _clean_and_corrupted(logits: Tensor, target: Target, metrics: Sequence[MetricName]) -> Array:
    """(2, metrics): of row 0, and the mean of all others."""
    scores = read_all(logits, target, metrics)
    return np.asarray(torch.stack([scores[0], scores[1:].mean(0)]).cpu().numpy(), dtype=np.float64)


def restorations(sweep: Sweep, kind: Kind, layer: int, layers: int, position: int, states: Captured) -> list[Edit]:
    """Edits that put the clean state of one token back into every noisy row, and hold what is severed as it was."""
    token = slice(position, position + 1)
    back = [Site(kind, near) for near in window_layers(layer, sweep.window, layers, kind)]
    held = [Site(sweep.sever, near) for near in range(layers) if sweep.sever and Site(sweep.sever, near) not in back]
    values = [(site, states[site][:1, token]) for site in back] + [(site, states[site][1:, token]) for site in held]
    return [Edit(site=site, value=value, rows=slice(1, None), positions=[position]) for site, value in values]


def refuse_nan(model: LanguageModel, encoded: EncodedFact, scores: Array, cells: Sequence[Array]) -> None:
    """Raise UserError if a score of a fact, or a cell of it, is NaN."""
    if any(np.isnan(values).any() for values in (scores, *cells)):
        raise UserError(f"tracing fact {encoded.fact.label!r} gave NaN: load {model.name} in float32 or bfloat16")
