"""What a trace will take, told before it begins: token-blocks (one token through one block), rows that fit, memory.

Arithmetic only; seconds come from a pass that was timed (`tracing.tracer`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lm.anatomy import Kind, module_at
from lm.load import LanguageModel
from tracing.probe import Probe
from tracing.sweep import Sweep, count_cells, first_block, swept_positions, window_layers


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of some facts' cells."""

    cells: int
    wave: int
    """Token-blocks of the wavefront engine, the ordinary passes included."""
    reference: int
    """Token-blocks of the reference engine."""


def cost(probes: Sequence[Probe], rows: Sequence[int], layers: int, sweep: Sweep) -> Cost:
    """Exact counts: which blocks each cell runs through, on how many tokens. `rows`: corrupted copies of each fact."""
    cells = wave = reference = 0
    enters = [
        first_block(kind, window_layers(layer, sweep.window, layers, kind))
        for kind in sweep.kinds
        for layer in range(layers)
    ]
    blocks = sum(layers - enter for enter in enters)
    for probe, samples in zip(probes, rows, strict=True):
        tokens = len(probe.input_ids)
        whole = (1 + samples) * tokens * layers
        here = count_cells(probe, layers, sweep)
        positions = swept_positions(len(probe.prompt_ids), probe.span, sweep.positions)
        cells += here
        reference += (here + 1) * whole
        wave += whole + samples * blocks * sum(tokens - place for place in positions if place >= probe.span[0])
    return Cost(cells=cells, wave=wave, reference=reference)


def row_bytes(model: LanguageModel, tokens: int) -> int:
    """About what one row of `tokens` tokens takes in a wave: the stream and its copies, what a block makes on the way, keys
    and values of its past, attention scores. An upper bound in ordinary models, not a measurement."""
    block = module_at(model.model, model.anatomy.block_path(0))
    made = sum(max(weight.shape) for weight in block.parameters() if weight.ndim >= 2)
    heads = int(getattr(model.model.config, "num_attention_heads", 1))
    a_token = 6 * model.anatomy.hidden + made + 2 * heads * tokens
    return tokens * a_token * next(model.model.parameters()).element_size()


def trunk_row_bytes(model: LanguageModel, tokens: int, answer: int, sweep: Sweep) -> int:
    """About what one row of an ordinary pass takes that the cells of a fact leave from: while it runs, and what is kept of it
    (the stream and what the modules add, keys and values, at every layer; the scored logits)."""
    config, element = model.model.config, next(model.model.parameters()).element_size()
    layers, hidden = model.anatomy.layers, model.anatomy.hidden
    heads = int(getattr(config, "num_attention_heads", 1))
    size = int(getattr(config, "head_dim", None) or hidden // heads)
    past = 2 * size * int(getattr(config, "num_key_value_heads", None) or heads)
    kept = hidden + layers * (hidden * len(trunk_kinds(sweep)) + past)
    beside = 16 if "negative_kl" in sweep.metrics else 0  # clean distributions, and the divergence of each token
    scored = answer * model.anatomy.vocabulary * (element + 8 + beside)  # and their logarithms in float32
    return row_bytes(model, tokens) + tokens * kept * element + scored


def embedded_row_bytes(model: LanguageModel, tokens: int) -> int:
    """What one row of a fact's batch takes, all of which are there at once, whatever the parts in which they run."""
    return tokens * model.anatomy.hidden * next(model.model.parameters()).element_size()


def gradient_row_bytes(model: LanguageModel, tokens: int, answer: int) -> int:
    """About what one row takes in a forward pass that a backward one follows: what every block made and its gradients, the
    scored logits, their logarithms and the gradients of both. An upper bound in ordinary models, not a measurement."""
    scored = answer * model.anatomy.vocabulary * 2 * (next(model.model.parameters()).element_size() + 8)
    return 2 * model.anatomy.layers * row_bytes(model, tokens) + scored


def attended_row_bytes(model: LanguageModel, tokens: int, answer: int) -> int:
    """`gradient_row_bytes` where attention is seen from inside, too: with a layer's probabilities in float64, some times."""
    heads = int(getattr(model.model.config, "num_attention_heads", 1))
    return gradient_row_bytes(model, tokens, answer) + 12 * 8 * heads * tokens * tokens


def trunk_kinds(sweep: Sweep) -> set[Kind]:
    """What has to be kept of the ordinary passes at every layer."""
    kinds: set[Kind] = {"resid", *sweep.kinds, *([sweep.sever] if sweep.sever else [])}
    return kinds | {"attn"} if "mlp" in kinds else kinds


def rows_within(model: LanguageModel, tokens: int, memory: int) -> int:
    """How many rows of `tokens` tokens may run together within `memory` bytes, at least 1."""
    return max(1, memory // row_bytes(model, tokens))
