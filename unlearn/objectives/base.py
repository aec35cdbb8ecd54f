"""What an objective is: a frozen dataclass and pure functions of token statistics. It never sees a model.

The trainer minimizes `forget_term + weight * retain_term`, each term a sum divided by its count over the *global* batch.
Splitting it so (sum, unit) is what makes micro-batches, accumulation and any number of processes give the same number.
What a term reads of the model is declared beforehand (`Needs`), so that nothing else is computed or kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lm.errors import UserError

Unit = Literal["token", "row", "hidden"]
"""What a term's sum is divided by: the supervised tokens, the rows, or the tokens whose hidden states were asked for."""


@dataclass(frozen=True)
class Statistic:
    """A number for each supervised token from the logits that predict it, over the whole vocabulary.

    Attributes:
        name: its key in `TokenStats.values`.
        function: (logits (n, vocabulary) float32, targets (n,), reference logits or None) -> (n,). Differentiable, and
            separate for each token: it is applied to chunks.
        reference: whether it is given the original model's logits, detached.
    """

    name: str
    function: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    reference: bool = False


@dataclass(frozen=True)
class HiddenNeed:
    """Hidden states at one depth.

    Attributes:
        layer: the stream after this block, from 0.
        tokens: `all` real tokens of a row, or the `answer` tokens alone.
        reference: whether the original model's are wanted too.
    """

    layer: int
    tokens: Literal["all", "answer"] = "all"
    reference: bool = False


@dataclass(frozen=True)
class Needs:
    """What a term reads. A forward pass goes no deeper, and the original model is asked no more, than this says.

    Attributes:
        logprob: the targets' log-probabilities; without them, statistics and alternates only `hidden` is computed.
        reference_logprob: the same under the original model.
        statistics: further numbers for each supervised token.
        hidden: hidden states.
        alternate: the same statistics of an alternate answer to each row's question, in `TokenStats.alternate`.
        documents: completions are supervised whole, from their second token on, and not their answers alone.
        targets: what calibration rows come to, row by row, in `TokenStats.targets` (see `Calibrated`).
    """

    logprob: bool = True
    reference_logprob: bool = False
    statistics: tuple[Statistic, ...] = ()
    hidden: HiddenNeed | None = None
    alternate: bool = False
    documents: bool = False
    targets: bool = False

    @property
    def reference(self) -> bool:
        """Whether anything of the original model is wanted."""
        wanted = self.reference_logprob or any(statistic.reference for statistic in self.statistics)
        return wanted or (self.hidden is not None and self.hidden.reference)

    @property
    def vocabulary(self) -> bool:
        """Whether the head is needed at all."""
        return self.logprob or self.reference_logprob or bool(self.statistics)


@dataclass(frozen=True)
class RowTargets:
    """What rows should come to, measured on calibration rows of the same group.

    Attributes:
        value: (rows,) the number to come to.
        spread: (rows,) the standard deviation of that number over the calibration rows of the group.
        document: (rows,) True for a completion, False for a question.
    """

    value: Tensor
    spread: Tensor
    document: Tensor


@dataclass(frozen=True)
class TokenStats:
    """Statistics of the supervised tokens of some rows, in float32.

    Attributes:
        logprob: (rows, tokens) log-probability of each target token under the model, natural log; 0 where not supervised
            or not needed.
        mask: (rows, tokens) True on supervised tokens.
        reference_logprob: the same under the original model, or None if the objective does not need it.
        values: `Statistic.name` -> (rows, tokens), 0 where not supervised.
        hidden: (rows, positions, hidden) at the layer asked for, or None.
        reference_hidden: the same of the original model, detached, or None.
        hidden_mask: (rows, positions) True on the tokens asked for; (rows, positions) are those of `hidden`.
        alternate: the statistics of the alternate answers, row by row, or None.
        row_weight: (rows, 1) what each row's tokens count, or None for 1 each.
        targets: what the rows should come to, or None if the objective does not need it.
    """

    logprob: Tensor
    mask: Tensor
    reference_logprob: Tensor | None = None
    values: Mapping[str, Tensor] = field(default_factory=dict)
    hidden: Tensor | None = None
    reference_hidden: Tensor | None = None
    hidden_mask: Tensor | None = None
    alternate: TokenStats | None = None
    row_weight: Tensor | None = None
    targets: RowTargets | None = None

    def total(self, values: Tensor) -> Tensor:
        """The sum of (rows, tokens) values over supervised tokens, each counted with its row's weight."""
        supervised = torch.where(self.mask, values, 0.0)
        return (supervised if self.row_weight is None else supervised * self.row_weight).sum()

    @property
    def tokens(self) -> int:
        """How many tokens are supervised."""
        return int(self.mask.sum())

    @property
    def cross_entropy(self) -> Tensor:
        """(rows, tokens) minus log-probability; 0 where not supervised."""
        return -self.logprob * self.mask

    def row_mean(self, values: Tensor) -> Tensor:
        """(rows,) the mean of (rows, tokens) values over each row's supervised tokens; 0 for a row without any."""
        return torch.where(self.mask, values, 0.0).sum(dim=1) / self.mask.sum(dim=1).clamp(min=1)

    def row_logprob(self) -> Tensor:
        """(rows,) log-probability of each row's supervised tokens together."""
        return torch.where(self.mask, self.logprob, 0.0).sum(dim=1)


