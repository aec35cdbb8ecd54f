"""What a run will take, said before it: peak memory of this process, and the time of the steps.

Memory is counted: weights, gradients, optimizer and original are sizes of parameters, logits a chunk's, and activations
those of one row and of two, measured tensor by tensor and carried to the largest micro-batch that will come. Time is that of
three micro-batches of each side, a small, a middling and a large one, and of an optimizer step. Nothing is changed by it.
Gathered weights of sharded models and what processes wait for each other are not in it.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from lm.run_folder import peak_memory_bytes, resident_bytes
from lm.shards import local_part
from unlearn.objectives import Needs
from unlearn.scope.scope import readable_size
from unlearn.training.batches import Batches
from unlearn.training.side import Micro
from unlearn.training.step import Stepper

_LOOKED_AT = 200
"""At most so many steps' micro-batches are looked at; the others are like them."""
_SAMPLE = 1 << 22
"""Weights of which the optimizer's time is taken."""


@dataclass(frozen=True)
class Estimate:
    """Bytes of one process at its peak, and seconds of all steps."""

    now: int
    """In use already: the weights, the libraries, what was computed beforehand."""
    gradients: int
    optimizer: int
    original: int
    """The original values of what may change, where they are kept."""
    activations: int
    logits: int
    before: int
    """The peak so far, which loading may have set."""
    seconds: float

    @property
    def peak(self) -> int:
        """Bytes at the peak."""
        coming = self.gradients + self.optimizer + self.original + self.activations + self.logits
        return max(self.now + coming, self.before)

    def sentence(self) -> str:
        """For a person."""
        parts = ("now", "gradients", "optimizer", "original", "activations", "logits")
        sizes = ", ".join(f"{name} {readable_size(getattr(self, name))}" for name in parts)
        minutes, seconds = divmod(round(self.seconds), 60)
        took = f"{minutes} min {seconds:02d} s" if minutes else f"{self.seconds:.2g} s"
        return f"estimate: peak {readable_size(self.peak)} ({sizes}), {took} of steps"


