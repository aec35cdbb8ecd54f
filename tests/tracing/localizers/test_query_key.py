"""Queries and keys: attention seen from inside is the model's own, and the softmax's change is computed exactly."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, RECURRENT, ids, set_module
from families import tiny as tiny_family
from tiny_tracing import known, tiny
from torch import Tensor, nn

from lm import UserError
from lm.anatomy import Site
from lm.model import LanguageModel
from lm.prompts import PromptSpec
from tracing import AttributionPatching, Fact, GaussianNoise
from tracing.localizers.attention import Attended, watched
from tracing.localizers.query_key import Part, attention_nodes, changed_columns, changed_rows, exact_node, summary
from tracing.question.encoded_fact import EncodedFact, encode_fact

NOISE = GaussianNoise(samples=3, sigma=0.5)
FACT = Fact("Where was Anna Kowalska born?", "Anna Kowalska", "in 1984", foil="at 12")


REFUSED = {
    **dict.fromkeys(RECURRENT, "layer 0 of .* keeps one state in place of keys"),
    **dict.fromkeys(
        ("gptj", "gpt_neo", "bloom", "falcon", "falcon_multi_query", "falcon_alibi", "mpt"), "cannot be replaced"
    ),
    "gpt_oss": "has s_aux in its attention",
}


def asked(model: LanguageModel, metric: Any = "log_probability") -> tuple[EncodedFact, Tensor]:
    encoded = encode_fact(model, FACT, PromptSpec(), metric)
    return encoded, NOISE.bind(model, [encoded]).batch(encoded)


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_watched_attention_is_the_model_s_own(name: str) -> None:
    model = tiny_family(name)
    if reason := REFUSED.get(name):
        before, expected = model.model.config._attn_implementation, model.model(ids()).logits
        with pytest.raises(UserError, match=reason), watched(model):
            model.model(ids())
        assert model.model.config._attn_implementation == before
        assert torch.equal(model.model(ids()).logits, expected)
        return
    before = model.model.config._attn_implementation
    tokens = ids(2, 12)  # longer than the sliding window
    expected = model.model(tokens).logits
    with watched(model) as seen:
        found = model.model(tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for layer in range(3):
        one = seen[layer]
        assert one.probabilities.shape == (2, 4, 12, 12)
        torch.testing.assert_close(one.probabilities.sum(-1), torch.ones(2, 4, 12))
        assert float(one.probabilities.triu(1).abs().max()) == 0.0
    assert model.model.config._attn_implementation == before
    assert torch.equal(model.model(tokens).logits, expected)


@torch.no_grad()
def test_other_queries_are_used_and_mistakes_leave_the_model_as_it_was() -> None:
    model = tiny("llama")
    tokens = torch.tensor([[7, 8, 9, 10]])
    plain = model.model(tokens).logits
    with watched(model, lambda layer, query, key: (query * (1 + (layer == 2)), key)):
        changed = model.model(tokens).logits
    assert not torch.allclose(changed, plain)
    with pytest.raises(RuntimeError, match="stop"), watched(model):
        raise RuntimeError("stop")
    assert torch.equal(model.model(tokens).logits, plain)
    with watched(model) as seen, pytest.raises(UserError, match="layer 1 was not reached"):
        seen[1]


def attended(size: float, softcap: float | None, seed: int = 0) -> tuple[Attended, Tensor, Tensor]:
    """Made-up attention of two rows, four heads on two key heads and five tokens; another query and another key."""
    generator = torch.Generator().manual_seed(seed)
    query, other_query = size * torch.randn(2, 2, 4, 5, 3, generator=generator, dtype=torch.float64)
    key, other_key = torch.randn(2, 2, 2, 5, 3, generator=generator, dtype=torch.float64)
    mask = torch.full((1, 1, 5, 5), torch.finfo(torch.float64).min, dtype=torch.float64).triu(1)
    blank = Attended(query=query, key=key, probabilities=query, mask=mask, scaling=0.7, softcap=softcap)
    probabilities = (blank.scores(query, key) + mask).softmax(-1)
    seen = Attended(query=query, key=key, probabilities=probabilities, mask=mask, scaling=0.7, softcap=softcap)
    return seen, other_query, other_key


@pytest.mark.parametrize(("size", "softcap"), [(1.0, None), (3.0, 2.0), (40.0, None)])
def test_the_change_of_rows_and_columns_is_that_of_the_softmax_computed_anew(
    size: float, softcap: float | None
) -> None:
    seen, query, key = attended(size, softcap)
    assert seen.mask is not None
    gradient = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    step = seen.scores(seen.query, key) - seen.scores(seen.query, seen.key)
    rows, columns = changed_rows(seen, query, gradient), changed_columns(seen.probabilities, step, gradient)
    for token in range(5):
        for part, found in (("query", rows), ("key", columns)):
            new_query, new_key = seen.query.clone(), seen.key.clone()
            (new_query if part == "query" else new_key)[:, :, token] = (query if part == "query" else key)[:, :, token]
            changed = (seen.scores(new_query, new_key) + seen.mask).softmax(-1)
            expected = ((changed - seen.probabilities) * gradient).sum((1, 2, 3))
            torch.testing.assert_close(found[:, token], expected, rtol=1e-9, atol=1e-12)
    assert float(rows.abs().max()) > 0.01
    assert float(columns.abs().max()) > 0.01


class Zero(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return torch.zeros_like(hidden)


def linear_after_the_last_attention(name: str) -> LanguageModel:
    """A model in which nothing after the last layer's attention probabilities bends: no MLP there, no norm, no cap."""
    model = tiny_family(name, dtype=torch.float64)
    last = model.anatomy.block_path(2)
    set_module(model.model, model.anatomy.norm, nn.Identity())
    set_module(model.model, f"{last}.{model.anatomy.names.mlp}", Zero())
    if model.anatomy.names.attn_out.endswith("layernorm"):
        set_module(model.model, model.anatomy.module_path(Site("attn", 2)), nn.Identity())
    if getattr(model.model.config, "final_logit_softcapping", None):
        model.model.config.final_logit_softcapping = None
    return model