@dataclass(frozen=True)
class Term:
    """A sum over tokens or rows; the trainer divides it by the number of them in the global batch."""

    total: Tensor
    unit: Unit = "token"


@dataclass
class RetainMemory:
    """What an adaptive weight may remember of the retain set: sums over epoch 0, and a dual variable. Saved in checkpoints;
    no tensor in it, and the same on every process."""

    cross_entropy: float = 0.0
    tokens: float = 0.0
    batch_means: float = 0.0
    rows: float = 0.0
    epoch: int = field(default=0)
    dual: float | None = None

    def add(self, *, cross_entropy: float, tokens: float, batch_means: float, rows: float) -> None:
        """Count one step (or one evaluation pass) of epoch 0; later epochs are not counted: the reference is fixed."""
        if self.epoch == 0:
            self.cross_entropy += cross_entropy
            self.tokens += tokens
            self.batch_means += batch_means
            self.rows += rows


@dataclass(frozen=True, kw_only=True)
class Retain:
    """What holds the model where it was on the rows to keep.

    The axis "retain term".
    """

    config_axis: ClassVar[bool] = True

    def needs(self) -> Needs:
        """What the term reads."""
        return Needs()

    def term(self, stats: TokenStats) -> Term:
        """The loss on the retain rows."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Weight:
    """How hard the retain term pulls at a step.

    The axis "retain weight". It sees numbers of the global batch alone.
    """

    config_axis: ClassVar[bool] = True
    needs_cross_entropy: ClassVar[bool] = False
    """Whether the retain rows' cross-entropy must be known, even if the retain term is another."""

    def at(self, memory: RetainMemory, cross_entropy: float, loss: float) -> float:
        """The weight of this step, from the batch's mean retain cross-entropy (nats a token) and its mean retain loss (which
        are the same for `CrossEntropy`). May change `memory.dual`."""
        raise NotImplementedError

    def observe_validation(self, memory: RetainMemory, scores: dict[str, float]) -> None:
        """Told of every scoring on the validation split. Nothing is learned from it unless a weight says so."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What is pushed out.

    The axis "objective". What holds the rest, and how hard, are axes of their own (`Loss`).
    """

    config_axis: ClassVar[bool] = True
    published_retain: ClassVar[Retain]
    """The retain term of the paper."""
    published_weight: ClassVar[Weight]
    """Its weight."""
    forgets: ClassVar[bool] = True
    """Whether it has a forget term at all; without one no step has a forget row."""

    def forget_needs(self) -> Needs:
        """What the forget term reads."""
        return Needs()

    def forget_term(self, stats: TokenStats) -> Term:
        """The loss on the forget rows."""
        raise NotImplementedError

    def draws(self, kind: str | None) -> bool:
        """Whether forget rows of a kind (`sc`, `qa`, or None) are trained on at all."""
        return True


@dataclass(frozen=True, kw_only=True)
class Calibrated(Objective):
    """An objective whose targets are measured on calibration rows: such as the forget rows, and never seen by the model.

    Rows come in groups (task and kind). At step `renew`, 2 `renew`, … the trainer measures every row of a group without a
    gradient, forget and calibration alike, and asks `targets` what each forget row should come to.
    """

    renew: int = 15
    """Steps between measurements of the calibration rows, which drift as the model changes."""
    most: int = 64
    """At most so many calibration rows of a group are measured, drawn anew each time."""
    groups: Literal["task_and_kind", "kind"] = "task_and_kind"
    """Forget rows are held against calibration rows of their task and kind, or of their kind alone."""

    def __post_init__(self) -> None:
        for name in ("renew", "most"):
            if getattr(self, name) < 1:
                raise UserError(f"objective.{name} is {getattr(self, name)}: give at least 1")

    @property
    def reads_forget(self) -> bool:
        """Whether `targets` reads what the forget rows come to; else they are not measured, and it is given zeros."""
        return True

    def measure(self, logprob: Tensor) -> Tensor:
        """() what is compared of one row, from the log-probabilities (tokens,) of its supervised tokens."""
        raise NotImplementedError

    def targets(self, forget: Tensor, calibration: Tensor) -> Tensor:
        """(forget rows,) what each row of a group should come to, from what it and the calibration rows come to now."""
        raise NotImplementedError
