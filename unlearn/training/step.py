"""One optimizer step's gradient: token-weighted over the global batch, however it is cut into micro-batches or processes.

The adaptive weight needs the whole batch's retain cross-entropy, which is known only after the retain rows went through.
So the retain rows go first with weight 1, their accumulated gradient is scaled by the weight (it is linear), and the
forget rows follow: exact, with one pass over each row and no second gradient buffer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lm.devices import sum_over_processes, without_gradient_sync
from lm.prompts import Encoded
from lm.shards import is_sharded, reshard
from unlearn.forward.calibration import Measured, row_targets
from unlearn.forward.passes import Passes
from unlearn.gradient_filter import GradientFilter
from unlearn.objectives import Loss, Needs, RetainMemory, TokenStats
from unlearn.objectives.base import Term
from unlearn.training.batches import StepRows, dealt, micro_batches
from unlearn.training.side import Micro, Side

Weighting = Literal["global_tokens", "global_rows", "micro_batch_mean"]


@dataclass(frozen=True)
class StepResult:
    """What one step measured, over the global batch."""

    loss: float
    forget_cross_entropy: float
    """Nats a token; NaN where nothing asked for log-probabilities, and without such rows."""
    retain_cross_entropy: float
    """Likewise."""
    retain_weight: float
    forgotten_share: float
    """Share of forget tokens beyond the objective's cap (0 if it has none)."""
    forget_loss: float
    """The forget term, as it stands in `loss`; NaN without such rows."""
    retain_loss: float
    """The retain term, before its weight; likewise."""
    tokens: int
    """Real tokens, prompt and answer, that went through the model in the global batch."""


class _Held(NamedTuple):
    """What the retain rows of a step measured: mean cross-entropy (nats a token), mean loss, and its weight."""

    cross_entropy: float = math.nan
    loss: float = 0.0
    weight: float = 0.0


class _MicroSums(NamedTuple):
    """What one mixed micro-batch measured, as sums that add up over micro-batches and processes.

    Attributes:
        loss: of the micro-batch, a mean.
        forget_cross_entropy: over its forget tokens, nats; `retain_cross_entropy` likewise.
        beyond_cap: forget tokens beyond the objective's cap.
        retain_mean: the mean retain cross-entropy, nats a token; 0 without retain rows, and its weight too.
        forget_loss, retain_loss: the two terms, the latter before its weight.
    """

    loss: float
    forget_cross_entropy: float
    forget_tokens: float
    beyond_cap: float
    retain_cross_entropy: float
    retain_tokens: float
    retain_rows: float
    retain_mean: float
    retain_weight: float
    forget_loss: float
    retain_loss: float

    @classmethod
    def over_processes(cls, parts: Sequence[_MicroSums], device: torch.device) -> _MicroSums:
        """The sums of all micro-batches of all processes, the same on each."""
        mine = torch.zeros(len(cls._fields), dtype=torch.float64, device=device)
        for part in parts:
            mine += torch.tensor(part, dtype=torch.float64, device=device)
        return cls(*sum_over_processes(mine).tolist())


