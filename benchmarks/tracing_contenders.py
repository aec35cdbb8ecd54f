"""The contenders of benchmarks/tracing.py: each gives the probability of the answer for cells (kind, position, layer)."""

from __future__ import annotations

import importlib.metadata
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lm.anatomy import Kind, Site, module_at
from lm.forward.hooks import Edit, capture, patch
from lm.model import LanguageModel
from tracing.engine.reference import restorations, score_cells
from tracing.engine.wavefront import Wavefront
from tracing.question.encoded_fact import EncodedFact
from tracing.question.facts import Fact
from tracing.question.sweep import Sweep, window_layers

CellPlace = tuple[Kind, int, int]


@dataclass(frozen=True, kw_only=True)
class Question:
    """One prompt, as tokens."""

    clean: Tensor
    """(tokens,)"""
    corrupted: Tensor
    """(samples, tokens)"""
    span: tuple[int, int]
    answer: int
    sweep: Sweep

    @property
    def encoded(self) -> EncodedFact:
        ids = tuple(self.clean.tolist())
        return EncodedFact(
            fact=Fact("x", "x", "x"), prompt_ids=ids, answer_ids=(self.answer,), span=self.span, tokens=("",) * len(ids)
        )


class Contender(ABC):
    """A way to compute cells."""

    peer: ClassVar[bool] = False
    """Another project's: single layers on a CPU only."""
    whole: ClassVar[bool] = False
    """Computes all cells whatever is asked for."""
    package: ClassVar[str] = "palimpsest-unlearning"

    def __init__(self, model: LanguageModel, question: Question) -> None:
        self.model, self.question = model, question

    @property
    def version(self) -> str:
        return importlib.metadata.version(self.package)

    @abstractmethod
    def scores(self, cells: Sequence[CellPlace]) -> list[float]:
        """The mean over the corrupted copies of the answer's probability with each cell restored.

        Of no cells it still does what a sweep does once, whatever the number of its cells.
        """

    @torch.inference_mode()
    def batch(self) -> Tensor:
        """(1 + samples, tokens, hidden) embeddings, row 0 clean."""
        rows = torch.cat([self.question.clean[None], self.question.corrupted])
        layer = self.model.model.get_input_embeddings()
        assert layer is not None
        embedded: Tensor = layer(rows.to(self.model.device))
        return embedded

    def probability(self, logits: Tensor) -> Tensor:
        """(rows,) of (rows, vocabulary)."""
        return logits.float().softmax(-1)[:, self.question.answer]


class Wave(Contender):
    """This project's engine, all cells."""

    whole = True

    def scores(self, cells: Sequence[CellPlace]) -> list[float]:
        (found,) = Wavefront(self.model, self.question.sweep, 1 << 14).trace([self.question.encoded], [self.batch()])
        return [float(found.restored[kind][position, layer]) for kind, position, layer in cells]


class Loop(Contender):
    """The published procedure, one forward pass a cell."""

    def scores(self, cells: Sequence[CellPlace]) -> list[float]:
        return score_cells(self.model, self.question.encoded, self.batch(), self.question.sweep, cells)


class Script(Contender):
    """The 2022 script's way: the clean run is row 0 of every pass, hooks copy its token into the other rows, and the model's
    whole output is made, though one position of it is read."""

    @torch.inference_mode()
    def scores(self, cells: Sequence[CellPlace]) -> list[float]:
        batch, anatomy, found = self.batch(), self.model.anatomy, []
        for kind, position, layer in cells:

            def restore(module: nn.Module, inputs: Any, output: Any, position: int = position) -> None:
                hidden = output[0] if isinstance(output, tuple) else output
                hidden[1:, position] = hidden[0, position]

            layers = window_layers(layer, self.question.sweep.window, anatomy.layers, kind)
            modules = [module_at(self.model.model, anatomy.module_path(Site(kind, one))) for one in layers]
            hooks = [module.register_forward_hook(restore) for module in modules]
            try:
                logits = self.model.model(inputs_embeds=batch, use_cache=False).logits
            finally:
                for hook in hooks:
                    hook.remove()
            found.append(float(self.probability(logits[1:, -1]).mean()))
        return found


