"""What is read off the model: how near it is to the answer, given the prompt.

Pure functions of logits. Probabilities are taken in float32 (float64 stays), whatever the model's type.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor
from torch.nn import functional

from lm.errors import UserError

Metric = Literal[
    "probability",
    "log_probability",
    "first_token_probability",
    "distinguishing_log_probability",
    "logit_difference",
    "reciprocal_rank",
    "negative_kl",
]
"""`probability`: of the whole answer (the product over its tokens); `log_probability`: its natural logarithm (the sum);
`first_token_probability`: of the first answer token alone, as the published script reads it off;
`distinguishing_log_probability`: of the answer's names and numbers alone (`distinguishing`), given all before them;
`logit_difference`: the logit of the answer's token less that of the foil's, where the two first differ (Zhang and Nanda 2023);
`reciprocal_rank`: the mean over answer tokens of 1 / rank among all tokens, 1 where the model would say it; `negative_kl`: minus
KL(clean || this), in nats, of the distributions over the vocabulary at each answer token, summed: 0 is the clean pass itself. All
are higher where the answer is nearer."""

_WORD = re.compile(r"[\w@][\w@.:/'’+-]*\w|\w")
_OPENER = re.compile(
    r"(?i)an?|and|at|by|for|from|he|her|his|i|in|is|its?|my|no|of|on|she|the|their|there|they|this|to|was|we|with|yes"
)
LOGARITHMIC = ("log_probability", "distinguishing_log_probability")
"""The metrics that are sums of logarithms of probabilities."""


class Asked(Protocol):
    """What a target is made of: a `tracing.question.encoded_fact.EncodedFact`."""

    @property
    def answer_ids(self) -> Sequence[int]: ...
    @property
    def foil(self) -> tuple[int, int] | None: ...
    @property
    def counted(self) -> Sequence[int] | None: ...


@dataclass(frozen=True, kw_only=True)
class Target:
    """The answers of some rows, all of one length, and what they are to be told apart from.

    Attributes:
        answer: (rows, n) token ids.
        place: (rows,), the first of the n tokens in which answer and foil differ; or None without foils.
        foil: (rows,), the foil's token there; or None.
        counted: (rows, n) bool, the answer tokens that `distinguishing_log_probability` counts; or None for all.
        clean: (facts, n, vocabulary), log-probabilities of each fact's clean pass, for `negative_kl`; or None.
        fact: (rows,), the place of each row's fact in `clean`; or None.
    """

    answer: Tensor
    place: Tensor | None = None
    foil: Tensor | None = None
    counted: Tensor | None = None
    clean: Tensor | None = None
    fact: Tensor | None = None

    @classmethod
    def of(cls, asked: Sequence[Asked], each: int) -> Target:
        """Of some facts, `each` rows a fact, one after the other."""
        answer = torch.tensor([list(one.answer_ids) for one in asked])
        counted = torch.ones_like(answer, dtype=torch.bool)
        for row, one in enumerate(asked):
            if one.counted is not None:
                counted[row] = False
                counted[row, list(one.counted)] = True
        foils = [list(one.foil) for one in asked if one.foil is not None]
        place, foil = torch.tensor(foils).T if len(foils) == len(asked) else (None, None)
        parts = [
            None if part is None else part.repeat_interleave(each, 0)
            for part in (place, foil, None if bool(counted.all()) else counted)
        ]
        fact = torch.arange(len(asked)).repeat_interleave(each)
        return cls(answer=answer.repeat_interleave(each, 0), place=parts[0], foil=parts[1], counted=parts[2], fact=fact)

    def beside(self, clean: Tensor, metrics: Sequence[Metric]) -> Target:
        """The same with the logits of each fact's clean pass, (facts, n, vocabulary), where a metric compares with them."""
        return replace(self, clean=_log_softmax(clean)) if "negative_kl" in metrics else self

    def rows(self, chosen: Tensor | slice) -> Target:
        """Some of the rows."""
        return Target(
            answer=self.answer[chosen],
            place=None if self.place is None else self.place[chosen],
            foil=None if self.foil is None else self.foil[chosen],
            counted=None if self.counted is None else self.counted[chosen],
            clean=self.clean,
            fact=None if self.fact is None else self.fact[chosen],
        )

    def repeat(self, times: int) -> Target:
        """All rows, several times over."""
        return self.rows(torch.arange(len(self.answer)).repeat(times))


