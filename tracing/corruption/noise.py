"""How the subject is made unreadable: an axis. Here the noise on its embeddings; `tracing.corruption.replacement` puts other
names.

A corruption is data; `bind` makes of it what gives each fact its batch. What is restored afterwards is
`tracing.engine.reference`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from lm.errors import UserError
from lm.model import LanguageModel
from tracing.question.encoded_fact import EncodedFact, embed


class Corruptor(ABC):
    """A corruption for one model and one set of facts."""

    sigma: float | None = None
    """The absolute standard deviation of the noise, where there is any."""

    def why_not(self, encoded: EncodedFact) -> str | None:
        """Why a fact cannot be corrupted, as a sentence without a subject, or None."""
        return None

    @abstractmethod
    def rows(self, encoded: EncodedFact) -> int:
        """How many corrupted copies a fact gets."""

    @abstractmethod
    def batch(self, encoded: EncodedFact) -> Tensor:
        """(1 + rows, tokens, hidden) embeddings, row 0 clean, in the model's type and on its device."""

    @abstractmethod
    def key(self, encoded: EncodedFact) -> str:
        """A text that changes with anything the batch depends on, but for model, prompt and answer."""


@dataclass(frozen=True, kw_only=True)
class Corruption(ABC):
    """A way to make subjects unreadable: an axis."""

    config_axis: ClassVar[bool] = True

    @abstractmethod
    def bind(self, model: LanguageModel, encoded_facts: Sequence[EncodedFact]) -> Corruptor:
        """For a model and all facts that are asked about, known or not. Raises UserError for what cannot be."""


@dataclass(frozen=True, kw_only=True)
class GaussianNoise(Corruption):
    """Add noise drawn from N(0, sigma²) to every embedding value of every subject token.

    Badge: faithful to the causal-tracing script of Meng et al. (2022, arXiv:2202.05262), which the authors of the joint
    method run unchanged.

    The draws are `numpy.random.RandomState(seed).randn(samples, subject_tokens, hidden)`, in float64, made anew for
    each fact and shared by all its cells, so effects of two cells differ by what was restored and by nothing else.
    """

    sigmas: float = 3.0
    """The noise in units of the measured standard deviation of the subjects' embeddings."""
    samples: int = 10
    """How many corrupted copies of each prompt are averaged."""
    seed: int = 1
    """The seed of the draws."""
    covariance: Literal["isotropic", "full"] = "isotropic"
    """full: with the covariance of all rows of the embedding matrix, `sigmas` times as wide; then no `sigma`. (An appendix of the
    paper reports a like picture.)"""
    sigma: float | None = None
    """An absolute standard deviation instead of `sigmas` times the measured one: it makes runs on different facts comparable."""

    def __post_init__(self) -> None:
        for name in ("sigmas", "sigma"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UserError(f"the corruption's {name} is {value}: give a positive number (3.0 sigmas is usual)")
        if self.covariance not in ("isotropic", "full"):
            raise UserError(f"the corruption's covariance is {self.covariance!r}: use isotropic or full")
        if self.covariance == "full" and self.sigma is not None:
            raise UserError(
                "the corruption has a sigma and the full covariance: give sigmas, how many times as wide it is"
            )
        if self.samples < 1:
            raise UserError(f"the corruption's samples is {self.samples}: give at least 1 (10 is usual)")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"the corruption's seed is {self.seed}: give a number from 0 to 4294967295")

    def bind(self, model: LanguageModel, encoded_facts: Sequence[EncodedFact]) -> Corruptor:
        if self.covariance == "full":
            return _Noisy(model, self, self.sigmas * embedding_spread(model), embedding_factor(model))
        return _Noisy(model, self, self.measure(model, [encoded.fact.subject for encoded in encoded_facts]))

    def measure(self, model: LanguageModel, subjects: Sequence[str]) -> float:
        """The absolute standard deviation of the noise: `sigma`, or `sigmas` times what `embedding_std` finds."""
        return self.sigma if self.sigma is not None else self.sigmas * embedding_std(model, subjects)

    def corrupt(self, embeddings: Tensor, span: tuple[int, int], sigma: float, factor: Tensor | None = None) -> Tensor:
        """One clean and `samples` corrupted copies of a prompt.

        Args:
            embeddings: (tokens, hidden), the clean output of the embedding layer.
            span: `[start, end)` of the subject's tokens.
            sigma: absolute standard deviation, from `measure`.
            factor: (hidden, hidden), a lower triangle L: the draws are multiplied by its transpose, so that their covariance is
                sigma² L L'.

        Returns:
            (1 + samples, tokens, hidden) in the type and on the device of `embeddings`; row 0 is clean. The sum is
            taken in float64 and then rounded once.
        """
        start, end = span
        draws = np.random.RandomState(self.seed).randn(self.samples, end - start, embeddings.shape[1])
        batch = embeddings.detach().repeat(1 + self.samples, 1, 1)
        shaped = torch.from_numpy(draws) if factor is None else torch.from_numpy(draws) @ factor.T
        noisy = embeddings[start:end].detach().cpu().double() + sigma * shaped
        batch[1:, start:end] = noisy.to(device=embeddings.device, dtype=embeddings.dtype)
        return batch