class Dense(Contender):
    """Several cells in one batch, each a whole forward pass of its own rows."""

    TOGETHER = 8

    @torch.inference_mode()
    def scores(self, cells: Sequence[CellPlace]) -> list[float]:
        batch, layers, found = self.batch(), self.model.anatomy.layers, []
        sites = [Site(kind, layer) for kind in self.question.sweep.kinds for layer in range(layers)]
        with capture(self.model, sites) as states:
            self.model.model(inputs_embeds=batch, use_cache=False, logits_to_keep=1)
        samples = len(batch) - 1
        for start in range(0, len(cells), self.TOGETHER):
            some = cells[start : start + self.TOGETHER]
            edits = []
            for place, (kind, position, layer) in enumerate(some):
                rows = slice(place * samples, (place + 1) * samples)
                for edit in restorations(self.question.sweep, kind, layer, layers, position, states):
                    edits.append(Edit(site=edit.site, value=edit.value, rows=rows, positions=edit.positions))
            with patch(self.model, edits, allow_unchanged=True):
                logits = self.model.model(
                    inputs_embeds=batch[1:].repeat(len(some), 1, 1), use_cache=False, logits_to_keep=1
                ).logits[:, -1]
            found += self.probability(logits).view(len(some), samples).mean(1).tolist()
        return found


class TransformerLens(Contender):
    """`generic_activation_patch` on a `TransformerBridge` of the same weights, the index table naming the cells."""

    peer = True
    package = "transformer-lens"
    NAMES: ClassVar[dict[str, str]] = {"resid": "resid_post", "mlp": "mlp_out"}

    def __init__(self, model: LanguageModel, question: Question) -> None:
        super().__init__(model, question)
        from transformer_lens.model_bridge import TransformerBridge

        with tempfile.TemporaryDirectory() as folder:  # it looks for the tokenizer by the model's name
            model.model.save_pretrained(folder)
            model.tokenizer.save_pretrained(folder)
            dtype = next(model.model.parameters()).dtype
            self.bridge = TransformerBridge.boot_transformers(folder, device="cpu", dtype=dtype)

    @torch.inference_mode()
    def scores(self, cells: Sequence[CellPlace]) -> list[float]:
        import pandas
        from transformer_lens import patching

        names = [self.NAMES[kind] for kind in self.question.sweep.kinds]
        wanted = [f"blocks.{layer}.hook_{name}" for name in names for layer in range(self.model.anatomy.layers)]
        _, cache = self.bridge.run_with_cache(self.question.clean[None], names_filter=lambda name: name in wanted)
        found: dict[CellPlace, float] = {}
        for kind in self.question.sweep.kinds:
            mine = [cell for cell in cells if cell[0] == kind]
            if not mine:
                continue
            values = patching.generic_activation_patch(
                self.bridge,
                self.question.corrupted,
                cache,
                lambda logits: self.probability(logits[:, -1]).mean(),
                patching.layer_pos_patch_setter,
                self.NAMES[kind],
                index_df=pandas.DataFrame([(layer, position) for _, position, layer in mine], columns=["layer", "pos"]),
            )
            found |= dict(zip(mine, values.tolist(), strict=True))
        return [found[cell] for cell in cells]


class NNsight(Contender):
    """One `model.trace` for all clean values, one a cell: the clean value is written into a module's output."""

    peer = True
    package = "nnsight"

    def __init__(self, model: LanguageModel, question: Question) -> None:
        super().__init__(model, question)
        from nnsight import NNsight as Wrapped

        self.wrapped = Wrapped(model.model)

    def scores(self, cells: Sequence[CellPlace]) -> list[float]:
        import nnsight

        depth = {"attn": 0, "mlp": 1, "resid": 2}  # values must be asked for in the order in which the model makes them
        kinds = sorted(self.question.sweep.kinds, key=depth.__getitem__)
        sites = [(layer, kind) for layer in range(self.model.anatomy.layers) for kind in kinds]
        found = []
        with torch.inference_mode():
            with self.wrapped.trace(self.question.clean[None]):
                kept = nnsight.save([self._module(kind, layer).output for layer, kind in sites])
            clean = dict(zip(sites, kept, strict=True))
            for kind, position, layer in cells:
                module, value = self._module(kind, layer), clean[layer, kind][:, position]
                with self.wrapped.trace(self.question.corrupted):
                    module.output[:, position] = value
                    logits = self.wrapped.output.logits.save()
                found.append(float(self.probability(logits[:, -1]).mean()))
        return found

    def _module(self, kind: Kind, layer: int) -> Any:
        module = self.wrapped
        for part in self.model.anatomy.module_path(Site(kind, layer)).split("."):
            module = module[int(part)] if part.isdigit() else getattr(module, part)
        return module


CONTENDERS: dict[str, type[Contender]] = {
    "wavefront": Wave,
    "reference": Loop,
    "script_2022": Script,
    "dense": Dense,
    "transformer_lens": TransformerLens,
    "nnsight": NNsight,
}
