"""From logits to token statistics, in float32 whatever the model computes in. The only place that reads logits to train."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from unlearn.batches import Inputs
from unlearn.objectives import Statistic


def token_logprobs(logits: Tensor, inputs: Inputs) -> Tensor:
    """(rows, tokens - 1) log-probability of each supervised target, 0 elsewhere.

    Args:
        logits: (rows, tokens, vocabulary) of the same inputs, any float type.
    """
    rows, places = inputs.mask.shape
    result = torch.zeros((rows, places), dtype=torch.float32, device=logits.device)
    chosen = logits[:, :-1][inputs.mask].float()
    if chosen.shape[0] == 0:  # an empty micro-batch: keep the graph, so that every process runs a backward pass
        return result + 0.0 * logits.float().sum()
    return result.masked_scatter(inputs.mask, -cross_entropy(chosen, inputs.targets[inputs.mask], reduction="none"))


def token_values(statistic: Statistic, logits: Tensor, inputs: Inputs, reference: Tensor | None) -> Tensor:
    """(rows, tokens - 1) a statistic of each supervised target, 0 elsewhere; logits and reference (rows, tokens, vocabulary)."""
    rows, places = inputs.mask.shape
    result = torch.zeros((rows, places), dtype=torch.float32, device=logits.device)
    chosen = logits[:, :-1][inputs.mask].float()
    if chosen.shape[0] == 0:
        return result + 0.0 * logits.float().sum()
    theirs = reference[:, :-1][inputs.mask].float() if statistic.reference and reference is not None else None
    return result.masked_scatter(inputs.mask, statistic.function(chosen, inputs.targets[inputs.mask], theirs))
