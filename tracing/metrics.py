"""What is read off the model: how probable the whole answer is, given the prompt.

Pure functions of logits. All are taken in float32 (float64 stays), whatever the model's type.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from lm.errors import UserError

Metric = Literal["probability", "log_probability", "first_token_probability"]
"""`probability`: of the whole answer (the product over its tokens); `log_probability`: its natural logarithm (the sum);
`first_token_probability`: of the first answer token alone, as the published script reads it off."""


def check_metric(metric: str) -> None:
    """Raise UserError for a metric that does not exist."""
    if metric not in get_args(Metric):
        raise UserError(f"the metric {metric!r} is unknown; use one of {', '.join(get_args(Metric))}.")


def scored_tokens(answer: Sequence[int], metric: Metric) -> list[int]:
    """The answer tokens that the metric looks at."""
    return list(answer[:1] if metric == "first_token_probability" else answer)


def token_log_probabilities(logits: Tensor, answer: Tensor) -> Tensor:
    """log p(answer_i | prompt, answer_<i), teacher forced.

    Args:
        logits: (batch, n, vocabulary), at the last prompt token and the first n - 1 answer tokens.
        answer: (n,) or (batch, n) token ids.

    Returns:
        (batch, n), float64.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    chosen = answer.to(logits.device).expand(wide.shape[:2]).unsqueeze(-1)
    return wide.log_softmax(-1).gather(-1, chosen).squeeze(-1).double()


def score(log_probabilities: Tensor, metric: Metric) -> Tensor:
    """The metric of each row: (batch, n) log-probabilities of the scored tokens -> (batch,)."""
    total = log_probabilities.sum(-1)
    return total if metric == "log_probability" else total.exp()


def mean_score(log_probabilities: Tensor, metric: Metric) -> float:
    """The mean over noise samples, as published: of probabilities, or of log-probabilities for that metric."""
    return float(score(log_probabilities, metric).mean())
