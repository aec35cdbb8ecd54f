"""What a feature means: top examples equal a dense search, contexts stop where they should, and the lens is the head's."""

from __future__ import annotations

import pytest
import torch
from families import tiny

from lm import Site, UserError, capture
from sae import SparseCode
from sae.activations import ActivationBatch
from sae.features import Example, Examples, highlighted, logit_lens

FEATURES, TOKENS = 6, 120


def stream(seed: int = 0) -> tuple[torch.Tensor, ActivationBatch]:
    """A dense code with many ties, and where its tokens stand: documents of 7, every fifth position masked away."""
    make = torch.Generator().manual_seed(seed)
    dense = torch.randint(1, 40, (TOKENS, FEATURES), generator=make) * (
        torch.rand(TOKENS, FEATURES, generator=make) < 0.3
    )
    dense[:, 5] = 0
    places = torch.tensor([(d, p) for d in range(40) for p in range(7) if p != 4])[:TOKENS]
    ids = torch.randint(0, 1000, (TOKENS,), generator=make)
    return dense.float(), ActivationBatch({Site("resid", 0): torch.zeros(TOKENS, 2)}, ids, *places.T.contiguous())


def filled(dense: torch.Tensor, batch: ActivationBatch, parts: int, **sizes: int) -> Examples:
    examples = Examples.start(FEATURES, **sizes)
    for rows in torch.arange(TOKENS).chunk(parts):
        examples = examples.update(SparseCode.from_dense(dense[rows]), batch.select(rows))
    return examples


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_the_strongest_examples_are_those_of_a_dense_search(parts: int) -> None:
    dense, batch = stream()
    examples = filled(dense, batch, parts, count=4, window=2)
    for feature in range(FEATURES):
        order = dense[:, feature].argsort(descending=True, stable=True)[:4]
        order = order[dense[order, feature] > 0]
        found = examples.of(feature)
        assert [one.value for one in found] == dense[order, feature].tolist()
        assert [one.document for one in found] == batch.documents[order].tolist()
        assert [one.position for one in found] == batch.positions[order].tolist()
        assert [one.token_ids[one.center] for one in found] == batch.token_ids[order].tolist()
        assert [one.activations[one.center] for one in found] == [one.value for one in found]
    assert examples.of(5) == []


def test_a_context_holds_the_neighbors_of_its_document_and_their_activations() -> None:
    dense, batch = stream()
    where = {
        (d, p): row for row, (d, p) in enumerate(zip(batch.documents.tolist(), batch.positions.tolist(), strict=True))
    }
    seen = 0
    for feature in range(FEATURES):
        for example in filled(dense, batch, 1, count=30, window=3).of(feature):
            span = [example.position]
            while len(span) < 4 and (example.document, span[0] - 1) in where:
                span.insert(0, span[0] - 1)
            assert example.center == len(span) - 1
            while span[-1] < example.position + 3 and (example.document, span[-1] + 1) in where:
                span.append(span[-1] + 1)
            rows = [where[example.document, position] for position in span]
            assert list(example.token_ids) == batch.token_ids[rows].tolist()
            assert list(example.activations) == dense[rows, feature].tolist()
            seen += 1
    assert seen > 50


def test_merging_two_streams_is_seeing_both() -> None:
    (one, first), (two, second) = stream(), stream(1)
    both = filled(one, first, 1, count=5).update(SparseCode.from_dense(two), second)
    merged = filled(one, first, 1, count=5).merge(filled(two, second, 3, count=5, window=12))
    for feature in range(FEATURES):
        assert [e.value for e in both.of(feature)] == [e.value for e in merged.of(feature)]
        assert [e.document for e in both.of(feature)] == [e.document for e in merged.of(feature)]
    with pytest.raises(UserError, match="cannot be merged"):
        merged.merge(Examples.start(FEATURES, count=4))
    with pytest.raises(UserError, match="belong together"):
        merged.update(SparseCode.from_dense(one[:5]), first)


@pytest.mark.parametrize("family", ["llama", "gpt2", "olmo", "gemma2"])
def test_the_lens_is_what_the_final_norm_and_head_make_of_a_direction(family: str) -> None:
    model = tiny(family)
    hidden, vocabulary = model.anatomy.hidden, len(model.tokenizer)
    directions = torch.randn(5, hidden, generator=torch.Generator().manual_seed(0))
    words = logit_lens(model, directions, count=7)
    head, norm = model.model.get_output_embeddings(), model.model.get_submodule(model.anatomy.norm)
    spread = directions - directions.mean(1, keepdim=True) if family in ("gpt2", "olmo") else directions
    unit = spread * (hidden / spread.square().sum(1, keepdim=True)).sqrt()
    weight = getattr(norm, "weight", None)
    gain = torch.ones(hidden) if weight is None else weight + (1 if family == "gemma2" else 0)
    due = ((unit * gain) @ head.weight.T)[:, :vocabulary]
    assert torch.allclose(words.up_by, due.topk(7).values, rtol=1e-3, atol=1e-4)
    assert torch.equal(words.up, due.topk(7).indices)
    assert torch.equal(words.down, due.topk(7, largest=False).indices)
    again = logit_lens(model, 100 * directions, count=7)
    assert torch.equal(again.up, words.up)
    with pytest.raises(UserError, match=r"give \(rows, hidden"):
        logit_lens(model, directions[:, 1:])


def test_the_lens_of_the_last_stream_is_the_models_own_guess() -> None:
    model = tiny("llama")
    ids = torch.arange(3, 12).unsqueeze(0)
    last = Site("resid", model.anatomy.layers - 1)
    with torch.no_grad(), capture(model, [last]) as seen:
        logits = model.model(ids).logits[0]
    assert torch.equal(logit_lens(model, seen[last][0], count=1).up[:, 0], logits[:, : len(model.tokenizer)].argmax(1))


def test_highlighting_escapes_and_shades() -> None:
    tokenizer = tiny("llama").tokenizer
    ids = tokenizer.encode("a<b", add_special_tokens=False)
    activations = tuple(2.0 if place == 1 else 0.0 for place in range(len(ids)))
    shown = highlighted(Example(2.0, 0, 1, tuple(ids), activations, 1), tokenizer)
    assert "&lt;" in shown
    assert shown.count("<span") == 1
    assert "rgba(255, 150, 0, 1.00)" in shown