class Stepper:
    """Computes gradients for global batches of encoded rows; it holds no optimizer and takes no step."""

    def __init__(
        self,
        passes: Passes,
        loss: Loss,
        forget: Side,
        retain: Side,
        *,
        micro_batch: int,
        weighting: Weighting,
        micro_tokens: int | None = None,
        gradient_filter: GradientFilter | None = None,
    ) -> None:
        self.passes, self.acc, self.model = passes, passes.acc, passes.wrapped
        self.loss, self.forget, self.retain = loss, forget, retain
        self.micro_batch, self.micro_tokens, self.weighting = micro_batch, micro_tokens, weighting
        reshard(self.model)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.forget_needs, self.retain_needs, self.uses_retain = loss.forget_needs, loss.retain_needs, loss.uses_retain
        self.filter = gradient_filter
        self._forget_weight = 1.0
        self._targets: Measured | None = None
        self._unread = {True: passes.unread(self.forget_needs), False: passes.unread(self.retain_needs)}

    def gradient(
        self, rows: StepRows, memory: RetainMemory, *, forget_weight: float = 1.0, targets: Measured | None = None
    ) -> StepResult:
        """Add this step's gradient to the parameters' `.grad`, and epoch-0 sums to `memory`.

        Args:
            forget_weight: what the forget term counts at this step.
            targets: what forget rows should come to, for objectives that are calibrated.
        """
        self._forget_weight, self._targets = forget_weight, targets
        with self.passes.same_weights():
            if self.weighting == "micro_batch_mean":
                return self._micro(rows, memory)
            return self._global(rows, memory)

    def micros(self, rows: StepRows, epoch: int) -> list[Micro]:
        """What this process will run of a step, in no particular order."""
        sides: list[tuple[bool, Sequence[int]]] = []
        if self.weighting == "micro_batch_mean":
            for mixed in self._dealt(rows):
                sides += [(side, [row for is_forget, row in mixed if is_forget is side]) for side in (True, False)]
        else:
            sides += [(True, each) for each in self._micro_batches(rows.forget, forget=True, epoch=epoch)]
            sides += [(False, each) for each in self._micro_batches(rows.retain, forget=False, epoch=epoch)]
        return [self.measure(each, forget=side, epoch=epoch) for side, each in sides if side or self.uses_retain]

    def measure(self, rows: Sequence[int], *, forget: bool, epoch: int) -> Micro:
        """A micro-batch with its sizes."""
        side, _ = self._side(forget)
        texts = [side.texts[index] for index in self._places(rows, forget, epoch)]
        longest = max((len(text.ids) for text in texts), default=0)
        supervised = sum(len(text.ids) - text.answer_start for text in texts)
        return Micro(forget, tuple(rows), epoch, longest * len(texts), supervised)

    def probe(self, micro: Micro) -> None:
        """Forward and backward of one micro-batch, with a gradient of 0, on this process alone: another may have no such rows."""
        with self.passes.alone(), self._syncing(False):
            stats = self._stats(micro.rows, forget=micro.forget, epoch=micro.epoch)
            term = self.loss.objective.forget_term(stats) if micro.forget else self.loss.retain.term(stats)
            self.acc.backward(term.total * 0.0)

    def _global(self, rows: StepRows, memory: RetainMemory) -> StepResult:
        """Means over the global batch: the retain rows first, their gradient scaled by the weight, then the forget rows."""
        held = self._hold(rows.retain, memory) if self.uses_retain and rows.retain else _Held()
        of_retain = self._set_aside() if self.filter is not None else []
        divisor = _Counts.of([self.forget.rows[row] for row in rows.forget], self.forget_needs)
        sums = torch.zeros(3, dtype=torch.float64, device=self.acc.device)
        micros = self._micro_batches(rows.forget, forget=True, epoch=memory.epoch)
        for number, micro in enumerate(micros, start=1):
            last = number == len(micros)
            with self._syncing(last):
                stats = self._stats(micro, forget=True, epoch=memory.epoch)
                loss = self._forget_weight * self._share(self.loss.objective.forget_term(stats), divisor)
                reached = loss + self._unreached(forget=True) if last else loss
                self.acc.backward(reached * self.acc.num_processes)
            sums += torch.stack([stats.cross_entropy.detach().sum(), loss.detach(), self._beyond_cap(stats)])
        if self.filter is not None:
            self.filter.apply(self.parameters)
            self._add(of_retain)
        cross_entropy, forget_loss, beyond_cap = sum_over_processes(sums).tolist()
        return StepResult(
            loss=forget_loss + held.weight * held.loss,
            forget_cross_entropy=_mean(cross_entropy, divisor.tokens if rows.forget else 0, self.forget_needs),
            retain_cross_entropy=held.cross_entropy,
            retain_weight=held.weight,
            forgotten_share=beyond_cap / divisor.tokens,
            forget_loss=forget_loss if rows.forget else math.nan,
            retain_loss=held.loss if self.uses_retain and rows.retain else math.nan,
            tokens=self._tokens(rows, memory.epoch),
        )

    def _hold(self, rows: Sequence[int], memory: RetainMemory) -> _Held:
        """The gradient of some retain rows, times the weight that their own loss asks for."""
        divisor = _Counts.of([self.retain.rows[row] for row in rows], self.retain_needs)
        sums = torch.zeros(2, dtype=torch.float64, device=self.acc.device)
        micros = self._micro_batches(rows, forget=False, epoch=memory.epoch)
        for number, micro in enumerate(micros, start=1):
            last = self.filter is not None and number == len(
                micros
            )  # else the forget rows bring all gradients together
            with self._syncing(last):
                stats = self._stats(micro, forget=False, epoch=memory.epoch)
                loss = self._share(self.loss.retain.term(stats), divisor)
                reached = loss + self._unreached(forget=False) if last else loss
                self.acc.backward(reached * self.acc.num_processes)
            sums += torch.stack([stats.total(stats.cross_entropy.detach()), loss.detach()])
        cross_entropy, retain_loss = sum_over_processes(sums).tolist()
        count = divisor.rows if self._by_row else divisor.tokens
        mean = _mean(cross_entropy, count, self.retain_needs)
        weight = self.loss.weight.at(memory, mean, retain_loss)
        if self.retain_needs.logprob:
            memory.add(cross_entropy=cross_entropy, tokens=count, batch_means=mean, rows=divisor.rows)
        with torch.no_grad():
            for parameter in self.parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(weight)
        return _Held(cross_entropy=mean, loss=retain_loss, weight=weight)

    def _set_aside(self) -> list[Tensor | None]:
        """The gradients so far, of which the parameters then know nothing."""
        gradients = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        return gradients

    @torch.no_grad()
    def _add(self, gradients: Sequence[Tensor | None]) -> None:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)

    def _micro(self, rows: StepRows, memory: RetainMemory) -> StepResult:
        """The authors' scaling: each mixed micro-batch has its own means and its own weight; the step is their average."""
        count = -(-len(rows.order) // self.micro_batch)
        mixed = self._dealt(rows)
        parts = [
            self._mixed(micro, memory, scale=self.acc.num_processes / count, last=index + 1 == len(mixed))
            for index, micro in enumerate(mixed)
        ]
        sums = _MicroSums.over_processes(parts, self.acc.device)
        if self.retain_needs.logprob:
            memory.add(
                cross_entropy=sums.retain_cross_entropy,
                tokens=sums.retain_tokens,
                batch_means=sums.retain_mean,
                rows=sums.retain_rows,
            )
        return StepResult(
            loss=sums.loss / count,
            forget_cross_entropy=_mean(sums.forget_cross_entropy, sums.forget_tokens, self.forget_needs),
            retain_cross_entropy=_mean(sums.retain_cross_entropy, sums.retain_tokens, self.retain_needs),
            retain_weight=sums.retain_weight / count,
            forgotten_share=sums.beyond_cap / max(sums.forget_tokens, 1.0),
            forget_loss=sums.forget_loss / count if rows.forget else math.nan,
            retain_loss=sums.retain_loss / count if self.uses_retain and rows.retain else math.nan,
            tokens=self._tokens(rows, memory.epoch),
        )

    def _mixed(
        self, micro: Sequence[tuple[bool, int]], memory: RetainMemory, *, scale: float, last: bool
    ) -> _MicroSums:
        """Forward and backward of one micro-batch that holds both sides."""
        forget = [row for is_forget, row in micro if is_forget]
        retain = [row for is_forget, row in micro if not is_forget]
        with self._syncing(last and not self.uses_retain):
            stats = self._stats(forget, forget=True, epoch=memory.epoch)
            divisor = _Counts.of([self.forget.rows[row] for row in forget], self.forget_needs)
            loss = self._forget_weight * self._share(self.loss.objective.forget_term(stats), divisor)
            self.acc.backward(loss * scale)
        forget_ce, beyond_cap = float(stats.cross_entropy.detach().sum()), float(self._beyond_cap(stats))
        forget_tokens, total = stats.tokens, float(loss.detach())
        retain_mean, retain_weight, retain_tokens, forget_loss = 0.0, 0.0, 0, total
        retain_loss = 0.0
        if self.uses_retain:
            with self._syncing(last):
                stats = self._stats(retain, forget=False, epoch=memory.epoch)
                divisor = _Counts.of([self.retain.rows[row] for row in retain], self.retain_needs)
                loss, retain_tokens = self._share(self.loss.retain.term(stats), divisor), stats.tokens
                if retain:
                    retain_mean = float(stats.cross_entropy.detach().sum()) / retain_tokens
                    retain_weight = self.loss.weight.at(memory, retain_mean, float(loss.detach()))
                reached = retain_weight * loss + self._unreached(forget=False) if last else retain_weight * loss
                self.acc.backward(reached * scale)
            retain_loss = float(loss.detach())
            total += retain_weight * retain_loss
        return _MicroSums(
            loss=total,
            forget_cross_entropy=forget_ce,
            forget_tokens=forget_tokens,
            beyond_cap=beyond_cap,
            retain_cross_entropy=retain_mean * retain_tokens,
            retain_tokens=retain_tokens,
            retain_rows=len(retain),
            retain_mean=retain_mean,
            retain_weight=retain_weight,
            forget_loss=forget_loss,
            retain_loss=retain_loss,
        )

    def _dealt(self, rows: StepRows) -> list[Sequence[tuple[bool, int]]]:
        """This process's mixed micro-batches."""
        return dealt(rows.order, self.micro_batch, self.acc.process_index, self.acc.num_processes)

    def _side(self, forget: bool) -> tuple[Side, Needs]:
        """The rows of a side, and what its term reads."""
        return (self.forget, self.forget_needs) if forget else (self.retain, self.retain_needs)

    def _places(self, rows: Sequence[int], forget: bool, epoch: int) -> list[int]:
        """The places among the side's texts of some rows, and of their alternates if they are needed."""
        side, needs = self._side(forget)
        return [*rows, *(side.alternate(row, epoch) for row in rows)] if needs.alternate else [*rows]

    def _micro_batches(self, rows: Sequence[int], *, forget: bool, epoch: int) -> list[list[int]]:
        """This process's rows, those of like length together: padding is wasted work, and the order within a batch is free."""
        side, _ = self._side(forget)

        def length(row: int) -> int:
            return max(len(side.texts[index].ids) for index in self._places([row], forget, epoch))

        each = len(self._places(rows[:1], forget, epoch)) or 1  # a row, or it and its alternate
        most = None if self.micro_tokens is None else self.micro_tokens // each
        return micro_batches(rows, self.micro_batch, self.acc.process_index, self.acc.num_processes, length, most)

    def _stats(self, rows: Sequence[int], *, forget: bool, epoch: int) -> TokenStats:
        side, needs = self._side(forget)
        places = self._places(rows, forget, epoch)
        stats = self.passes.stats(
            [side.texts[index] for index in places],
            needs,
            alternates=len(places) - len(rows),
            originals=None if side.original is None else [side.original[index] for index in places],
            known=side.logits(places),
            below=side.streams(places),
        )
        if needs.targets and forget:
            stats = replace(stats, targets=row_targets(side.of, self._targets, rows, self.acc.device))
        return _by_row(stats) if self._by_row else stats

    def _syncing(self, sync: bool) -> AbstractContextManager[None]:
        """Around forward and backward: with `sync` the gradients of all processes come together (shards always do)."""
        return without_gradient_sync(self.acc, self.model, skip=not sync)

    def _unreached(self, *, forget: bool) -> Tensor:
        """0, with a gradient of 0 for what a side does not depend on: DDP waits for every parameter's."""
        zero = torch.zeros((), device=self.acc.device)
        if self.acc.num_processes == 1 or is_sharded(self.model):
            return zero
        return sum((p.sum() * 0.0 for p in self._unread[forget]), zero)

    def _beyond_cap(self, stats: TokenStats) -> Tensor:
        cap = getattr(self.loss.objective, "forget_cap", None)
        if cap is None:
            return torch.zeros((), device=stats.logprob.device)
        beyond: Tensor = (stats.cross_entropy.detach() > cap).sum().float()
        return beyond

    def _share(self, term: Term, divisor: _Counts) -> Tensor:
        if term.unit == "hidden":
            return term.total / divisor.hidden
        return term.total / (divisor.rows if term.unit == "row" or self._by_row else divisor.tokens)

    @property
    def _by_row(self) -> bool:
        return self.weighting == "global_rows"

    def _tokens(self, rows: StepRows, epoch: int) -> int:
        used = sum(len(self.forget.rows[i].ids) for i in rows.forget)
        if self.forget_needs.alternate:
            used += sum(len(self.forget.texts[self.forget.alternate(i, epoch)].ids) for i in rows.forget)
        return used + (sum(len(self.retain.rows[i].ids) for i in rows.retain) if self.uses_retain else 0)


def _mean(total: float, count: float, needs: Needs) -> float:
    """NaN where it is not known: nothing asked for log-probabilities, or there are no such tokens."""
    return total / count if needs.logprob and count else math.nan


def _by_row(stats: TokenStats) -> TokenStats:
    """Each row's tokens count 1 together."""
    weight = 1.0 / stats.mask.sum(dim=1, keepdim=True).clamp(min=1)
    return replace(stats, row_weight=weight, alternate=None if stats.alternate is None else _by_row(stats.alternate))


@dataclass(frozen=True)
class _Counts:
    """What a sum over rows is divided by; at least 1, so that an empty side gives 0."""

    tokens: int
    rows: int
    hidden: int

    @classmethod
    def of(cls, rows: Sequence[Encoded], needs: Needs) -> _Counts:
        tokens = sum(len(row.ids) - row.answer_start for row in rows)
        answers = needs.hidden is not None and needs.hidden.tokens == "answer"
        hidden = tokens if answers else sum(len(row.ids) for row in rows)
        return cls(max(tokens, 1), max(len(rows), 1), max(hidden, 1))
