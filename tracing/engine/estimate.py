"""What a trace will take, told before it begins: token-blocks (one token through one block), rows that fit, memory.

Counts are exact, bytes an upper bound; seconds come from one pass that is timed. `tracing.estimate` gives it to the user.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from lm.anatomy import Kind, module_at
from lm.model import LanguageModel
from tracing.corruption.noise import Corruptor
from tracing.question.encoded_fact import EncodedFact, forward
from tracing.question.metrics import metric_of
from tracing.question.sweep import Sweep, count_cells, first_block, swept_positions, window_layers


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of some facts' cells."""

    cells: int
    wave: int
    """Token-blocks of the wavefront engine, the ordinary passes included; of the last block its cells run attention on all of
    them, the MLP on those that are read off."""
    reference: int
    """Token-blocks of the reference engine."""


@dataclass(frozen=True, kw_only=True)
class Passes:
    """What an engine runs for some facts: forward passes (a wave is one), the rows of the largest, token-blocks."""

    count: int
    rows: int
    token_blocks: int


class Planned(Protocol):
    """What an engine says of itself before it runs; see `tracing.engine.engines.Engine`."""

    def together(self, tokens: int, answer: int, samples: int) -> int: ...

    def takes(self, tokens: int, answer: int, samples: int) -> int: ...

    def passes(self, encoded_facts: Sequence[EncodedFact], samples: int) -> Passes: ...


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What tracing some facts takes. Cells, passes, rows and token-blocks are exact; the self-check of the first fact adds a few
    passes, of no more rows than `rows` or two."""

    facts: int
    """That are left to trace."""
    cells: int
    passes: int
    """Forward passes of all processes: ordinary ones, and waves."""
    rows: int
    """The most in one pass."""
    token_blocks: int
    """One token through one block."""
    reference: int
    """Token-blocks of the published loop."""
    memory: int
    """Bytes beside the model in each process: an upper bound in ordinary models."""
    seconds: float
    """Of each process, from the pass of `timed`; other work on the machine, and what a wave loses to a full pass, come on top."""
    timed: str
    """What the seconds are based on."""
    processes: int

    def __str__(self) -> str:
        if not self.facts:
            return "every fact is finished"
        times = self.reference / self.token_blocks
        few = f", {times:.1f} times fewer than the published loop" if times > 1 else ""
        shared = f" in each of {self.processes} processes" if self.processes > 1 else ""
        return (
            f"{self.facts} fact{'s' if self.facts > 1 else ''}, {self.cells:,} cells, {self.passes:,} passes of up to "
            f"{self.rows:,} rows, {self.token_blocks:,} token-blocks{few}; about {self.seconds:,.0f} s (by {self.timed}) and up "
            f"to {self.memory / 1e9:.2g} GB beside the model{shared}"
        )


@torch.inference_mode()
def estimated(
    model: LanguageModel,
    groups: Sequence[Sequence[EncodedFact]],
    corruptor: Corruptor,
    sweep: Sweep,
    engine: Planned,
    processes: int = 1,
) -> Estimate:
    """What an engine takes for all cells of facts that it is given in these groups: counted, and one pass timed. The model in
    eval mode."""
    encoded_facts = [encoded for group in groups for encoded in group]
    if not encoded_facts:
        return Estimate(
            facts=0,
            cells=0,
            passes=0,
            rows=0,
            token_blocks=0,
            reference=0,
            memory=0,
            seconds=0.0,
            timed="nothing",
            processes=processes,
        )
    samples = [corruptor.rows(encoded) for encoded in encoded_facts]
    passes = [engine.passes(group, corruptor.rows(group[0])) for group in groups]
    units, rows = sum(one.token_blocks for one in passes), max(one.rows for one in passes)
    counts = cost(encoded_facts, samples, model.anatomy.layers, sweep)
    longest = max(encoded_facts, key=lambda one: len(one.input_ids))
    batch = corruptor.batch(longest)[: min(64, rows)]
    started = time.perf_counter()
    float(forward(model, batch, 1)[0, 0, 0])
    took = time.perf_counter() - started
    here = batch.shape[0] * batch.shape[1] * model.anatomy.layers
    each = [
        engine.takes(len(one.input_ids), len(one.answer_ids), count)
        for one, count in zip(encoded_facts, samples, strict=True)
    ]
    return Estimate(
        facts=len(encoded_facts),
        cells=counts.cells,
        passes=sum(one.count for one in passes),
        rows=rows,
        token_blocks=units,
        reference=counts.reference,
        memory=max(each),
        seconds=units / here * took / processes,
        timed=f"a pass of {here:,} token-blocks that took {took:.2g} s",
        processes=processes,
    )


def alike(encoded_facts: Sequence[EncodedFact], samples: Sequence[int], engine: Planned) -> Iterator[list[int]]:
    """The places of the facts in groups of one shape, as many as the engine takes at once. `samples`: corrupted rows of each."""
    shapes: dict[tuple[int, int, int], list[int]] = {}
    for index, (encoded, rows) in enumerate(zip(encoded_facts, samples, strict=True)):
        shapes.setdefault((len(encoded.prompt_ids), len(encoded.answer_ids), rows), []).append(index)
    for (tokens, answer, rows), members in shapes.items():
        size = engine.together(tokens + answer - 1, answer, rows)
        for start in range(0, len(members), size):
            yield members[start : start + size]


def cost(encoded_facts: Sequence[EncodedFact], rows: Sequence[int], layers: int, sweep: Sweep) -> Cost:
    """Exact counts: which blocks each cell runs through, on how many tokens. `rows`: corrupted copies of each fact."""
    cells = wave = reference = 0
    enters = [
        first_block(kind, window_layers(layer, sweep.window, layers, kind))
        for kind in sweep.kinds
        for layer in range(layers)
    ]
    blocks = sum(layers - enter for enter in enters)
    for encoded, samples in zip(encoded_facts, rows, strict=True):
        tokens = len(encoded.input_ids)
        whole = (1 + samples) * tokens * layers
        here = count_cells(encoded, layers, sweep)
        positions = swept_positions(len(encoded.prompt_ids), encoded.span, sweep.positions)
        cells += here
        reference += (here + 1) * whole
        wave += whole + samples * blocks * sum(tokens - place for place in positions if place >= encoded.span[0])
    return Cost(cells=cells, wave=wave, reference=reference)


def row_bytes(model: LanguageModel, tokens: int) -> int:
    """About what one row of `tokens` tokens takes in a wave: the stream and its copies, what a block makes on the way, keys
    and values of its past, attention scores. An upper bound in ordinary models, not a measurement."""
    block = module_at(model.model, model.anatomy.block_path(0))
    made = sum(max(weight.shape) for weight in block.parameters() if weight.ndim >= 2)
    heads = int(getattr(model.config, "num_attention_heads", 1))
    a_token = 6 * model.anatomy.hidden + made + 2 * heads * tokens
    return tokens * a_token * next(model.model.parameters()).element_size()


def trunk_row_bytes(model: LanguageModel, tokens: int, answer: int, sweep: Sweep) -> int:
    """About what one row of an ordinary pass takes that the cells of a fact leave from: while it runs, and what is kept of it
    (the stream and what the modules add, keys and values, at every layer; the scored logits)."""
    config, element = model.config, next(model.model.parameters()).element_size()
    layers, hidden = model.anatomy.layers, model.anatomy.hidden
    heads = int(getattr(config, "num_attention_heads", 1))
    compressed = getattr(config, "qk_head_dim", 0), getattr(config, "v_head_dim", 0)  # DeepSeek's keys and values
    size = max(int(getattr(config, "head_dim", None) or hidden // heads), *(int(each or 0) for each in compressed))
    past = 2 * size * int(getattr(config, "num_key_value_heads", None) or heads)
    kept = hidden + layers * (hidden * len(trunk_kinds(sweep)) + past)
    beside = (
        16 if any(metric_of(name).needs_clean for name in sweep.metrics) else 0
    )  # clean distributions, and the divergence of each token
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
    heads = int(getattr(model.config, "num_attention_heads", 1))
    return gradient_row_bytes(model, tokens, answer) + 12 * 8 * heads * tokens * tokens


def trunk_kinds(sweep: Sweep) -> set[Kind]:
    """What has to be kept of the ordinary passes at every layer."""
    kinds: set[Kind] = {"resid", *sweep.kinds, *([sweep.sever] if sweep.sever else [])}
    return kinds | {"attn"} if "mlp" in kinds else kinds


def rows_within(model: LanguageModel, tokens: int, memory: int) -> int:
    """How many rows of `tokens` tokens may run together within `memory` bytes, at least 1."""
    return max(1, memory // row_bytes(model, tokens))
