"""Encoded rows as one right-padded micro-batch. Which rows go together is `unlearn.training.batches`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lm.prompts import Encoded


@dataclass(frozen=True)
class Inputs:
    """A right-padded micro-batch.

    Attributes:
        ids, attention: (rows, tokens) token ids, and 1 on real tokens.
        targets: (rows, tokens - 1) the next token at each position.
        mask: (rows, tokens - 1) True where that target is supervised.
        supervised: whether any target is.
    """

    ids: Tensor
    attention: Tensor
    targets: Tensor
    mask: Tensor
    supervised: bool


def collate(rows: Sequence[Encoded], pad: int, device: torch.device) -> Inputs:
    """Pad rows to one length. No rows at all gives one row of padding with nothing supervised, so that every process works."""
    if not rows:
        ids = torch.full((1, 2), pad, dtype=torch.long, device=device)
        return Inputs(
            ids, torch.ones_like(ids), ids[:, 1:], torch.zeros((1, 1), dtype=torch.bool, device=device), False
        )
    ids = pad_sequence([torch.tensor(row.ids) for row in rows], batch_first=True, padding_value=pad)
    places, lengths = torch.arange(ids.shape[1]), torch.tensor([[len(row.ids)] for row in rows])
    attention = (places < lengths).long()
    mask = (places >= torch.tensor([[row.answer_start] for row in rows])) & (places < lengths)
    any_target = bool(mask.any())
    return Inputs(ids.to(device), attention.to(device), ids[:, 1:].to(device), mask[:, 1:].to(device), any_target)
