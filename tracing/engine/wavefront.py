"""The exact fast engine: the cells of the published procedure, each computed from where it first differs.

One clean and `samples` corrupted passes a fact give the *trunk*: the stream before every block, keys and values, and what
MLP and attention add. A cell (kind, token t, layer l, noise sample) leaves the trunk at its own layer: it joins a growing
batch there, in which only the tokens from t on are run, with the keys and values of the earlier ones, which cannot see t,
from the trunk. After the last block one call of the head scores all cells, at the answer's positions alone.

Badge: faithful; equal to `tracing.engine.reference` cell by cell (tests). Blocks are run by `lm.forward.block_replay`,
    without any model's code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange, reduce
from torch import Tensor

from lm.anatomy import EMBEDDING, Kind, Site
from lm.errors import UserError
from lm.forward import block_replay
from lm.forward.hooks import capture, intercept
from lm.model import LanguageModel
from tracing.arrays import Array
from tracing.engine.estimate import trunk_kinds
from tracing.engine.reference import Traced, refuse_nan
from tracing.question.encoded_fact import EncodedFact
from tracing.question.metrics import beside_clean, read_all
from tracing.question.sweep import Sweep, first_block, swept_positions, window_layers
from tracing.question.target import Target


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What one cell restores at its token: `kind` at `layers`. It is reported at `layer`, their center."""

    kind: Kind
    layer: int
    layers: range

    @property
    def enters(self) -> int:
        """The block before which the cell leaves the trunk."""
        return first_block(self.kind, self.layers)


@dataclass(frozen=True, kw_only=True)
class Trunk:
    """The ordinary passes of some facts of one shape. Rows are facts * samples, a fact's samples together.

    Attributes:
        stream: layers + 1 tensors (rows, tokens, hidden), corrupted: before each block, and after the last.
        past: corrupted keys and values.
        clean: kind -> a (facts, tokens, hidden) tensor for each layer.
        attention: what attention adds in the corrupted pass, (rows, tokens, hidden) a layer, where MLPs are restored.
        held: what the severed module adds in the corrupted pass, a (rows, tokens, hidden) tensor for each layer, or none.
        scores: (facts, 2, metrics), of the clean pass, and the mean of the corrupted ones.
        target: what the corrupted rows are scored by.
    """

    stream: Sequence[Tensor]
    past: block_replay.Past
    clean: dict[Kind, Sequence[Tensor]]
    attention: Sequence[Tensor]
    held: Sequence[Tensor]
    scores: Array
    target: Target

    def restored(self, cell: Cell, rows: Tensor, facts: Tensor, position: int) -> Tensor:
        """(rows, hidden): the stream at the token where the cell leaves the trunk, for some rows and the facts they are of."""
        start = cell.layers.start
        clean = self.clean[cell.kind][start]
        back = clean[facts.to(clean.device), position]
        if cell.kind == "resid":
            return back
        before = self.stream[start]
        stream = before[rows.to(before.device), position].to(back.device)
        if cell.kind == "attn":
            return stream
        return stream + self.attention[start][rows.to(back.device), position] + back