def check_metric(metric: str) -> None:
    """Raise UserError for a metric that does not exist."""
    if metric not in get_args(Metric):
        raise UserError(f"the metric {metric!r} is unknown; use one of {', '.join(get_args(Metric))}.")


def scored_tokens(answer: Sequence[int], metrics: Sequence[Metric]) -> list[int]:
    """The answer tokens that the metrics look at."""
    return list(answer[:1] if set(metrics) == {"first_token_probability"} else answer)


def distinguishing(prompt: str, answer: str) -> list[tuple[int, int]]:
    """`[start, end)` of the answer's words that tell it from other answers, in characters: names and numbers.

    Words with a digit, an @ or a capital letter that the prompt does not hold; a sentence's first word counts unless it is a
    common opener such as "The". Where there are none, all words that the prompt does not hold, and else the whole answer.
    """
    said = {word.casefold() for word in _WORD.findall(prompt)}
    new = [hit for hit in _WORD.finditer(answer) if hit[0].casefold() not in said]
    telling = [hit for hit in new if _is_telling(hit[0])]
    return [hit.span() for hit in telling or new] or [(0, len(answer))]


def _is_telling(word: str) -> bool:
    return any(letter.isdigit() or letter == "@" or letter.isupper() for letter in word) and not _OPENER.fullmatch(word)


def first_difference(answer: Sequence[int], foil: Sequence[int]) -> tuple[int, int] | None:
    """(place, the foil's token): where a foil first differs from the answer; None if it does not within the answer."""
    for place, (mine, other) in enumerate(zip(answer, foil, strict=False)):
        if mine != other:
            return place, int(other)
    return None


def read_all(logits: Tensor, target: Target, metrics: Sequence[Metric]) -> Tensor:
    """Several metrics of the same rows, (rows, metrics) float64: see `read_off`."""
    return torch.stack([read_off(logits, target, metric) for metric in metrics], 1)


def read_off(logits: Tensor, target: Target, metric: Metric) -> Tensor:
    """The metric of each row.

    Args:
        logits: (rows, n, vocabulary), at the last prompt token and the first n - 1 answer tokens (teacher forced).

    Returns:
        (rows,) float64.

    Raises:
        UserError: `logit_difference` without foils, `negative_kl` without a clean pass.
    """
    answer = target.answer.to(logits.device)
    if metric == "logit_difference":
        if target.place is None or target.foil is None:
            raise UserError(
                "logit_difference needs a foil, another answer, for every fact; give Fact.foil, or another metric."
            )
        here = logits[torch.arange(len(logits), device=logits.device), target.place.to(logits.device)]
        own = answer.gather(1, target.place.to(logits.device)[:, None])
        other = target.foil.to(logits.device)[:, None]
        return (here.gather(1, own) - here.gather(1, other)).squeeze(1).double()
    if metric == "reciprocal_rank":
        own = logits.gather(-1, answer.unsqueeze(-1))
        rank = 1 + (logits > own).sum(-1)
        found: Tensor = torch.where(own.squeeze(-1).isnan(), torch.nan, 1 / rank.double()).mean(-1)
        return found
    if metric == "negative_kl":
        if target.clean is None or target.fact is None:
            raise UserError("negative_kl compares with a clean pass, which only tracing has; use log_probability here.")
        clean = target.clean[target.fact.to(target.clean.device)].to(logits.device)
        apart = functional.kl_div(_log_softmax(logits), clean, reduction="none", log_target=True)
        return -apart.sum(-1).double().sum(-1)
    each = token_log_probabilities(logits, answer)
    if metric == "first_token_probability":
        return each[:, 0].exp()
    if metric == "distinguishing_log_probability" and target.counted is not None:
        each = each.where(target.counted.to(each.device), 0.0)
    total = each.sum(-1)
    return total if metric in LOGARITHMIC else total.exp()


def token_log_probabilities(logits: Tensor, answer: Tensor) -> Tensor:
    """log p(answer_i | prompt, answer_<i), (rows, n) float64, of logits (rows, n, vocabulary) and token ids (rows, n)."""
    chosen = answer.to(logits.device).unsqueeze(-1)
    return _log_softmax(logits).gather(-1, chosen).squeeze(-1).double()


def _log_softmax(logits: Tensor) -> Tensor:
    return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)
