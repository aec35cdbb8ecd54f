"""The axis "metric": what is read off the model, which says how near it is to the answer, given the prompt.

To add one, write its class here and its name into `MetricName`: what it needs, its words in a picture, whether gradients go
through it and how far two engines may differ in it are said by the class. Nothing else knows a metric by its name.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from lm.errors import UserError
from lm.old_configs import subclasses
from tracing.question.target import Target, log_softmax, token_log_probabilities

MetricName = Literal[
    "probability",
    "log_probability",
    "first_token_probability",
    "distinguishing_log_probability",
    "logit_difference",
    "reciprocal_rank",
    "negative_kl",
]
"""How a metric is named in configs and in files; each is a class of this file."""


class Metric(ABC):
    """The axis: one number a row of logits, higher where the answer is nearer."""

    name: ClassVar[str]
    """In configs and in files."""
    label: ClassVar[str]
    """In a picture."""
    needs_clean: ClassVar[bool] = False
    """Whether it compares with the clean pass of the same model, so that it cannot be read without one."""
    needs_foil: ClassVar[bool] = False
    """Whether it needs another answer beside the fact's own: `Fact.foil`."""
    counts_words: ClassVar[bool] = False
    """Whether only the answer's names and numbers count: `tracing.question.target.distinguishing`."""
    first_token: ClassVar[bool] = False
    """Whether it looks at the answer's first token alone."""
    without_gradient: ClassVar[str] = ""
    """Why there is nothing to attribute by its gradient at the clean or the corrupted prompt; empty where there is."""

    @abstractmethod
    def read(self, logits: Tensor, target: Target) -> Tensor:
        """The metric of each row.

        Args:
            logits: (rows, n, vocabulary), at the last prompt token and the first n - 1 answer tokens (teacher forced).

        Returns:
            (rows,) float64.

        Raises:
            UserError: it lacks something that it needs.
        """

    @property
    def has_gradient(self) -> bool:
        """Whether effects can be attributed by its gradient."""
        return not self.without_gradient

    def tolerance(self, nats: float, size: float) -> float:
        """How far apart two values of about this size may lie where log-probabilities are apart by rounding of `nats`.

        Of a probability, a ratio.
        """
        return max(size, 1e-12) * math.expm1(nats)


class Probability(Metric):
    """The probability of the whole answer: the product over its tokens."""

    name = "probability"
    label = "probability of the answer"

    def read(self, logits: Tensor, target: Target) -> Tensor:
        return token_log_probabilities(logits, target.answer).sum(-1).exp()


class LogProbability(Metric):
    """The natural logarithm of the probability of the whole answer: the sum over its tokens, in nats."""

    name = "log_probability"
    label = "log-probability of the answer"

    def read(self, logits: Tensor, target: Target) -> Tensor:
        return token_log_probabilities(logits, target.answer).sum(-1)

    def tolerance(self, nats: float, size: float) -> float:
        return nats


class FirstTokenProbability(Metric):
    """The probability of the first answer token alone, as the script of Meng et al. (2022) reads it off."""

    name = "first_token_probability"
    label = "probability of the answer's first token"
    first_token = True

    def read(self, logits: Tensor, target: Target) -> Tensor:
        return token_log_probabilities(logits, target.answer)[:, 0].exp()


class DistinguishingLogProbability(LogProbability):
    """The log-probability of the answer's names and numbers alone, given all before them, in nats."""

    name = "distinguishing_log_probability"
    label = "log-probability of the answer's names and numbers"
    counts_words = True

    def read(self, logits: Tensor, target: Target) -> Tensor:
        each = token_log_probabilities(logits, target.answer)
        if target.counted is not None:
            each = each.where(target.counted.to(each.device), 0.0)
        return each.sum(-1)