class Wavefront:
    """The engine for one model and one sweep; at most `rows` rows (cell x fact x noise sample) run at once."""

    def __init__(self, model: LanguageModel, sweep: Sweep, rows: int) -> None:
        self.model, self.sweep, self.rows = model, sweep, max(1, rows)
        layers = model.anatomy.layers
        cells = [
            Cell(kind=kind, layer=layer, layers=window_layers(layer, sweep.window, layers, kind))
            for kind in sweep.kinds
            for layer in range(layers)
        ]
        self.cells = sorted(cells, key=lambda cell: cell.enters)
        self._calls: dict[tuple[int, int], list[block_replay.Call]] = {}

    @torch.inference_mode()
    def trace(
        self,
        encoded_facts: Sequence[EncodedFact],
        batches: Sequence[Tensor],
        advance: Callable[[int], None] = lambda cells: None,
    ) -> list[Traced]:
        """All cells of some facts whose prompts, answers and batches (`Corruptor.batch`) have equal sizes. UserError for NaN."""
        tokens, layers, samples = len(encoded_facts[0].prompt_ids), self.model.anatomy.layers, len(batches[0]) - 1
        trunk = self._trunk(encoded_facts, torch.cat(list(batches)), 1 + samples)
        shape = len(encoded_facts), tokens, layers, len(self.sweep.metrics)
        sums = {kind: np.full(shape, np.nan) for kind in self.sweep.kinds}
        swept = [swept_positions(tokens, encoded.span, self.sweep.positions) for encoded in encoded_facts]
        for position in range(tokens):
            swept_facts = [fact for fact, positions in enumerate(swept) if position in positions]
            facts = [fact for fact in swept_facts if position >= encoded_facts[fact].span[0]]
            for cells_of_kind in sums.values():
                cells_of_kind[facts, position] = 0.0
            for cells, rows in self._waves(self.cells, facts, samples):
                scores = self._wave(trunk, position, cells, rows, samples).cpu()
                for cell, values in zip(cells, scores, strict=True):
                    cells_here = sums[cell.kind][:, position, cell.layer]
                    np.add.at(cells_here, (rows // samples).numpy(), values.numpy() / samples)
            advance(len(swept_facts) * len(self.cells))
        return [
            self._traced(encoded, trunk.scores[fact], {kind: cells[fact] for kind, cells in sums.items()})
            for fact, encoded in enumerate(encoded_facts)
        ]

    def sizes(self, encoded_facts: Sequence[EncodedFact], samples: int) -> list[int]:
        """How many rows each wave of `trace` has, in order, for facts of one shape with so many corrupted rows each."""
        tokens, sizes = len(encoded_facts[0].prompt_ids), []
        swept = [swept_positions(tokens, encoded.span, self.sweep.positions) for encoded in encoded_facts]
        sizes_of: dict[int, list[int]] = {}  # number of facts -> the sizes
        for position in range(tokens):
            facts = sum(
                position in places and position >= encoded.span[0]
                for encoded, places in zip(encoded_facts, swept, strict=True)
            )
            if facts not in sizes_of:
                sizes_of[facts] = [
                    len(some) * len(rows) for some, rows in self._waves(self.cells, range(facts), samples)
                ]
            sizes += sizes_of[facts]
        return sizes

    @torch.inference_mode()
    def score_cells(self, encoded: EncodedFact, batch: Tensor, wanted: Sequence[tuple[Kind, int, int]]) -> list[float]:
        """The scores of chosen cells `(kind, position, layer)` of one fact by the sweep's metric, in their order: those of
        `tracing.engine.reference.score_cells`.

        Raises:
            UserError: a cell that does not exist or whose kind the sweep does not have; NaN.
        """
        tokens, layers, samples = len(encoded.prompt_ids), self.model.anatomy.layers, len(batch) - 1
        for kind, position, layer in wanted:
            if kind not in self.sweep.kinds or not (0 <= position < tokens and 0 <= layer < layers):
                raise UserError(
                    f"there is no cell of {kind} at token {position}, layer {layer}: choose of {', '.join(self.sweep.kinds)}, "
                    f"{tokens} tokens and {layers} layers"
                )
        trunk = self._trunk([encoded], batch, 1 + samples)
        corrupted = float(trunk.scores[0, 1, 0])
        scores = {cell: corrupted if cell[1] < encoded.span[0] else 0.0 for cell in wanted}
        for position in sorted({position for _, position, _ in scores if position >= encoded.span[0]}):
            chosen = [cell for cell in self.cells if (cell.kind, position, cell.layer) in scores]
            for cells, rows in self._waves(chosen, [0], samples):
                values = self._wave(trunk, position, cells, rows, samples).cpu()[..., 0].sum(1) / samples
                for cell, value in zip(cells, values.tolist(), strict=True):
                    scores[cell.kind, position, cell.layer] += value
        refuse_nan(self.model, encoded, trunk.scores[0], [np.array(list(scores.values()))])
        return [scores[cell] for cell in wanted]

    def _traced(self, encoded: EncodedFact, scores: Array, cells: dict[Kind, Array]) -> Traced:
        for values in cells.values():
            values[: encoded.span[0]] = scores[1]  # by causality: what lies before the subject cannot bring it back
        positions = swept_positions(len(encoded.prompt_ids), encoded.span, self.sweep.positions)
        refuse_nan(self.model, encoded, scores, [values[positions] for values in cells.values()])
        return Traced.of(self.sweep, scores, cells)

    def _trunk(self, encoded_facts: Sequence[EncodedFact], batch: Tensor, each: int) -> Trunk:
        facts, layers = len(encoded_facts), range(self.model.anatomy.layers)
        keep = len(encoded_facts[0].answer_ids)
        sites = [EMBEDDING, *(Site(kind, layer) for kind in sorted(trunk_kinds(self.sweep)) for layer in layers)]
        is_clean = torch.arange(facts * each) % each == 0
        order = torch.cat([is_clean.nonzero(), (~is_clean).nonzero()]).squeeze(1)
        clean, noisy = (
            slice(0, facts),
            slice(facts, None),
        )  # of rows in this order: views, so that nothing is kept twice
        with capture(self.model, sites) as seen:
            logits, past = block_replay.trunk(self.model, batch[order.to(batch.device)], keep)

        def of(site: Site, rows: slice) -> Tensor:
            return seen[site][rows]

        target = beside_clean(Target.of(encoded_facts, each).rows(order), logits[clean], self.sweep.metrics)
        scored = read_all(logits, target, self.sweep.metrics).cpu()
        corrupted = reduce(scored[noisy], "(facts samples) metrics -> facts metrics", "mean", facts=facts)
        return Trunk(
            stream=[of(EMBEDDING, noisy), *(of(Site("resid", layer), noisy) for layer in layers)],
            past=past.of_rows(noisy),
            clean={kind: [of(Site(kind, layer), clean) for layer in layers] for kind in self.sweep.kinds},
            attention=[of(Site("attn", layer), noisy) for layer in layers] if "mlp" in self.sweep.kinds else [],
            held=[of(Site(self.sweep.sever, layer), noisy) for layer in layers] if self.sweep.sever else [],
            scores=torch.stack([scored[clean], corrupted], 1).numpy(),
            target=target.rows(noisy),
        )

    def _waves(
        self, cells: Sequence[Cell], facts: Sequence[int], samples: int
    ) -> Iterator[tuple[Sequence[Cell], Tensor]]:
        """Cells and trunk rows that run together: all of them, or as many as `rows` allows."""
        sources = torch.tensor([fact * samples + sample for fact in facts for sample in range(samples)])
        if len(sources):
            for start in range(0, len(cells), self.rows):
                some = cells[start : start + self.rows]
                for rows in torch.split(sources, max(1, self.rows // len(some))):
                    yield some, rows

    def _wave(self, trunk: Trunk, position: int, cells: Sequence[Cell], rows: Tensor, samples: int) -> Tensor:
        """(cells, rows, metrics): what is read off with each cell restored, for some rows of the trunk."""
        calls, past = self._calls_at(trunk, position), trunk.past.cut(position)
        facts = rows // samples
        joined: list[Cell] = []
        state: Tensor | None = None
        with ExitStack() as hooks:
            hooks.enter_context(block_replay.last_mlp_at_the_end(self.model, trunk.target.answer.shape[1]))
            for site in self._edited(cells):
                hooks.enter_context(
                    intercept(self.model, site, self._restorer(trunk, site, position, joined, rows, facts))
                )
            for layer in range(cells[0].enters, len(calls) + 1):
                new = [cell for cell in cells if cell.enters == layer]
                if new:
                    stream = trunk.stream[layer]
                    fresh = stream[rows.to(stream.device), position:].repeat(len(new), 1, 1)
                    for index, cell in enumerate(new):
                        mine = slice(index * len(rows), (index + 1) * len(rows))
                        fresh[mine, 0] = trunk.restored(cell, rows, facts, position)
                    state = fresh if state is None else torch.cat([state, fresh])
                    joined += new
                if layer < len(calls) and state is not None:
                    state = calls[layer].run(state, past, rows.repeat(len(joined)))
        assert state is not None
        scores = self._scored(state, trunk.target.rows(rows).repeat(len(cells)))
        return rearrange(scores, "(cells rows) metrics -> cells rows metrics", cells=len(cells))

    def _edited(self, cells: Sequence[Cell]) -> list[Site]:
        """The sites whose values are replaced in a wave of these cells."""
        restored = {Site(cell.kind, layer) for cell in cells for layer in cell.layers if layer >= cell.enters}
        if self.sweep.sever:
            restored |= {Site(self.sweep.sever, layer) for layer in range(cells[0].enters, self.model.anatomy.layers)}
        return sorted(restored)

    def _restorer(
        self, trunk: Trunk, site: Site, position: int, joined: Sequence[Cell], rows: Tensor, facts: Tensor
    ) -> Callable[[Tensor], Tensor | None]:
        """Writes the clean value at the first token into the cells that restore `site`, and, if it is severed, the
        corrupted one into all others. `joined` are the cells in the batch when it is called."""

        def see(hidden: Tensor) -> Tensor | None:
            restoring = torch.tensor([cell.kind == site.kind and site.layer in cell.layers for cell in joined])
            new = rearrange(hidden.clone(), "(cells rows) ... -> cells rows ...", cells=len(joined))
            if self.sweep.sever == site.kind:
                new[(~restoring).to(hidden.device), :, 0] = trunk.held[site.layer][rows.to(hidden.device), position]
            if bool(restoring.any()):
                clean = trunk.clean[site.kind][site.layer]
                new[restoring.to(hidden.device), :, 0] = clean[facts.to(clean.device), position]
            return rearrange(new, "cells rows ... -> (cells rows) ...")

        return see

    def _scored(self, state: Tensor, target: Target) -> Tensor:
        """(rows, metrics): what is read off, the head's output a bounded number of rows at a time."""
        keep = target.answer.shape[1]
        vocabulary, hidden = self.model.anatomy.vocabulary, self.model.anatomy.hidden
        beside = 3 if target.clean is not None else 1  # clean distributions, and the divergence of each token
        step = max(1, 8 * self.rows * hidden // (keep * vocabulary * beside))
        parts = [slice(start, start + step) for start in range(0, len(state), step)]
        return torch.cat(
            [
                read_all(block_replay.logits(self.model, state[part, -keep:]), target.rows(part), self.sweep.metrics)
                for part in parts
            ]
        )

    def _calls_at(self, trunk: Trunk, position: int) -> list[block_replay.Call]:
        embedding = trunk.stream[0]
        key = (embedding.shape[1], position)
        if key not in self._calls:
            self._calls[key] = block_replay.calls(self.model, embedding[:1, position:], trunk.past.cut(position))
        return self._calls[key]
