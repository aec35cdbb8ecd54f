"""The original model's distribution over the vocabulary, kept for each supervised token: whole, or the likeliest tokens of it.

Badge: **variant** where not all is kept: the probability that is left is spread as the model itself spreads it, so a
divergence is that of the distributions with all other tokens taken as one. It is never above the whole one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class KnownLogits:
    """Of n tokens the k likeliest.

    Attributes:
        logprob: (n, k + 1) log-probabilities, likeliest first, and last that of all others together; or, where all is kept,
            (n, vocabulary) in the order of the vocabulary.
        ids: (n, k) which tokens they are; None where all is kept.
    """

    logprob: Tensor
    ids: Tensor | None

    def __getitem__(self, span: slice) -> KnownLogits:
        return KnownLogits(self.logprob[span], None if self.ids is None else self.ids[span])

    def whole(self, logits: Tensor) -> Tensor:
        """(n, vocabulary) log-probabilities; what was not kept is spread as `logits` (n, vocabulary) spread it, as a constant."""
        if self.ids is None:
            return self.logprob
        others = torch.log_softmax(logits.detach(), dim=-1).scatter(1, self.ids, -torch.inf)
        spread = others - torch.logsumexp(others, dim=-1, keepdim=True) + self.logprob[:, -1:]
        return spread.scatter(1, self.ids, self.logprob[:, :-1].to(spread.dtype))


def likeliest(logits: Tensor, most: int) -> Tensor:
    """What is kept of logits (n, vocabulary), float32: (n, most + 1, 2) log-probabilities and ids, likeliest first, and last that
    of all others together with the id -1; or (n, vocabulary) log-probabilities where `most` is that many, or more."""
    logprob = torch.log_softmax(logits.float(), dim=-1)
    if most >= logits.shape[-1]:
        return logprob
    kept, ids = logprob.topk(most, dim=-1)
    rest = torch.logsumexp(logprob.scatter(1, ids, -torch.inf), dim=-1, keepdim=True)
    ids = torch.cat([ids, ids.new_full((len(ids), 1), -1)], dim=1)
    return torch.stack([torch.cat([kept, rest], dim=1), ids.float()], dim=-1)


def joined(parts: Sequence[Tensor], device: torch.device) -> KnownLogits:
    """What was kept of the tokens of several texts, one after the other, on a device."""
    together = torch.cat(list(parts)).to(device)
    if together.ndim == 2:
        return KnownLogits(together, None)
    return KnownLogits(together[..., 0], together[:, :-1, 1].long())
