"""What a feature means: the tokens on which it is strongest, in their context, and the words that its direction writes.

`Examples` is filled from codes and activations in reading order (`sae.activations.harvest` gives them); `logit_lens` asks the
language model's own head. Nothing of shape (tokens, features) is made, and nothing is judged: reading is left to people.
"""

from __future__ import annotations

import html
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lm.anatomy import module_at
from lm.errors import UserError
from lm.model import LanguageModel
from sae.activations.batch import ActivationBatch
from sae.sparse_code import SparseCode

_CHUNK = 1 << 24
"""Logits made together."""


class Example(NamedTuple):
    """One place where a feature fires, with the tokens round it that were seen."""

    value: float
    document: int
    position: int
    token_ids: tuple[int, ...]
    activations: tuple[float, ...]
    """Of the feature on each of `token_ids`; 0 where it does not fire."""
    center: int
    """Which of `token_ids` the example is about."""


@dataclass(frozen=True, eq=False)
class Examples:
    """The strongest activations of every feature in a stream, each with its context; returned anew by `update`.

    (features, count) tensors, the strongest first, 0 where there are fewer; of contexts (features, count, 2 window + 1).
    Equal values: what was seen earlier comes first.
    """

    values: Tensor
    documents: Tensor
    positions: Tensor
    token_ids: Tensor
    """(features, count, 2 window + 1) int64; -1 for what was not seen: another document, a masked token, another batch."""
    activations: Tensor
    """(features, count, 2 window + 1) float32."""

    @classmethod
    def start(cls, features: int, *, count: int = 8, window: int = 12) -> Examples:
        """Nothing seen. Memory: about `features * count * (2 window + 1) * 12` bytes."""
        if features < 1 or count < 1 or window < 0:
            raise UserError(
                f"{count} examples of {features} features, window {window}: give sizes from 1, window from 0"
            )
        shape, wide = (features, count), (features, count, 2 * window + 1)
        documents, positions, token_ids = (torch.full(size, -1) for size in (shape, shape, wide))
        return cls(torch.zeros(shape), documents, positions, token_ids, torch.zeros(wide))

    @torch.no_grad()
    def update(self, code: SparseCode, batch: ActivationBatch) -> Examples:
        """With the code of a batch's tokens, which stand in reading order (context after context, as `harvest` gives them)."""
        if code.tokens != len(batch) or code.features != len(self.values):
            raise UserError(
                f"a code of {code.tokens} tokens over {code.features} features met a batch of {len(batch)} and examples of "
                f"{len(self.values)} features: give those that belong together"
            )
        count, window = self.values.shape[1], self.token_ids.shape[2] // 2
        rows, features, values = _best(code, count)
        around = rows.unsqueeze(1) + torch.arange(-window, window + 1)
        places = around.clamp(0, max(code.tokens - 1, 0))
        documents, positions, ids = (item.cpu() for item in (batch.documents, batch.positions, batch.token_ids))
        same = (around == places) & (documents[places] == documents[rows].unsqueeze(1))
        same &= positions[places] - positions[rows].unsqueeze(1) == around - rows.unsqueeze(1)
        seen = torch.where(same, ids[places], -1)
        activations = torch.where(same, _values_at(code, places, features), 0.0)
        new = Examples.start(len(self.values), count=count, window=window)
        place = torch.arange(len(features)) - _first_of_run(features)
        for old, item in zip(
            (new.values, new.documents, new.positions, new.token_ids, new.activations),
            (values, documents[rows], positions[rows], seen, activations),
            strict=True,
        ):
            old[features, place] = item
        return self.merge(new)

    def merge(self, other: Examples) -> Examples:
        """Of both streams together; of equals, this one's come first."""
        if self.token_ids.shape != other.token_ids.shape:
            raise UserError("examples of other features, counts or windows cannot be merged: start them alike")
        count = self.values.shape[1]
        order = torch.sort(torch.cat([self.values, other.values], 1), dim=1, descending=True, stable=True).indices[
            :, :count
        ]
        row = torch.arange(len(order)).unsqueeze(1)
        joined = (
            torch.cat([getattr(self, item.name), getattr(other, item.name)], 1)[row, order] for item in fields(self)
        )
        return Examples(*joined)

    def of(self, feature: int) -> list[Example]:
        """The examples of one feature, the strongest first."""
        window = self.token_ids.shape[2] // 2
        examples = []
        for place in range(int((self.values[feature] > 0).sum())):
            ids = self.token_ids[feature, place]
            # A gap (a masked token, the end of the batch) ends the context.
            before = int((ids[:window].flip(0) >= 0).long().cumprod(0).sum())
            after = int((ids[window + 1 :] >= 0).long().cumprod(0).sum())
            span = slice(window - before, window + after + 1)
            examples.append(
                Example(
                    float(self.values[feature, place]),
                    int(self.documents[feature, place]),
                    int(self.positions[feature, place]),
                    tuple(ids[span].tolist()),
                    tuple(self.activations[feature, place, span].tolist()),
                    before,
                )
            )
        return examples


