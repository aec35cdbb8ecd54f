"""Steps that are computed by one process (`test_step_devices.py`) and, as a program, by several: the gradient of each.

`accelerate launch … step_cases.py FILE` writes what came out.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from accelerate import Accelerator
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lm"))

from families import tiny

from lm.devices import accelerator, is_main, leave_process_group
from lm.model import LanguageModel
from lm.prompts import Encoded
from lm.shards import gather
from unlearn.forward.passes import Passes
from unlearn.forward.reference_model import reference
from unlearn.objectives import (
    NPO,
    CrossEntropy,
    Divergence,
    Fixed,
    HiddenDistance,
    HiddenNeed,
    Joint,
    Loss,
    Needs,
    Objective,
    Retain,
    RetainMemory,
    Term,
    TokenStats,
    Weight,
)
from unlearn.scope import lora
from unlearn.scope.scope import Lora, Scope
from unlearn.training.batches import StepRows
from unlearn.training.side import Side
from unlearn.training.step import Stepper, Weighting


@dataclass(frozen=True, kw_only=True)
class Quiet(Objective):
    """Small hidden states after block 0: reads nothing above."""

    published_retain: ClassVar[Retain] = CrossEntropy()
    published_weight: ClassVar[Weight] = Fixed()

    def forget_needs(self) -> Needs:
        return Needs(logprob=False, hidden=HiddenNeed(0))

    def forget_term(self, stats: TokenStats) -> Term:
        assert stats.hidden is not None
        assert stats.hidden_mask is not None
        return Term(stats.hidden.square().mean(-1).where(stats.hidden_mask, 0.0).sum(), unit="hidden")


BLOCKS, MODEL = Scope(layers=(0, 1)), Scope(layers="model")
ADAPTED = Scope(layers=(0, 1), modules=("all",), lora=Lora(rank=2))
LENGTHS = Scope(layers=(1,), lora=Lora(rank=2, use_dora=True))
COMPARED = Loss.of(NPO(), Divergence())
CASES: dict[str, tuple[str, Scope, Loss, Weighting]] = {
    "shallow forget": ("olmo", BLOCKS, Loss.of(Quiet()), "global_tokens"),
    "shallow retain": ("olmo", BLOCKS, Loss.of(Joint(), HiddenDistance(layer=0)), "global_rows"),
    "shallow retain, small means": (
        "olmo",
        BLOCKS,
        Loss.of(NPO(), HiddenDistance(layer=0), Fixed()),
        "micro_batch_mean",
    ),
    "compared": ("gemma2", BLOCKS, COMPARED, "global_tokens"),
    "compared, head learns": ("olmo", MODEL, COMPARED, "global_tokens"),
    "compared, tied head learns": ("gpt2", MODEL, COMPARED, "global_tokens"),
    "compared, adapters": ("llama", ADAPTED, COMPARED, "global_tokens"),
    "compared, adapters with lengths": ("llama", LENGTHS, COMPARED, "global_tokens"),
    "compared, small means": ("olmo", BLOCKS, COMPARED, "micro_batch_mean"),
}
ROWS = StepRows(tuple((side, i) for i in range(5) for side in (True, False)))


def rows(first: int) -> list[Encoded]:
    """Five rows of different lengths."""
    return [Encoded([first + 7 * i + j for j in range(4 + i)], 2) for i in range(5)]


def gradient(acc: Accelerator, name: str) -> dict[str, Tensor]:
    """The gradient of a case's step and, as `loss`, what was measured."""
    family, scope, loss, weighting = CASES[name]
    model: LanguageModel = tiny(family)
    resolved = scope.resolve(model.anatomy)
    resolved.apply(model.model, model.anatomy)
    if scope.lora is not None:
        lora.inject(model.model, model.anatomy, resolved, scope.lora, seed=0)
    optimizer = torch.optim.AdamW([p for p in model.model.parameters() if p.requires_grad], lr=0.03)
    wrapped, optimizer = acc.prepare(model.model, optimizer)
    model = replace(model, model=acc.unwrap_model(wrapped))
    passes = Passes(acc, wrapped, model, reference=reference(model.model) if loss.needs_original else None)
    step = Stepper(passes, loss, Side(rows(3)), Side(rows(40)), micro_batch=2, weighting=weighting)
    memory = RetainMemory()
    step.gradient(ROWS, memory)  # a first step, so that the model differs from the original one
    optimizer.step()
    optimizer.zero_grad()
    result = step.gradient(ROWS, memory)
    found = {name: gather(p.grad) for name, p in model.model.named_parameters() if p.grad is not None}
    measured = [result.loss, result.forget_cross_entropy, result.retain_cross_entropy, result.retain_weight]
    return {**found, "loss": torch.tensor(measured)}


if __name__ == "__main__":
    everything = {case: gradient(accelerator(cpu=True), case) for case in CASES}  # an FSDP plugin is for one family
    if is_main():
        torch.save(everything, sys.argv[1])
    leave_process_group()