class LogitDifference(Metric):
    """The logit of the answer's token less that of the foil's, where the two first differ (Zhang and Nanda 2023)."""

    name = "logit_difference"
    label = "difference of logits between answer and foil"
    needs_foil = True

    def read(self, logits: Tensor, target: Target) -> Tensor:
        if target.place is None or target.foil is None:
            raise UserError(
                f"{self.name} needs a foil, another answer, for every fact: give Fact.foil, or another metric"
            )
        place = target.place.to(logits.device)
        here = logits[torch.arange(len(logits), device=logits.device), place]
        own = target.answer.to(logits.device).gather(1, place[:, None])
        other = target.foil.to(logits.device)[:, None]
        return (here.gather(1, own) - here.gather(1, other)).squeeze(1).double()

    def tolerance(self, nats: float, size: float) -> float:
        return nats


class ReciprocalRank(Metric):
    """The mean over answer tokens of 1 / rank among all tokens: 1 where the model would say it."""

    name = "reciprocal_rank"
    label = "mean reciprocal rank of the answer's tokens"
    without_gradient = "has no gradient to attribute"

    def read(self, logits: Tensor, target: Target) -> Tensor:
        own = logits.gather(-1, target.answer.to(logits.device).unsqueeze(-1))
        rank = 1 + (logits > own).sum(-1)
        mean: Tensor = torch.where(own.squeeze(-1).isnan(), torch.nan, 1 / rank.double()).mean(-1)
        return mean

    def tolerance(self, nats: float, size: float) -> float:
        return nats


class NegativeKL(Metric):
    """Minus KL(clean || this), in nats, of the distributions over the vocabulary at each answer token, summed.

    0 is the clean pass itself.
    """

    name = "negative_kl"
    label = "closeness to the clean distribution (minus KL)"
    needs_clean = True
    without_gradient = "is flat at the clean prompt, from where it is attributed"

    def read(self, logits: Tensor, target: Target) -> Tensor:
        if target.clean is None or target.fact is None:
            raise UserError(f"{self.name} compares with a clean pass, which only tracing has: use log_probability here")
        clean = target.clean[target.fact.to(target.clean.device)].to(logits.device)
        apart = functional.kl_div(log_softmax(logits), clean, reduction="none", log_target=True)
        return -apart.sum(-1).double().sum(-1)

    def tolerance(self, nats: float, size: float) -> float:
        return max(size, 1e-12) * nats


def metric_of(name: str) -> Metric:
    """The metric of that name, of this file or written in a notebook. Raises UserError for one that does not exist."""
    known: dict[str, type[Metric]] = {cls.name: cls for cls in subclasses(Metric).values()}
    if name not in known:
        raise UserError(f"the metric {name!r} is unknown: use one of {', '.join(known)}")
    return known[name]()


def metric_label(name: str) -> str:
    """A metric in words, for a picture or a report; its name where this program has no such metric."""
    return next((str(cls.label) for cls in subclasses(Metric).values() if cls.name == name), name)


def check_metric(name: str) -> None:
    """Raise UserError for a metric that does not exist."""
    metric_of(name)


def scored_tokens(answer: Sequence[int], metrics: Sequence[str]) -> list[int]:
    """The answer tokens that the metrics look at: all of them, or the first where all look at that alone."""
    return list(answer[:1] if metrics and all(metric_of(name).first_token for name in metrics) else answer)


def beside_clean(target: Target, clean: Tensor, metrics: Sequence[str]) -> Target:
    """The target with the logits of each fact's clean pass, (facts, n, vocabulary), where a metric compares with them."""
    return target.beside(clean) if any(metric_of(name).needs_clean for name in metrics) else target


def read_all(logits: Tensor, target: Target, metrics: Sequence[str]) -> Tensor:
    """Several metrics of the same rows, (rows, metrics) float64: see `Metric.read`."""
    return torch.stack([metric_of(name).read(logits, target) for name in metrics], 1)


def read_off(logits: Tensor, target: Target, metric: str) -> Tensor:
    """One metric, by its name, of each row, (rows,) float64: see `Metric.read`."""
    return metric_of(metric).read(logits, target)
