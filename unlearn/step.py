"""One optimiser step's gradient: token-weighted over the global batch, however it is cut into micro-batches or processes.

The adaptive weight needs the whole batch's retain cross-entropy, which is known only after the retain rows went through.
So the retain rows go first with weight 1, their accumulated gradient is scaled by the weight (it is linear), and the
forget rows follow: exact, with one pass over each row and no second gradient buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lm.devices import sum_over_processes, without_gradient_sync
from lm.prompts import Encoded
from unlearn.batches import Inputs, StepRows, collate, micro_batches
from unlearn.objectives import Loss, Needs, RetainMemory, TokenStats
from unlearn.objectives.base import Term
from unlearn.reference import Original
from unlearn.statistics import token_logprobs, token_values

Weighting = Literal["global_tokens", "global_rows", "micro_batch_mean"]


@dataclass(frozen=True)
class StepResult:
    """What one step measured, over the global batch."""

    loss: float
    forget_cross_entropy: float
    retain_cross_entropy: float
    retain_weight: float
    forgotten_share: float
    """Share of forget tokens beyond the objective's cap (0 if it has none)."""
    tokens: int
    """Real tokens, prompt and answer, that went through the model in the global batch."""


class Stepper:
    """Computes gradients for global batches of encoded rows; it holds no optimiser and takes no step."""

    def __init__(
        self,
        acc: Accelerator,
        model: nn.Module,
        loss: Loss,
        forget: Sequence[Encoded],
        retain: Sequence[Encoded],
        *,
        original: Original | None,
        pad: int,
        micro_batch: int,
        weighting: Weighting,
    ) -> None:
        self.acc, self.model, self.loss, self.original = acc, model, loss, original
        self.forget, self.retain = forget, retain
        self.pad, self.micro_batch, self.weighting = pad, micro_batch, weighting
        self.parameters = [p for p in model.parameters() if p.requires_grad]

    def gradient(self, rows: StepRows, memory: RetainMemory) -> StepResult:
        """Add this step's gradient to the parameters' `.grad`, and epoch-0 sums to `memory`."""
        if self.weighting == "micro_batch_mean":
            return self._micro(rows, memory)
        return self._global(rows, memory)

    def _global(self, rows: StepRows, memory: RetainMemory) -> StepResult:
        retain_ce = weight = retain_loss = 0.0
        if self.loss.uses_retain and rows.retain:
            divisor = _Counts.of([self.retain[i] for i in rows.retain])
            sums = torch.zeros(2, dtype=torch.float64, device=self.acc.device)
            count = divisor.rows if self._by_row else divisor.tokens
            for micro in self._micro_batches(rows.retain, self.retain):
                with without_gradient_sync(self.acc, self.model, skip=True):
                    stats = self._stats([self.retain[i] for i in micro], forget=False)
                    loss = self._share(self.loss.retain.term(stats), divisor)
                    self.acc.backward(loss * self.acc.num_processes)
                sums += torch.stack([stats.total(stats.cross_entropy.detach()), loss.detach()])
            ce_sum, retain_loss = sum_over_processes(sums).tolist()
            retain_ce = ce_sum / count
            weight = self.loss.weight.at(memory, retain_ce, retain_loss)
            memory.add(cross_entropy=ce_sum, tokens=count, batch_means=retain_ce, rows=divisor.rows)
            with torch.no_grad():
                for parameter in self.parameters:
                    if parameter.grad is not None:
                        parameter.grad.mul_(weight)

        divisor = _Counts.of([self.forget[i] for i in rows.forget])
        sums = torch.zeros(3, dtype=torch.float64, device=self.acc.device)
        micros = self._micro_batches(rows.forget, self.forget)
        for place, micro in enumerate(micros):
            with without_gradient_sync(self.acc, self.model, skip=place + 1 < len(micros)):
                stats = self._stats([self.forget[i] for i in micro], forget=True)
                loss = self._share(self.loss.objective.forget_term(stats), divisor)
                self.acc.backward(loss * self.acc.num_processes)
            sums += torch.stack([stats.cross_entropy.detach().sum(), loss.detach(), self._beyond_cap(stats)])
        ce_sum, forget_loss, beyond = sum_over_processes(sums).tolist()
        return StepResult(
            loss=forget_loss + weight * retain_loss,
            forget_cross_entropy=ce_sum / divisor.tokens,
            retain_cross_entropy=retain_ce,
            retain_weight=weight,
            forgotten_share=beyond / divisor.tokens,
            tokens=self._tokens(rows),
        )

    def _micro(self, rows: StepRows, memory: RetainMemory) -> StepResult:
        """The authors' scaling: each mixed micro-batch has its own means and its own weight; the step is their average."""
        whole = [rows.order[i : i + self.micro_batch] for i in range(0, len(rows.order), self.micro_batch)]
        mine = micro_batches(whole, 1, self.acc.process_index, self.acc.num_processes)
        micros = [
            one[0] if one else () for one in mine
        ]  # whole micro-batches are dealt out: the same ones for any number
        sums = torch.zeros(9, dtype=torch.float64, device=self.acc.device)
        for place, micro in enumerate(micros):
            forget = [self.forget[i] for is_forget, i in micro if is_forget]
            retain = [self.retain[i] for is_forget, i in micro if not is_forget] if self.loss.uses_retain else []
            with without_gradient_sync(self.acc, self.model, skip=place + 1 < len(micros)):
                stats = self._stats(forget, forget=True)
                loss = self._share(self.loss.objective.forget_term(stats), _Counts.of(forget))
                seen = [float(stats.cross_entropy.detach().sum()), float(self._beyond_cap(stats)), float(stats.tokens)]
                mean = weight = 0.0
                other = self._stats(retain, forget=False)
                if retain:
                    mean = float(other.cross_entropy.detach().sum()) / other.tokens
                    kept = self._share(self.loss.retain.term(other), _Counts.of(retain))
                    weight = self.loss.weight.at(memory, mean, float(kept.detach()))
                    loss = loss + weight * kept
                else:
                    loss = loss + other.logprob.sum() * 0.0
                self.acc.backward(loss * self.acc.num_processes / len(whole))
            held = [float(loss.detach()), mean * other.tokens, float(other.tokens), mean, float(len(retain)), weight]
            sums += torch.tensor([*seen, *held], dtype=torch.float64, device=sums.device)
        forget_ce, beyond, forget_tokens, loss_sum, retain_ce, retain_tokens, means, count, weights = (
            sum_over_processes(sums).tolist()
        )
        memory.add(cross_entropy=retain_ce, tokens=retain_tokens, batch_means=means, rows=count)
        return StepResult(
            loss=loss_sum / len(whole),
            forget_cross_entropy=forget_ce / max(forget_tokens, 1.0),
            retain_cross_entropy=retain_ce / max(retain_tokens, 1.0),
            retain_weight=weights / len(whole),
            forgotten_share=beyond / max(forget_tokens, 1.0),
            tokens=self._tokens(rows),
        )

    def _micro_batches(self, rows: Sequence[int], encoded: Sequence[Encoded]) -> list[list[int]]:
        """This process's rows, those of like length together: padding is wasted work, and the order within a batch is free."""
        by_length = sorted(rows, key=lambda row: len(encoded[row].ids))
        return micro_batches(by_length, self.micro_batch, self.acc.process_index, self.acc.num_processes)

    def _stats(self, rows: Sequence[Encoded], *, forget: bool) -> TokenStats:
        needs = self.loss.forget_needs if forget else self.loss.retain_needs
        inputs = collate(rows, self.pad, self.acc.device)
        reference = self._original(inputs) if needs.reference else None
        logits = self._logits(inputs)
        return TokenStats(
            logprob=token_logprobs(logits, inputs),
            mask=inputs.mask,
            reference_logprob=self._reference_logprob(needs, reference, inputs),
            values={one.name: token_values(one, logits, inputs, reference) for one in needs.statistics},
            row_weight=1.0 / inputs.mask.sum(dim=1, keepdim=True).clamp(min=1) if self._by_row else None,
        )

    def _reference_logprob(self, needs: Needs, reference: Tensor | None, inputs: Inputs) -> Tensor | None:
        return token_logprobs(reference, inputs) if needs.reference_logprob and reference is not None else None

    def _original(self, inputs: Inputs) -> Tensor:
        assert self.original is not None  # the trainer keeps it for every objective that says it needs one
        with self.original.restored():
            return self._logits(inputs)

    def _logits(self, inputs: Inputs) -> Tensor:
        logits: Tensor = self.model(input_ids=inputs.ids, attention_mask=inputs.attention, use_cache=False).logits
        return logits

    def _beyond_cap(self, stats: TokenStats) -> Tensor:
        cap = getattr(self.loss.objective, "forget_cap", None)
        if cap is None:
            return torch.zeros((), device=stats.logprob.device)
        beyond: Tensor = (stats.cross_entropy.detach() > cap).sum().float()
        return beyond

    def _share(self, term: Term, divisor: _Counts) -> Tensor:
        return term.total / (divisor.rows if term.unit == "row" or self._by_row else divisor.tokens)

    @property
    def _by_row(self) -> bool:
        return self.weighting == "global_rows"

    def _tokens(self, rows: StepRows) -> int:
        used = sum(len(self.forget[i].ids) for i in rows.forget)
        return used + (sum(len(self.retain[i].ids) for i in rows.retain) if self.loss.uses_retain else 0)


@dataclass(frozen=True)
class _Counts:
    """What a sum over rows is divided by; at least 1, so that an empty side gives 0."""

    tokens: int
    rows: int

    @classmethod
    def of(cls, rows: Sequence[Encoded]) -> _Counts:
        return cls(max(sum(len(row.ids) - row.answer_start for row in rows), 1), max(len(rows), 1))
