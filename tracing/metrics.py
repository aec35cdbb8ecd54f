"""What is read off the model: how near it is to the answer, given the prompt.

Pure functions of logits. Probabilities are taken in float32 (float64 stays), whatever the model's type.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lm.errors import UserError

Metric = Literal["probability", "log_probability", "first_token_probability", "logit_difference", "reciprocal_rank"]
"""`probability`: of the whole answer (the product over its tokens); `log_probability`: its natural logarithm (the sum);
`first_token_probability`: of the first answer token alone, as the published script reads it off; `logit_difference`: the logit of
the answer's token less that of the foil's, where the two first differ (Zhang and Nanda 2023); `reciprocal_rank`: the mean over
answer tokens of 1 / rank among all tokens, 1 where the model would say it. All are higher where the answer is nearer."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """The answers of some rows, all of one length, and what they are to be told apart from.

    Attributes:
        answer: (rows, n) token ids.
        place: (rows,), the first of the n tokens in which answer and foil differ; or None without foils.
        foil: (rows,), the foil's token there; or None.
    """

    answer: Tensor
    place: Tensor | None = None
    foil: Tensor | None = None

    @classmethod
    def of(cls, answers: Sequence[Sequence[int]], foils: Sequence[tuple[int, int] | None], each: int) -> Target:
        """Of some facts, `each` rows a fact, one after the other."""
        answer = torch.tensor([list(one) for one in answers]).repeat_interleave(each, 0)
        if any(foil is None for foil in foils):
            return cls(answer=answer)
        place, foil = torch.tensor([list(foil) for foil in foils if foil is not None]).repeat_interleave(each, 0).T
        return cls(answer=answer, place=place, foil=foil)

    def rows(self, chosen: Tensor | slice) -> Target:
        """Some of the rows."""
        return Target(
            answer=self.answer[chosen],
            place=None if self.place is None else self.place[chosen],
            foil=None if self.foil is None else self.foil[chosen],
        )

    def repeat(self, times: int) -> Target:
        """All rows, several times over."""
        return self.rows(torch.arange(len(self.answer)).repeat(times))


def check_metric(metric: str) -> None:
    """Raise UserError for a metric that does not exist."""
    if metric not in get_args(Metric):
        raise UserError(f"the metric {metric!r} is unknown; use one of {', '.join(get_args(Metric))}.")


def scored_tokens(answer: Sequence[int], metric: Metric) -> list[int]:
    """The answer tokens that the metric looks at."""
    return list(answer[:1] if metric == "first_token_probability" else answer)


def first_difference(answer: Sequence[int], foil: Sequence[int]) -> tuple[int, int] | None:
    """(place, the foil's token): where a foil first differs from the answer; None if it does not within the answer."""
    for place, (mine, other) in enumerate(zip(answer, foil, strict=False)):
        if mine != other:
            return place, int(other)
    return None


def read_off(logits: Tensor, target: Target, metric: Metric) -> Tensor:
    """The metric of each row.

    Args:
        logits: (rows, n, vocabulary), at the last prompt token and the first n - 1 answer tokens (teacher forced).

    Returns:
        (rows,) float64.

    Raises:
        UserError: `logit_difference` without foils.
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
    total = token_log_probabilities(logits, answer).sum(-1)
    return total if metric == "log_probability" else total.exp()


def token_log_probabilities(logits: Tensor, answer: Tensor) -> Tensor:
    """log p(answer_i | prompt, answer_<i), (rows, n) float64, of logits (rows, n, vocabulary) and token ids (rows, n)."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    chosen = answer.to(logits.device).unsqueeze(-1)
    return wide.log_softmax(-1).gather(-1, chosen).squeeze(-1).double()