def estimate(stepper: Stepper, batches: Batches, steps: int) -> Estimate:
    """Before the first step; every process must call it."""
    (now, before), original = _in_use(), sum(tensor.nbytes for tensor in _kept(stepper))
    looked = range(0, steps, -(-steps // _LOOKED_AT))  # all through the run: forget rows may come late
    micros = [micro for step in looked for micro in stepper.micros(batches.step(step), batches.epoch(step))]
    gradients = sum(local_part(p).nbytes for p in stepper.parameters)
    for parameter in stepper.parameters:  # a step's later micro-batches find one there
        parameter.grad = torch.zeros_like(parameter)
    seconds, sides = 0.0, [(0.0, 0.0)]
    for forget in (True, False):
        mine = [micro for micro in micros if micro.forget == forget and micro.rows]
        if mine:
            largest = max(mine, key=lambda micro: micro.padded)
            needs = stepper.loss.forget_needs if forget else stepper.loss.retain_needs
            tokens = min(stepper.passes.chunk, max(micro.supervised for micro in mine))
            logits = tokens * _logit_bytes(needs, stepper.passes.model.anatomy.vocabulary)
            sides.append((_activations(stepper, largest), logits))
            some = _spread(mine)
            took = sum(_seconds(partial(stepper.probe, micro)) for micro in some)
            seconds += took * sum(micro.padded for micro in mine) / sum(micro.padded for micro in some)
    for parameter in stepper.parameters:
        parameter.grad = None
    activations, logits = max(sides, key=sum)
    return Estimate(
        now=now - original,
        gradients=gradients * (2 if stepper.acc.num_processes > 1 else 1),  # DDP has its buckets beside them
        optimizer=2 * gradients,
        original=original,
        activations=round(activations),
        logits=round(logits),
        before=before,
        seconds=seconds * steps / len(looked) + steps * _optimizer_seconds(stepper),
    )


def _kept(stepper: Stepper) -> list[Tensor]:
    """What is held for the original model."""
    return stepper.passes.reference.kept if stepper.passes.reference is not None else []


def _in_use() -> tuple[int, int]:
    """Bytes now, and at the peak so far, where the model is."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    return resident_bytes(), peak_memory_bytes()


def _activations(stepper: Stepper, largest: Micro) -> float:
    """Bytes that the largest micro-batch's tensors take at once: what one row takes, and as much more for the others as a
    second one does."""
    row = max(largest.rows, key=lambda one: stepper.measure((one,), forget=largest.forget, epoch=largest.epoch).padded)
    known = [*stepper.model.parameters(), *(p.grad for p in stepper.parameters if p.grad is not None), *_kept(stepper)]
    peaks: list[int] = []
    sizes: list[int] = []
    for rows in ((row,), (row, row)):
        micro = stepper.measure(rows, forget=largest.forget, epoch=largest.epoch)
        with stepper.passes.two_targets_a_row(), Live(known) as live:
            stepper.probe(micro)
        peaks.append(live.peak)
        sizes.append(micro.padded)
    each: float = (peaks[1] - peaks[0]) / (sizes[1] - sizes[0])
    return max(peaks[0] - each * sizes[0], 0.0) + each * largest.padded


def _spread(micros: Sequence[Micro], count: int = 3) -> list[Micro]:
    """Some of them, of sizes that stand for all, and all different: in a short run most shapes are new, which takes longer."""
    ordered = sorted({micro.padded: micro for micro in micros}.values(), key=lambda micro: micro.padded)
    places = sorted({(2 * place + 1) * len(ordered) // (2 * count) for place in range(count)})
    return [ordered[place] for place in places]


def _seconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _optimizer_seconds(stepper: Stepper) -> float:
    """Of an optimizer step, from some weights that are made for it."""
    count = sum(local_part(p).numel() for p in stepper.parameters)
    first = local_part(stepper.parameters[0])
    sample = torch.nn.Parameter(torch.zeros(min(count, _SAMPLE), dtype=first.dtype, device=first.device))
    sample.grad = torch.ones_like(sample)
    optimizer = torch.optim.AdamW([sample], fused=True)

    def work() -> None:
        torch.nn.utils.clip_grad_norm_([sample], 1.0)
        optimizer.step()

    _seconds(work)  # makes its state
    return _seconds(work) * count / sample.numel()


def _logit_bytes(needs: Needs, vocabulary: int) -> float:
    """Bytes that one token's logits, and what is computed of them with its slope, take at once."""
    if not needs.vocabulary:
        return 0.0
    targets = torch.zeros(2, dtype=torch.long)
    with Live() as live:
        logits = torch.zeros(2, vocabulary).requires_grad_()
        original = torch.zeros(2, vocabulary) if any(statistic.reference for statistic in needs.statistics) else None
        values = [cross_entropy(logits, targets, reduction="none")] if needs.logprob else []
        values += [
            statistic.function(logits, targets, original if statistic.reference else None)
            for statistic in needs.statistics
        ]
        for value in values:
            torch.autograd.grad(value.sum(), logits, retain_graph=True)
    peak: int = live.peak
    return peak / 2


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that are made inside it, as long as they live.

    Attributes:
        peak: the most at once.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self._now = 0
        self._seen: WeakIdKeyDictionary = WeakIdKeyDictionary()
        for tensor in known:
            self._seen[local_part(tensor).untyped_storage()] = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor)
        return result

    def _note(self, tensor: Tensor) -> None:
        storage = local_part(tensor).untyped_storage()
        if storage not in self._seen:
            size = storage.nbytes()
            self._seen[storage] = size
            weakref.finalize(storage, self._gone, size)
            self._now += size
            self.peak = max(self.peak, self._now)

    def _gone(self, size: int) -> None:
        self._now -= size