class _Noisy(Corruptor):
    def __init__(self, model: LanguageModel, noise: GaussianNoise, sigma: float, factor: Tensor | None = None) -> None:
        self.model, self.noise, self.sigma, self.factor = model, noise, sigma, factor

    def rows(self, encoded: EncodedFact) -> int:
        return self.noise.samples

    def batch(self, encoded: EncodedFact) -> Tensor:
        assert self.sigma is not None
        return self.noise.corrupt(embed(self.model, encoded.input_ids), encoded.span, self.sigma, self.factor)

    def key(self, encoded: EncodedFact) -> str:
        return f"{self.noise} {self.sigma!r}"


def embedding_std(model: LanguageModel, subjects: Sequence[str]) -> float:
    """The sample standard deviation over all elements of the embeddings of all subjects' tokens.

    As published: every subject is tokenized alone (with the BOS that some tokenizers add), the output of the embedding
    layer is taken, a subject that several facts share counts once for each, and `torch.std` is over everything at once.
    It is taken in float32 at least.

    Raises:
        UserError: no subjects.
    """
    if not subjects:
        raise UserError("there are no subjects to measure the noise on: give at least one fact")
    layer = model.model.get_input_embeddings()
    assert layer is not None
    device = next(layer.parameters()).device
    with torch.inference_mode():
        rows = [
            layer(torch.tensor(model.tokenizer(subject)["input_ids"], device=device)).reshape(-1)
            for subject in subjects
        ]
        values = torch.cat(rows)
        return float((values if values.dtype == torch.float64 else values.float()).std())


def embedding_spread(model: LanguageModel) -> float:
    """The root mean variance over the coordinates of all rows of the embedding matrix: one standard deviation of a coordinate."""
    return float(_rows(model).var(0).mean().sqrt())


def embedding_factor(model: LanguageModel) -> Tensor:
    """(hidden, hidden) float64 lower triangle L with L L' the covariance of all embedding rows, divided by its mean variance.

    Each token counts alike, whatever its frequency: a **variant** of the published script, which weighs them by a corpus. A
    little is added to the diagonal where rows do not span the space.
    """
    rows = _rows(model)
    covariance = torch.cov(rows.T).reshape(rows.shape[1], rows.shape[1])
    if not bool(torch.isfinite(covariance).all()):
        raise UserError(
            f"the embeddings of {model.name} hold NaN or infinity, so they have no covariance: load other weights"
        )
    scale = float(covariance.diagonal().mean())
    ridge = 1e-9 * torch.eye(len(covariance), dtype=torch.float64)
    factor: Tensor = torch.linalg.cholesky(covariance / scale + ridge)
    return factor


def _rows(model: LanguageModel) -> Tensor:
    layer = model.model.get_input_embeddings()
    assert layer is not None
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach().cpu().double()
