"""What an objective is: a frozen dataclass and pure functions of token statistics. It never sees a model.

The trainer minimises `forget_term + weight * retain_term`, each term a sum divided by its count over the *global* batch.
Splitting it so (sum, unit) is what makes micro-batches, accumulation and any number of processes give the same number.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

Unit = Literal["token", "row"]


@dataclass(frozen=True)
class TokenStats:
    """Statistics of the supervised tokens of some rows, in float32.

    Attributes:
        logprob: (rows, tokens) log-probability of each target token under the model, natural log; 0 where not supervised.
        mask: (rows, tokens) True on supervised tokens.
        reference_logprob: the same under the original model, or None if the objective does not need it.
        divergence: (rows, tokens) KL(original || model) over the whole vocabulary, or None.
        row_weight: (rows, 1) what each row's tokens count, or None for 1 each.
    """

    logprob: Tensor
    mask: Tensor
    reference_logprob: Tensor | None = None
    divergence: Tensor | None = None
    row_weight: Tensor | None = None

    def total(self, values: Tensor) -> Tensor:
        """The sum of (rows, tokens) values over supervised tokens, each counted with its row's weight."""
        kept = values * self.mask
        return (kept if self.row_weight is None else kept * self.row_weight).sum()

    @property
    def tokens(self) -> int:
        """How many tokens are supervised."""
        return int(self.mask.sum())

    @property
    def cross_entropy(self) -> Tensor:
        """(rows, tokens) minus log-probability; 0 where not supervised."""
        return -self.logprob * self.mask


@dataclass(frozen=True)
class Term:
    """A sum over tokens or rows; the trainer divides it by the number of them in the global batch."""

    total: Tensor
    unit: Unit = "token"


@dataclass
class RetainMemory:
    """What an adaptive weight may remember of the retain set: sums over epoch 0. Saved in checkpoints; no tensor in it."""

    cross_entropy: float = 0.0
    tokens: float = 0.0
    batch_means: float = 0.0
    rows: float = 0.0
    epoch: int = field(default=0)

    def add(self, *, cross_entropy: float, tokens: float, batch_means: float, rows: float) -> None:
        """Count one step (or one evaluation pass) of epoch 0; later epochs are not counted: the reference is fixed."""
        if self.epoch == 0:
            self.cross_entropy += cross_entropy
            self.tokens += tokens
            self.batch_means += batch_means
            self.rows += rows


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The axis "objective": what is pushed up, what is held down, and how hard."""

    config_axis: ClassVar[bool] = True
    needs_forget_reference: ClassVar[bool] = False
    needs_retain_divergence: ClassVar[bool] = False
    uses_retain: ClassVar[bool] = True

    def forget_term(self, stats: TokenStats) -> Term:
        """The loss on the forget rows."""
        raise NotImplementedError

    def retain_term(self, stats: TokenStats) -> Term:
        """The loss on the retain rows: cross-entropy unless an objective says otherwise."""
        return Term(stats.total(stats.cross_entropy))

    def retain_weight(self, memory: RetainMemory, retain_cross_entropy: float) -> float:
        """The factor of the retain term at this step, from the batch's mean retain cross-entropy (nats a token)."""
        return 1.0

    def observe_validation(self, memory: RetainMemory, scores: dict[str, float]) -> None:
        """Told of every scoring on the validation split. Nothing is learnt from it unless an objective says so."""


def ascent(stats: TokenStats, cap: float | None) -> Tensor:
    """Minus the forget cross-entropy, summed: `-sum(min(CE, cap))`.

    Nothing bounds `-CE`: it falls for ever, and with it the model. `cap` (nats a token) is the guard: a token whose
    cross-entropy passed it has no gradient any more, so each token is pushed until it is forgotten and no further.
    None is the published form.
    """
    cross_entropy = stats.cross_entropy
    return -stats.total(cross_entropy if cap is None else torch.clamp(cross_entropy, max=cap))
