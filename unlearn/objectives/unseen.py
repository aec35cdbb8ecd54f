"""Look unseen: forget rows are to be as likely as rows of the same kind that the model never saw, no less and no more."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lm.errors import UserError
from unlearn.objectives.base import Calibrated, Needs, Retain, Term, TokenStats, Weight
from unlearn.objectives.retain import Divergence
from unlearn.objectives.weight import Fixed


@dataclass(frozen=True, kw_only=True)
class LookUnseen(Calibrated):
    """`L = mean_rows weight * huber(max(|target + above - l| - within * spread, 0)) + KL(original || model)(retain)`.

    `huber(x)` is `x^2 / 2w` below `w = smooth * spread` and `x - w / 2` above, so that a row that has arrived pushes no more.
    `l` is a row's mean over tokens of `min(-log p, cap)`, of a completion over the whole document; `target` and `spread` are of
    calibration rows of the same group, renewed as the model changes. Two-sided: a row that became too unlikely is drawn back,
    since that betrays it too. Bounded: no token is pushed beyond `cap`, no row beyond its target. Made to stand after a
    perturbation, late in healing (`trainer.forget_from`); alone it hides what is still there. Badge: **reconstruction**: no
    source was found that has it.
    """

    published_retain: ClassVar[Retain] = Divergence(documents=True)
    published_weight: ClassVar[Weight] = Fixed()

    documents: float = 0.4
    """Weight of completions, each as a whole document; 0 leaves them out."""
    questions: float = 0.4
    """Weight of questions, by their answers; 0 leaves them out."""
    cap: float = 16.0
    """Nats a token beyond which a token is not pushed further."""
    above: float = 0.1
    """Nats a token that the target lies above what the calibration rows come to."""
    within: float = 0.0
    """A row this near to its target, in standard deviations of the calibration rows, is left alone."""
    smooth: float = 1.0
    """A row this near to that, in standard deviations, is pushed less and less; 0 pushes as hard until it arrives."""
    match: Literal["mean", "quantiles", "shift"] = "mean"
    """Every row of a group to the calibration rows' mean; forget rows, in their own order, to the calibration rows' quantiles,
    so that they keep as much spread; or all rows of a group alike by as much as the means differ beyond what chance does, so
    that nothing is pushed where few rows cannot tell the two apart."""
    errors: float = 1.0
    """With `shift`: what chance does, in standard errors of the difference of the means."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("documents", "questions", "within", "smooth", "errors"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"objective.{name} is {getattr(self, name)}: give 0 or more")
        if not self.documents and not self.questions:
            raise UserError("objective.documents and objective.questions are both 0: nothing would be forgotten")
        if not 0 < self.cap < math.inf or not math.isfinite(self.above):
            raise UserError(
                f"objective.cap is {self.cap} and .above {self.above}: give a positive number, and a number"
            )

    def draws(self, kind: str | None) -> bool:
        """Rows whose weight is not 0."""
        return bool(self.documents if kind == "sc" else self.questions)

    def forget_needs(self) -> Needs:
        """Log-probabilities of whole documents and of answers, and targets."""
        return Needs(documents=True, targets=True)

    def forget_term(self, stats: TokenStats) -> Term:
        """The distances from the targets, summed over rows."""
        targets = stats.targets
        assert targets is not None  # the trainer measures them before the first step that reads them
        away = targets.value + self.above - stats.row_mean((-stats.logprob).clamp(max=self.cap))
        weight = torch.where(targets.document, self.documents, self.questions) * stats.mask.any(dim=1)
        beyond, width = (away.abs() - self.within * targets.spread).clamp(min=0.0), self.smooth * targets.spread
        near = beyond.square() / (2 * width.clamp(min=1e-6))  # a slope that is not a number would pass through `where`
        return Term((weight * torch.where(beyond < width, near, beyond - width / 2)).sum(), unit="row")

    @property
    def reads_forget(self) -> bool:
        """For their order, or their mean."""
        return self.match != "mean"

    def measure(self, logprob: Tensor) -> Tensor:
        """`l`: the mean of `min(-log p, cap)`."""
        return (-logprob).clamp(max=self.cap).mean()

    def targets(self, forget: Tensor, calibration: Tensor) -> Tensor:
        """The calibration rows' mean; of the forget row with rank i of n their quantile `(i + 1/2) / n`; or what each row comes
        to and the difference of the means, less `errors` standard errors of it."""
        if self.match == "mean":
            return calibration.mean().expand(len(forget))
        if self.match == "shift":
            away = calibration.mean() - forget.mean()
            error = sum(rows.var(correction=0) / max(len(rows) - 1, 1) for rows in (forget, calibration)) ** 0.5
            return forget + away.sign() * (away.abs() - self.errors * error).clamp(min=0.0)
        levels = (torch.arange(len(forget), dtype=forget.dtype) + 0.5) / len(forget)
        matched = torch.empty_like(forget)
        matched[forget.argsort(stable=True)] = torch.quantile(calibration, levels)
        return matched
