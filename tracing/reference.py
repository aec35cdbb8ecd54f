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
from tracing.corruption import GaussianNoise
from tracing.metrics import mean_score, token_log_probabilities
from tracing.probe import Probe, embed, forward
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
    corruption: GaussianNoise,
    sigma: float,
    sweep: Sweep,
    advance: Callable[[int], None] = lambda cells: None,
) -> Traced:
    """All cells of one fact.

    Args:
        sigma: the absolute standard deviation of the noise.
        advance: told the number of cells done since the last call.

    Raises:
        UserError: a score is NaN.
    """
    layers = model.anatomy.layers
    answer = torch.tensor(probe.answer_ids)
    keep = len(probe.answer_ids)
    batch = corruption.corrupt(embed(model, probe.input_ids), probe.span, sigma)

    def scores(logits: Tensor) -> tuple[float, float]:
        found = token_log_probabilities(logits, answer)
        return mean_score(found[:1], sweep.metric), mean_score(found[1:], sweep.metric)

    sites = [Site(kind, layer) for kind in sweep.kinds for layer in range(layers)]
    with capture(model, sites, rows=[0]) as clean_states:
        clean, corrupted = scores(forward(model, batch, keep))

    tokens = len(probe.prompt_ids)
    positions = swept_positions(tokens, probe.span, sweep.positions)
    restored: dict[Kind, Array] = {}
    for kind in sweep.kinds:
        cells = np.full((tokens, layers), np.nan)
        if sweep.positions != "all":
            cells[: probe.span[0]] = corrupted
        for position in positions:
            for layer in range(layers):
                edits = restorations(kind, window_layers(layer, sweep.window, layers, kind), position, clean_states)
                with patch(model, edits, allow_unchanged=True):
                    cells[position, layer] = scores(forward(model, batch, keep))[1]
                advance(1)
        restored[kind] = cells
        if np.isnan(cells[positions]).any() or np.isnan([clean, corrupted]).any():
            raise UserError(
                f"tracing fact {probe.fact.label!r} gave NaN ({kind}); load {model.name} in float32 or bfloat16."
            )
    return Traced(clean=clean, corrupted=corrupted, restored=restored)


def restorations(kind: Kind, layers: Sequence[int], position: int, clean: Captured) -> list[Edit]:
    """Edits that put the clean state of one token back into every noisy row, at each of `layers`."""
    return [
        Edit(
            site=Site(kind, layer),
            value=clean[Site(kind, layer)][:, position : position + 1],
            rows=slice(1, None),
            positions=[position],
        )
        for layer in layers
    ]
