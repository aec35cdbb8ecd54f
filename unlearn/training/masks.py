"""Which single weights inside a scope may change: those that matter most to the forget rows beside the retain rows.

The choice is made once, on the model as it is, kept in the run folder, and exact: a weight that was not chosen keeps its
bits, under weight decay too. Whole layers and modules are chosen by `unlearn.scope.scope`.
"""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lm.devices import together
from lm.errors import UserError
from lm.run_folder import RunFolder, write_atomic
from lm.shards import gather, local_part, reshard, scatter_into
from unlearn.forward.passes import Passes
from unlearn.objectives import Fixed, Learn, Loss, NoRetain, RetainMemory
from unlearn.scope.scope import WeightMask
from unlearn.training.batches import StepRows
from unlearn.training.side import Side
from unlearn.training.step import Stepper

FILE = "mask.safetensors"


class Masks:
    """For every trainable parameter, this process's part of what may change in it."""

    def __init__(self, model: nn.Module, path: Path) -> None:
        self._masks: list[tuple[nn.Parameter, Tensor]] = []
        reshard(model)
        with safe_open(path, framework="pt") as file:
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    mask = torch.empty_like(parameter, dtype=torch.uint8, requires_grad=False)
                    scatter_into(mask, file.get_tensor(name))
                    self._masks.append((parameter, local_part(mask).bool()))

    @torch.no_grad()
    def keep_gradient(self) -> None:
        """Set every other weight's gradient to 0."""
        for parameter, mask in self._masks:
            if parameter.grad is not None:
                local_part(parameter.grad).masked_fill_(~mask, 0.0)

    @torch.no_grad()
    def decay(self, factor: float) -> None:
        """Multiply the weights that may change by `factor`, as AdamW's decoupled decay does to all."""
        for parameter, mask in self._masks:
            local = local_part(parameter)
            local.copy_(torch.where(mask, local * factor, local))


def make_masks(
    passes: Passes, forget: Side, retain: Side, mask: WeightMask, run: RunFolder, *, micro_batch: int
) -> Masks:
    """The masks of a run, from its folder if they are there already. Every process must call it, before training.

    Badge: **reconstruction**, in the manner of weight attribution (WAGLE, Jia et al. 2024, arXiv 2410.17509) and of gradient
    saliency (SalUn, Fan et al. 2024, arXiv 2310.12508).
    """
    path, model = run.path / FILE, passes.model.model
    if not path.exists():
        forget_scores, retain_scores = (_attribution(passes, side, mask.rows, micro_batch) for side in (forget, retain))
        if run.main:
            chosen = top_share(relative(forget_scores, retain_scores), mask.share)
            content = save({name: scores.to(torch.uint8) for name, scores in chosen.items()})
            run.note(mask=hashlib.sha256(content).hexdigest())
            write_atomic(path, content)
    with together(passes.acc):
        if run.main:
            known = run.manifest.get("mask")  # a run from before it was noted has none
            if known is not None and hashlib.sha256(path.read_bytes()).hexdigest() != known:
                raise UserError(f"{path} is not as it was written: restore it, or begin in another folder")
    return Masks(model, path)


def _attribution(passes: Passes, side: Side, rows: int, micro_batch: int) -> dict[str, Tensor]:
    """|gradient x weight| of the mean cross-entropy of some rows, evenly spread; whole, on the main process alone."""
    if not side.rows:
        return {}
    every = -(-len(side.rows) // rows)
    chosen = StepRows(tuple((True, row) for row in range(0, len(side.rows), every)))
    loss, only = Loss(Learn(), NoRetain(), Fixed()), replace(side, original=None)
    step = Stepper(passes, loss, only, Side([]), micro_batch=micro_batch, weighting="global_tokens")
    step.gradient(chosen, RetainMemory())
    named = {name: p for name, p in passes.model.model.named_parameters() if p.requires_grad}
    scores: dict[str, Tensor] = {}
    for name, parameter in named.items():
        if parameter.grad is not None:
            whole = gather((parameter.grad.float() * parameter.detach().float()).abs())
            if passes.acc.is_main_process:
                scores[name] = whole
        parameter.grad = None
    return scores


def relative(forget: dict[str, Tensor], retain: dict[str, Tensor]) -> dict[str, Tensor]:
    """`forget / (retain + mean(retain))`, weight by weight, the mean over all; `forget` where nothing is to be retained.

    The mean keeps weights that matter to nobody from winning by a division by nearly 0.
    """
    if not retain:
        return forget
    count = sum(scores.numel() for scores in retain.values())
    mean = sum(float(scores.sum(dtype=torch.float64)) for scores in retain.values()) / count
    return {
        name: scores / (retain[name] + mean).clamp(min=torch.finfo(scores.dtype).tiny)
        for name, scores in forget.items()
    }


def top_share(scores: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """True on the `share` of all weights with the highest scores, at least one; ties go to the first, in order of names given."""
    flat = torch.cat([values.flatten() for values in scores.values()])
    count = max(round(share * len(flat)), 1)
    least = flat.kthvalue(len(flat) - count + 1).values
    chosen = flat > least
    ties = (flat == least).nonzero().flatten()
    chosen[ties[: count - int(chosen.sum())]] = True
    sizes = [values.numel() for values in scores.values()]
    bounds = [0, *itertools.accumulate(sizes)]
    return {
        name: chosen[first:last].view(values.shape)
        for (name, values), (first, last) in zip(scores.items(), itertools.pairwise(bounds), strict=True)
    }
