"""The published tracing procedure, one forward pass a cell: slow, plain, and the oracle of every faster engine.

For one fact: row 0 of the batch is the clean prompt, the other rows carry the noise; for each kind, token and layer the
clean activation of row 0 is put back into the noisy rows and the answer's score is read off. Badge: faithful to the
script of Meng et al. (2022), with whole answers instead of first tokens as a *variant* (`first_token_probability` is the
script's metric). The row-0 activations are captured once, from a batch of the same shape, instead of in each cell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lm.anatomy import Kind, Site
from lm.errors import UserError
from lm.hooks import Captured, Edit, capture, patch
from lm.load import LanguageModel
from tracing.arrays import Array
from tracing.metrics import Metric, Target, read_off
from tracing.probe import Probe, forward
from tracing.sweep import Sweep, swept_positions, window_layers


@dataclass(frozen=True, kw_only=True, eq=False)
class Traced:
    """One fact's scores: see `tracing.Effects` for the meaning of each."""

    clean: float
    corrupted: float
    restored: dict[Kind, Array]


@torch.inference_mode()
def trace_fact(
    model: LanguageModel,
    probe: Probe,
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
    passes = _Passes(model, probe, batch, sweep)
    tokens, layers = len(probe.prompt_ids), model.anatomy.layers
    positions = swept_positions(tokens, probe.span, sweep.positions)
    restored: dict[Kind, Array] = {}
    for kind in sweep.kinds:
        cells = np.full((tokens, layers), np.nan)
        if sweep.positions != "all":
            cells[: probe.span[0]] = passes.corrupted
        for position in positions:
            for layer in range(layers):
                cells[position, layer] = passes.cell(kind, position, layer)
                advance(1)
        restored[kind] = cells
        refuse_nan(model, probe, np.array([passes.clean, passes.corrupted]), [cells[positions]])
    return Traced(clean=passes.clean, corrupted=passes.corrupted, restored=restored)


@torch.inference_mode()
def score_cells(
    model: LanguageModel,
    probe: Probe,
    batch: Tensor,
    sweep: Sweep,
    cells: Sequence[tuple[Kind, int, int]],
) -> list[float]:
    """The scores of some cells `(kind, position, layer)`, each by a forward pass of its own."""
    passes = _Passes(model, probe, batch, sweep)
    return [passes.cell(*cell) for cell in cells]


class _Passes:
    """The forward passes of one fact: the ordinary one, made at once, and one a cell."""

    def __init__(self, model: LanguageModel, probe: Probe, batch: Tensor, sweep: Sweep) -> None:
        self.model, self.batch, self.sweep, self.layers = model, batch, sweep, model.anatomy.layers
        self.target = Target.of([probe], len(batch))
        kinds = dict.fromkeys([*sweep.kinds, *([sweep.sever] if sweep.sever else [])])
        with capture(model, [Site(kind, layer) for kind in kinds for layer in range(self.layers)]) as self.states:
            self.clean, self.corrupted = self._scores()

    def cell(self, kind: Kind, position: int, layer: int) -> float:
        edits = restorations(self.sweep, kind, layer, self.layers, position, self.states)
        with patch(self.model, edits, allow_unchanged=True):
            return self._scores()[1]

    def _scores(self) -> tuple[float, float]:
        return _clean_and_corrupted(self.model, self.target, self.batch, self.sweep.metric)


@torch.inference_mode()
def total_effect(model: LanguageModel, probe: Probe, batch: Tensor, metric: Metric) -> float:
    """What the corruption takes of one fact: the clean score minus the mean corrupted one."""
    clean, corrupted = _clean_and_corrupted(model, Target.of([probe], len(batch)), batch, metric)
    return clean - corrupted


def _clean_and_corrupted(model: LanguageModel, target: Target, batch: Tensor, metric: Metric) -> tuple[float, float]:
    found = read_off(forward(model, batch, target.answer.shape[1]), target, metric)
    return float(found[0]), float(found[1:].mean())


def restorations(sweep: Sweep, kind: Kind, layer: int, layers: int, position: int, states: Captured) -> list[Edit]:
    """Edits that put the clean state of one token back into every noisy row, and hold what is severed as it was."""
    token = slice(position, position + 1)
    back = [Site(kind, one) for one in window_layers(layer, sweep.window, layers, kind)]
    held = [Site(sweep.sever, one) for one in range(layers) if sweep.sever and Site(sweep.sever, one) not in back]
    values = [(site, states[site][:1, token]) for site in back] + [(site, states[site][1:, token]) for site in held]
    return [Edit(site=site, value=value, rows=slice(1, None), positions=[position]) for site, value in values]


def refuse_nan(model: LanguageModel, probe: Probe, scores: Array, cells: Sequence[Array]) -> None:
    """Raise UserError if a score of a fact, or a cell of it, is NaN."""
    if any(np.isnan(values).any() for values in (scores, *cells)):
        raise UserError(f"tracing fact {probe.fact.label!r} gave NaN; load {model.name} in float32 or bfloat16.")
