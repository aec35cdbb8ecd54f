"""One optimizer step's gradient: token-weighted over the global batch, however it is cut into micro-batches or processes.

The adaptive weight needs the whole batch's retain cross-entropy, which is known only after the retain rows went through.
So the retain rows go first with weight 1, their accumulated gradient is scaled by the weight (it is linear), and the
forget rows follow: exact, with one pass over each row and no second gradient buffer.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from lm.devices import sum_over_processes, without_gradient_sync
from lm.prompts import Encoded
from lm.shards import is_sharded, reshard
from unlearn.forward.passes import Passes
from unlearn.objectives import Loss, Needs, RetainMemory, TokenStats
from unlearn.objectives.base import Term
from unlearn.training.batches import StepRows, dealt, micro_batches
from unlearn.training.tensor_store import RowStore

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
    tokens: int
    """Real tokens, prompt and answer, that went through the model in the global batch."""


@dataclass(frozen=True)
class Side:
    """The rows of one side and what goes with them.

    Attributes:
        rows: the rows, encoded.
        alternates: for each row its alternate answers to the same question, or nothing.
        original: the original model's log-probabilities of `texts`, (supervised tokens,) each, where they are known already.
        below: the stream that the first block that may change reads for `texts`, (tokens, hidden) each, likewise.
    """

    rows: Sequence[Encoded]
    alternates: Sequence[tuple[Encoded, ...]] = ()
    original: RowStore | None = None
    below: RowStore | None = None

    @cached_property
    def texts(self) -> list[Encoded]:
        """The rows, then every alternate, row by row."""
        return [*self.rows, *itertools.chain.from_iterable(self.alternates)]

    def alternate(self, row: int, epoch: int) -> int:
        """The place in `texts` of the alternate that a row takes in an epoch: each in its turn."""
        return len(self.rows) + self._firsts[row] + epoch % len(self.alternates[row])

    def streams(self, places: Sequence[int]) -> list[Tensor] | None:
        """What the first block that may change reads for some of `texts`, if it is known."""
        return None if self.below is None else [self.below[place] for place in places]

    @cached_property
    def _firsts(self) -> list[int]:
        return [0, *itertools.accumulate(len(several) for several in self.alternates)]


@dataclass(frozen=True)
class Micro:
    """Rows of one side that go through the model at once on one process.

    Attributes:
        rows: their places among the rows of their side; `epoch` says which alternates go with them.
        padded: tokens with the padding, alternates included.
        supervised: targets.
    """

    forget: bool
    rows: tuple[int, ...]
    epoch: int
    padded: int
    supervised: int


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
    ) -> None:
        self.passes, self.acc, self.model = passes, passes.acc, passes.wrapped
        self.loss, self.forget, self.retain = loss, forget, retain
        self.micro_batch, self.micro_tokens, self.weighting = micro_batch, micro_tokens, weighting
        reshard(self.model)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self._unread = {True: passes.unread(loss.forget_needs), False: passes.unread(loss.retain_needs)}

    def gradient(self, rows: StepRows, memory: RetainMemory) -> StepResult:
        """Add this step's gradient to the parameters' `.grad`, and epoch-0 sums to `memory`."""
        if self.weighting == "micro_batch_mean":
            return self._micro(rows, memory)
        return self._global(rows, memory)

    def micros(self, rows: StepRows, epoch: int) -> list[Micro]:
        """What this process will run of a step, in no particular order."""
        if self.weighting == "micro_batch_mean":
            several = [([i for f, i in one if f], [i for f, i in one if not f]) for one in self._dealt(rows)]
            found = [(side, one) for pair in several for side, one in zip((True, False), pair, strict=True)]
        else:
            found = [(True, one) for one in self._micro_batches(rows.forget, forget=True, epoch=epoch)]
            found += [(False, one) for one in self._micro_batches(rows.retain, forget=False, epoch=epoch)]
        return [self.measure(one, forget=side, epoch=epoch) for side, one in found if side or self.loss.uses_retain]

    def measure(self, rows: Sequence[int], *, forget: bool, epoch: int) -> Micro:
        """A micro-batch with its sizes."""
        texts = [(self.forget if forget else self.retain).texts[place] for place in self._places(rows, forget, epoch)]
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
        retain_ce, weight, retain_loss = math.nan, 0.0, 0.0
        if self.loss.uses_retain and rows.retain:
            divisor = _Counts.of([self.retain.rows[i] for i in rows.retain], self.loss.retain_needs)
            sums = torch.zeros(2, dtype=torch.float64, device=self.acc.device)
            count = divisor.rows if self._by_row else divisor.tokens
            for micro in self._micro_batches(rows.retain, forget=False, epoch=memory.epoch):
                with self._syncing(False):
                    stats = self._stats(micro, forget=False, epoch=memory.epoch)
                    loss = self._share(self.loss.retain.term(stats), divisor)
                    self.acc.backward(loss * self.acc.num_processes)
                sums += torch.stack([stats.total(stats.cross_entropy.detach()), loss.detach()])
            ce_sum, retain_loss = sum_over_processes(sums).tolist()
            retain_ce = _mean(ce_sum, count, self.loss.retain_needs)
            weight = self.loss.weight.at(memory, retain_ce, retain_loss)
            if self.loss.retain_needs.logprob:
                memory.add(cross_entropy=ce_sum, tokens=count, batch_means=retain_ce, rows=divisor.rows)
            with torch.no_grad():
                for parameter in self.parameters:
                    if parameter.grad is not None:
                        parameter.grad.mul_(weight)

        divisor = _Counts.of([self.forget.rows[i] for i in rows.forget], self.loss.forget_needs)
        sums = torch.zeros(3, dtype=torch.float64, device=self.acc.device)
        micros = self._micro_batches(rows.forget, forget=True, epoch=memory.epoch)
        for place, micro in enumerate(micros):
            last = place + 1 == len(micros)
            with self._syncing(last):
                stats = self._stats(micro, forget=True, epoch=memory.epoch)
                loss = self._share(self.loss.objective.forget_term(stats), divisor)
                reached = loss + self._unreached(forget=True) if last else loss
                self.acc.backward(reached * self.acc.num_processes)
            sums += torch.stack([stats.cross_entropy.detach().sum(), loss.detach(), self._beyond_cap(stats)])
        ce_sum, forget_loss, beyond = sum_over_processes(sums).tolist()
        return StepResult(
            loss=forget_loss + weight * retain_loss,
            forget_cross_entropy=_mean(ce_sum, divisor.tokens if rows.forget else 0, self.loss.forget_needs),
            retain_cross_entropy=retain_ce,
            retain_weight=weight,
            forgotten_share=beyond / divisor.tokens,
            tokens=self._tokens(rows, memory.epoch),
        )

    def _micro(self, rows: StepRows, memory: RetainMemory) -> StepResult:
        """The authors' scaling: each mixed micro-batch has its own means and its own weight; the step is their average."""
        count = -(-len(rows.order) // self.micro_batch)
        micros = self._dealt(rows)
        sums = torch.zeros(9, dtype=torch.float64, device=self.acc.device)
        for place, micro in enumerate(micros):
            last = place + 1 == len(micros)
            forget = [i for is_forget, i in micro if is_forget]
            retain = [i for is_forget, i in micro if not is_forget]
            scale = self.acc.num_processes / count
            with self._syncing(last and not self.loss.uses_retain):
                stats = self._stats(forget, forget=True, epoch=memory.epoch)
                divisor = _Counts.of([self.forget.rows[i] for i in forget], self.loss.forget_needs)
                loss = self._share(self.loss.objective.forget_term(stats), divisor)
                self.acc.backward(loss * scale)
            held = [float(stats.cross_entropy.detach().sum()), float(self._beyond_cap(stats)), float(stats.tokens)]
            total, mean, weight, tokens = float(loss.detach()), 0.0, 0.0, 0
            if self.loss.uses_retain:
                with self._syncing(last):
                    stats = self._stats(retain, forget=False, epoch=memory.epoch)
                    divisor = _Counts.of([self.retain.rows[i] for i in retain], self.loss.retain_needs)
                    loss, tokens = self._share(self.loss.retain.term(stats), divisor), stats.tokens
                    if retain:
                        mean = float(stats.cross_entropy.detach().sum()) / tokens
                        weight = self.loss.weight.at(memory, mean, float(loss.detach()))
                    reached = weight * loss + self._unreached(forget=False) if last else weight * loss
                    self.acc.backward(reached * scale)
                total += weight * float(loss.detach())
            held += [total, mean * tokens, float(tokens), mean, float(len(retain)), weight]
            sums += torch.tensor(held, dtype=torch.float64, device=sums.device)
        forget_ce, beyond, forget_tokens, loss_sum, retain_ce, retain_tokens, means, held_rows, weights = (
            sum_over_processes(sums).tolist()
        )
        if self.loss.retain_needs.logprob:
            memory.add(cross_entropy=retain_ce, tokens=retain_tokens, batch_means=means, rows=held_rows)
        return StepResult(
            loss=loss_sum / count,
            forget_cross_entropy=_mean(forget_ce, forget_tokens, self.loss.forget_needs),
            retain_cross_entropy=_mean(retain_ce, retain_tokens, self.loss.retain_needs),
            retain_weight=weights / count,
            forgotten_share=beyond / max(forget_tokens, 1.0),
            tokens=self._tokens(rows, memory.epoch),
        )

    def _dealt(self, rows: StepRows) -> list[Sequence[tuple[bool, int]]]:
        """This process's mixed micro-batches."""
        return dealt(rows.order, self.micro_batch, self.acc.process_index, self.acc.num_processes)

    def _places(self, rows: Sequence[int], forget: bool, epoch: int) -> list[int]:
        """The places among the side's texts of some rows, and of their alternates if they are needed."""
        side, needs = (self.forget, self.loss.forget_needs) if forget else (self.retain, self.loss.retain_needs)
        return [*rows, *(side.alternate(row, epoch) for row in rows)] if needs.alternate else [*rows]

    def _micro_batches(self, rows: Sequence[int], *, forget: bool, epoch: int) -> list[list[int]]:
        """This process's rows, those of like length together: padding is wasted work, and the order within a batch is free."""
        side = self.forget if forget else self.retain

        def length(row: int) -> int:
            return max(len(side.texts[place].ids) for place in self._places([row], forget, epoch))

        each = len(self._places(rows[:1], forget, epoch)) or 1  # a row, or it and its alternate
        most = None if self.micro_tokens is None else self.micro_tokens // each
        return micro_batches(rows, self.micro_batch, self.acc.process_index, self.acc.num_processes, length, most)

    def _stats(self, rows: Sequence[int], *, forget: bool, epoch: int) -> TokenStats:
        side, needs = (self.forget, self.loss.forget_needs) if forget else (self.retain, self.loss.retain_needs)
        places = self._places(rows, forget, epoch)
        stats = self.passes.stats(
            [side.texts[place] for place in places],
            needs,
            alternates=len(places) - len(rows),
            originals=None if side.original is None else [side.original[place] for place in places],
            below=side.streams(places),
        )
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
        if self.loss.forget_needs.alternate:
            used += sum(len(self.forget.texts[self.forget.alternate(i, epoch)].ids) for i in rows.forget)
        return used + (sum(len(self.retain.rows[i].ids) for i in rows.retain) if self.loss.uses_retain else 0)


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