class Words(NamedTuple):
    """What some directions write, (directions, count) each: token ids and the change of their logits."""

    up: Tensor
    up_by: Tensor
    down: Tensor
    down_by: Tensor


@torch.no_grad()
def logit_lens(model: LanguageModel, directions: Tensor, *, count: int = 10) -> Words:
    """The tokens that (directions, hidden) raise and lower most when the model's final norm and head read them alone.

    `head(norm(d)) - head(norm(0))`, so the norm's weight counts and its bias does not. The final norm gives every direction
    one length: values compare tokens, not directions. What later layers make of a direction is not asked.
    """
    rows = directions.detach().float()
    if rows.ndim != 2 or rows.shape[1] != model.anatomy.hidden or count < 1:
        raise UserError(
            f"directions {tuple(rows.shape)} for a model of width {model.anatomy.hidden}: give (rows, hidden)"
        )
    network = model.model
    norm, head = module_at(network, model.anatomy.norm), module_at(network, model.anatomy.head)
    kind = next(network.parameters()).dtype
    nothing = head(norm(torch.zeros(1, rows.shape[1], device=model.device, dtype=kind))).float()
    count = min(count, nothing.shape[1], len(model.tokenizer))
    parts = []
    for part in torch.split(rows, max(1, _CHUNK // nothing.shape[1])):
        change = (head(norm(part.to(model.device, kind))).float() - nothing)[:, : len(model.tokenizer)]
        up, down = change.topk(count), change.topk(count, largest=False)
        parts.append((up.indices.cpu(), up.values.cpu(), down.indices.cpu(), down.values.cpu()))
    return Words(*(torch.cat(one) for one in zip(*parts, strict=True)))


def highlighted(example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    """The example as HTML: each token shaded by the feature's activation, the strongest token underlined."""
    most = max(*example.activations, 1e-9)
    pieces = []
    for place, (number, value) in enumerate(zip(example.token_ids, example.activations, strict=True)):
        text = html.escape(str(tokenizer.decode([number]))).replace("\n", "&#8629;")
        style = f"background: rgba(255, 150, 0, {max(value, 0.0) / most:.2f})"
        if place == example.center:
            style += "; text-decoration: underline"
        pieces.append(f'<span style="{style}">{text}</span>' if value > 0 or place == example.center else text)
    return f'<div style="white-space: pre-wrap"><code>{example.value:6.2f}</code> {"".join(pieces)}</div>'


def _best(code: SparseCode, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, features and values of at most `count` positive matches a feature, by feature, the strongest first."""
    values, features, rows = code.values.detach().float().cpu(), code.indices.cpu(), code.token_ids().cpu()
    order = values.argsort(descending=True, stable=True)
    order = order[values[order] > 0]
    order = order[features[order].argsort(stable=True)]
    owner = features[order]
    order = order[torch.arange(len(owner)) - _first_of_run(owner) < count]
    return rows[order], features[order], values[order]


def _first_of_run(owners: Tensor) -> Tensor:
    """For sorted owners, where the run of each begins."""
    return torch.searchsorted(owners, owners)


def _values_at(code: SparseCode, places: Tensor, features: Tensor) -> Tensor:
    """(matches, width): the code at tokens `places` of each match's own feature; 0 where there is none."""
    keys = (code.token_ids() * code.features + code.indices).cpu()
    sought = places * code.features + features.unsqueeze(1)
    at = torch.searchsorted(keys, sought).clamp(max=max(len(keys) - 1, 0))
    if not len(keys):
        return torch.zeros(sought.shape)
    return torch.where(keys[at] == sought, code.values.detach().float().cpu()[at], 0.0)