@pytest.mark.parametrize("name", ["llama", "olmo2", "gemma2", "gpt2", "qwen3"])
def test_the_correction_is_exact_where_only_the_softmax_bends(name: str) -> None:
    model = linear_after_the_last_attention(name)
    encoded, batch = asked(model, "logit_difference")
    nodes = attention_nodes(model, encoded, batch, "logit_difference")
    parts: tuple[tuple[Part, Any, Any], ...] = (
        ("query", nodes.query, nodes.query_corrected),
        ("key", nodes.key, nodes.key_corrected),
    )
    for part, plain, corrected in parts:
        exact = [exact_node(model, encoded, batch, "logit_difference", part, token, 2) for token in range(2, 6)]
        assert np.ptp(exact) > 1e-4
        np.testing.assert_allclose(corrected[2:, 2], exact, rtol=1e-5, atol=1e-7)
        assert np.abs(plain[2:, 2] - exact).max() > 1e-3 * np.ptp(exact)
        assert (plain[:2] == 0).all()
        assert (corrected[:2] == 0).all()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_where_attention_is_saturated_only_the_correction_sees_the_effect(name: str) -> None:
    model = linear_after_the_last_attention(name)
    parameters = dict(model.model.named_parameters())
    with torch.no_grad():
        for path in ("model.layers.2.self_attn.q_proj.weight", "transformer.h.2.attn.c_attn.weight"):
            if path in parameters:
                weight = parameters[path]
                weight[..., : weight.shape[-1] // (3 if "c_attn" in path else 1)] *= 300
    encoded, batch = asked(model, "logit_difference")
    nodes = attention_nodes(model, encoded, batch, "logit_difference")
    exact = exact_node(model, encoded, batch, "logit_difference", "query", 5, 2)
    assert abs(exact) > 1e-3
    assert nodes.query_corrected[5, 2] == pytest.approx(exact, rel=1e-6)
    assert abs(nodes.query[5, 2] - exact) > 0.9 * abs(exact)


def test_parts_of_the_samples_add_up() -> None:
    model = tiny_family("olmo2")
    encoded, batch = asked(model)
    whole, parts = (attention_nodes(model, encoded, batch, "log_probability", rows=rows) for rows in (64, 2))
    np.testing.assert_allclose(whole.key_corrected, parts.key_corrected, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(whole.query, parts.query, rtol=1e-4, atol=1e-7)


def test_the_localizer_tells_of_queries_and_keys_in_its_details() -> None:
    model = tiny("llama")
    facts = known(model)
    asked = AttributionPatching(corruption=NOISE, verify=2, chance=2, queries_and_keys=True)
    told = asked.localize(model, facts, progress=False).details["queries_and_keys"]
    assert set(told["by_role"]) == {"query", "query_corrected", "key", "key_corrected"}
    assert "before" not in told["by_role"]["key"]
    encoded = encode_fact(model, facts[0], PromptSpec(), "log_probability")
    corruptor = NOISE.bind(model, [encoded])
    alone = summary(model, [encoded], corruptor, "log_probability")
    nodes = attention_nodes(model, encoded, corruptor.batch(encoded), "log_probability")
    np.testing.assert_allclose(alone["by_role"]["key"]["last_subject"], nodes.key[encoded.span[1] - 1])
    label, part, token, layer, _, corrected, exact = alone["checked"][-1]
    assert (label, part) == ("fact0", "key")
    assert corrected == nodes.key_corrected[token, layer]
    expected = exact_node(model, encoded, corruptor.batch(encoded), "log_probability", "key", token, layer)
    assert exact == pytest.approx(expected)
    assert alone["error"]["corrected"] == pytest.approx(np.mean([abs(row[5] - row[6]) for row in alone["checked"]]))
