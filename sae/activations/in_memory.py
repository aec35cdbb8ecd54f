"""What is at hand as a source: tensors as a stream of shuffled batches, rows as documents. For notebooks and `sae.train`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lm.anatomy import Site
from lm.data.rows import Row
from lm.errors import UserError
from lm.model import LanguageModel
from sae.activations.batch import ActivationBatch, ActivationStream, State, permutation, site_name
from sae.activations.sources import Format, NoSource, Source, Texts, joined
from sae.activations.stream_state import require_same

Activations: TypeAlias = Source | ActivationStream | Tensor | Mapping[Site, Tensor] | Sequence[str] | Sequence[Row]
"""Documents or rows at hand, tensors at hand, a source that a config could name, or a stream."""


class ActivationsInMemory(Iterator[ActivationBatch]):
    """A stream (`ActivationStream`) of shuffled batches of tensors; endless, float32, on the tensors' device.

    All tokens in an order of each epoch's own, one epoch after the other, are cut into global batches; so the state is the
    number of batches.

    Args:
        by_site: (tokens, hidden) of each site, the same tokens in each.
        batch_tokens: tokens of the global batch.
        rank, world: this process among those that share the batch.
        seed: of the orders.
    """

    def __init__(
        self, by_site: Mapping[Site, Tensor], *, batch_tokens: int, rank: int = 0, world: int = 1, seed: int = 0
    ) -> None:
        shapes = {tuple(values.shape) for values in by_site.values()}
        if len(shapes) != 1 or len(shape := shapes.pop()) != 2 or not shape[0]:
            shown = ", ".join(f"{site} {tuple(values.shape)}" for site, values in by_site.items()) or "no site"
            raise UserError(f"activations of {shown}: give (tokens, hidden), of one shape for every site")
        if batch_tokens < 1 or not 0 <= rank < world:
            raise UserError(f"batches of {batch_tokens} tokens for process {rank} of {world} cannot be: check them")
        self.sites, self.batch_tokens = tuple(by_site), batch_tokens
        self.tokens, self.hidden = shape
        self.rank, self.world, self.seed, self.batches = rank, world, seed, 0
        unknown = torch.full((self.tokens,), -1, dtype=torch.int64)
        self._all = ActivationBatch(dict(by_site), unknown, unknown, unknown)

    def __next__(self) -> ActivationBatch:
        start = self.batches * self.batch_tokens
        numbers = torch.arange(start, start + self.batch_tokens)[self.rank :: self.world]
        epochs = numbers // self.tokens
        rows = [
            permutation(self.tokens, "memory", self.seed, epoch)[numbers[epochs == epoch] % self.tokens]
            for epoch in sorted(set(epochs.tolist()))
        ]
        self.batches += 1
        return self._all.select(torch.cat(rows)).to(dtype=torch.float32)

    @property
    def rounds(self) -> float:
        """How often all tokens were read so far."""
        return self.batches * self.batch_tokens / self.tokens

    def facts(self) -> dict[str, Any]:
        """How many tokens there are, and at which sites."""
        return {"source": {"kind": type(self).__name__, "tokens": self.tokens}, **self._settings()}

    def _settings(self) -> dict[str, Any]:
        return {
            "sites": [site_name(site) for site in self.sites],
            "tokens": self.tokens,
            "batch_tokens": self.batch_tokens,
            "seed": self.seed,
        }

    def state_dict(self) -> State:
        """How many batches were served: the same for every process, whatever their number."""
        return {"facts": {"batches": self.batches, "settings": self._settings()}, "tensors": {}}

    def load_state_dict(self, state: State) -> None:
        """Go on from there. UserError for a state of other tensors or batches."""
        require_same(state["facts"].get("settings", {}), self._settings())
        self.batches = int(state["facts"]["batches"])


def texts_of(documents: Sequence[str | Row], tokenizer: PreTrainedTokenizerBase, form: Format = "raw") -> Texts:
    """Documents at hand as a source: a text as it stands, a row as its prompt with its output, as a model is trained on it."""
    texts = [
        document if isinstance(document, str) else joined([(document.input, document.output)], form, tokenizer)[0]
        for document in documents
    ]
    return Texts(texts=tuple(texts))


def as_source(
    activations: Activations, sites: Sequence[Site], model: LanguageModel | None
) -> Source | ActivationStream | Mapping[Site, Tensor]:
    """Documents as a source, a tensor with its site; the rest as it is. Refuses what is none of them."""
    if isinstance(activations, NoSource):
        raise UserError("the source is NoSource: there would be nothing to train on; name one")
    if isinstance(activations, Tensor):
        if len(sites) > 1:
            raise UserError(f"one tensor for {len(sites)} sites: give a dict, site -> (tokens, hidden)")
        return {(sites or (Site("resid", 0),))[0]: activations}
    if isinstance(activations, Source | Mapping | ActivationStream):
        return activations
    documents = (
        [item for item in activations if isinstance(item, str | Row)] if not isinstance(activations, str) else []
    )
    if not documents or len(documents) < len(activations):
        raise UserError(
            f"{type(activations).__name__} is no source of activations: give a list of texts or rows, a tensor, or one of "
            "sae.activations"
        )
    if model is None:
        raise UserError(f"{len(documents)} documents without a language model: give model=, which reads them")
    return texts_of(documents, model.tokenizer)
