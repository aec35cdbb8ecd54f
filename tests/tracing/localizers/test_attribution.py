"""Attribution patching: exact where the model is linear, a derivative everywhere, tracing itself where every cell is verified."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from families import set_module
from families import tiny as tiny_family
from tiny_tracing import known, tiny
from torch import Tensor, nn

from lm import Edit, Site, UserError, capture, patch
from lm.anatomy import Kind
from lm.model import LanguageModel
from lm.prompts import PromptSpec
from tracing import AttributionPatching, CausalTracing, Fact, GaussianNoise
from tracing.engine.estimate import attended_row_bytes, gradient_row_bytes
from tracing.engine.reference import trace_fact
from tracing.localizers.attribution import attribute, attribute_fact
from tracing.question.encoded_fact import EncodedFact, encode_fact, forward
from tracing.question.metrics import read_off
from tracing.question.sweep import Sweep
from tracing.question.target import Target

NOISE = GaussianNoise(samples=3, sigma=0.5)
FACT = Fact("Where was Anna Kowalska born?", "Anna Kowalska", "in 1984", foil="at 12")
KINDS: tuple[Kind, ...] = ("resid", "mlp", "attn")
DIFFERENT = ("llama", "olmo2", "gemma2", "gpt2", "gpt_neox")
"""Grouped queries, norms after modules, capped scores, learned positions, parallel blocks."""


def asked(model: LanguageModel, metric: Any = "log_probability") -> tuple[EncodedFact, Tensor]:
    encoded = encode_fact(model, FACT, PromptSpec(), metric)
    return encoded, NOISE.bind(model, [encoded]).batch(encoded)


def linear(layers: int = 3) -> LanguageModel:
    """A model that is linear in its embeddings: no norms, MLPs of one matrix, attention that looks at all tokens alike."""
    model = tiny_family("llama", dtype=torch.float64, num_hidden_layers=layers)
    set_module(model.model, "model.norm", nn.Identity())
    for layer in range(layers):
        block = f"model.layers.{layer}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            set_module(model.model, f"{block}.{name}", nn.Identity())
        single = nn.Linear(model.anatomy.hidden, model.anatomy.hidden, dtype=torch.float64)
        nn.init.normal_(single.weight, std=0.2, generator=torch.Generator().manual_seed(layer))
        set_module(model.model, f"{block}.mlp", single)
        for name in ("q_proj", "k_proj"):
            nn.init.zeros_(model.model.get_submodule(f"{block}.self_attn.{name}").weight)  # type: ignore[arg-type]
    return model


def test_attribution_is_exact_where_everything_is_linear() -> None:
    model = linear()
    encoded, batch = asked(model, "logit_difference")
    found = attribute_fact(model, encoded, batch, KINDS, "logit_difference")
    exact = trace_fact(model, encoded, batch, Sweep(kinds=KINDS, metric="logit_difference"))
    assert found.clean == pytest.approx(exact.clean)
    assert found.corrupted == pytest.approx(exact.corrupted)
    for kind in KINDS:
        assert np.ptp(exact.restored[kind]) > 1e-2
        np.testing.assert_allclose(found.restored[kind], exact.restored[kind], rtol=0, atol=1e-10)


@pytest.mark.parametrize("graddrop", [False, True])
def test_no_pass_of_an_attribution_holds_more_rows_than_the_memory_allows(
    monkeypatch: pytest.MonkeyPatch, graddrop: bool
) -> None:
    model = tiny("llama", dtype=torch.float64)
    facts, noise = known(model, how_many=1), GaussianNoise(samples=7)
    encoded = encode_fact(model, facts[0], PromptSpec(), "log_probability")
    sizes = len(encoded.input_ids), len(encoded.answer_ids)
    rows: list[int] = []

    def counted(given: LanguageModel, embeddings: Tensor, keep: int) -> Tensor:
        rows.append(len(embeddings))
        return forward(given, embeddings, keep)

    def at_most() -> int:
        most = max(rows)
        rows.clear()
        return most

    monkeypatch.setattr("tracing.localizers.attribution.forward", counted)
    monkeypatch.setattr("tracing.localizers.query_key.forward", counted)
    found, nodes = {}, {}
    for allowed in (7, 3, 1):
        memory = (allowed + 0.5) * gradient_row_bytes(model, *sizes) / 1e9
        found[allowed] = attribute(model, facts, noise, graddrop=graddrop, memory=memory, progress=False)
        assert at_most() == allowed
        memory = (allowed + 0.5) * attended_row_bytes(model, *sizes) / 1e9
        way = AttributionPatching(corruption=noise, verify=0, chance=0, queries_and_keys=True, memory=memory)
        nodes[allowed] = way.localize(model, facts, progress=False).details["queries_and_keys"]
        assert at_most() == allowed
    attribute(model, facts, noise, memory=1e-9, progress=False)
    assert at_most() == 1
    for allowed in (3, 1):
        for kind in found[7].kinds:
            np.testing.assert_allclose(found[allowed].restored[kind], found[7].restored[kind], rtol=0, atol=1e-10)
        assert nodes[allowed]["error"] == pytest.approx(nodes[7]["error"], abs=1e-10)


@torch.no_grad()
def slope(model: LanguageModel, encoded: EncodedFact, batch: Tensor, kind: Kind, token: int, layer: int) -> float:
    """By how much the score begins to rise as a cell moves from its corrupted to its clean value: central differences of two
    widths, of which the error of the second order is taken out. (Norms that compute in float32 forbid tiny steps.)"""
    site, keep, target = Site(kind, layer), len(encoded.answer_ids), Target.of([encoded], len(batch) - 1)
    with capture(model, [site], positions=[token]) as seen:
        forward(model, batch[:1], keep)
    clean = seen[site]

    def score(step: float) -> float:
        move = Edit(site=site, value=lambda old: old + step * (clean - old), positions=[token])
        with patch(model, [move], allow_unchanged=True):  # a parallel block's MLP does not see what attention brings
            return float(read_off(forward(model, batch[1:], keep), target, "log_probability").mean())

    wide, narrow = ((score(step) - score(-step)) / (2 * step) for step in (0.02, 0.01))
    return (4 * narrow - wide) / 3


@pytest.mark.parametrize("name", DIFFERENT)
def test_every_cell_is_the_slope_towards_its_clean_value(name: str) -> None:
    model = tiny_family(name, dtype=torch.float64)
    encoded, batch = asked(model)
    found = attribute_fact(model, encoded, batch, KINDS, "log_probability")
    cells = [(kind, token, layer) for kind, token, layer in product(KINDS, (2, 3, 5), (0, 2))]
    expected = [slope(model, encoded, batch, *cell) for cell in cells]
    got = [found.restored[kind][token, layer] - found.corrupted for kind, token, layer in cells]
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)
    assert np.ptp(expected) > 1e-2
    assert all((found.restored[kind][: encoded.span[0]] == found.corrupted).all() for kind in KINDS)


@pytest.mark.parametrize("name", ["olmo2", "gpt_neox"])
def test_graddrop_is_the_mean_size_with_each_other_layer_cut_out(name: str) -> None:
    model = tiny_family(name, dtype=torch.float64)
    encoded, batch = asked(model)
    kinds, keep = ("mlp", "attn"), len(encoded.answer_ids)
    sites = [Site(kind, layer) for kind in kinds for layer in range(3)]
    found = attribute_fact(model, encoded, batch, kinds, "log_probability", graddrop=True)
    with torch.no_grad(), capture(model, sites) as clean:
        forward(model, batch[:1], keep)
    sizes: dict[Site, list[Tensor]] = {site: [] for site in sites}
    for dropped in range(3):
        cut = [Edit(site=Site(kind, dropped), value=lambda old: old.detach()) for kind in ("mlp", "attn")]
        with capture(model, sites, detach=False) as seen, patch(model, cut, allow_unchanged=True):
            scores = read_off(forward(model, batch[1:], keep), Target.of([encoded], 3), "log_probability")
        others = [site for site in sites if site.layer != dropped]
        gradients = torch.autograd.grad(scores.sum(), [seen[site] for site in others])
        for site, gradient in zip(others, gradients, strict=True):
            step = clean[site] - seen[site].detach()
            sizes[site].append((step * gradient).sum(2).mean(0).abs())
    for site, parts in sizes.items():
        expected = torch.stack(parts).sum(0) / 2
        expected[: encoded.span[0]] = 0
        got = found.restored[site.kind][:, site.layer] - found.corrupted
        np.testing.assert_allclose(got, expected[: len(encoded.prompt_ids)].numpy(), rtol=0, atol=1e-10)
        assert got.max() > 1e-3
    single = tiny_family(name, dtype=torch.float64, num_hidden_layers=1)
    encoded, batch = asked(single)
    plain, alone = (
        attribute_fact(single, encoded, batch, ["mlp"], "probability", graddrop=drop) for drop in (False, True)
    )
    np.testing.assert_allclose(
        np.abs(plain.restored["mlp"] - plain.corrupted), alone.restored["mlp"] - alone.corrupted, rtol=0, atol=1e-15
    )


def test_samples_in_parts_and_gradients_of_others_make_no_difference() -> None:
    model = tiny("olmo2")
    facts = known(model)
    encoded = encode_fact(model, facts[0], PromptSpec(), "probability")
    batch = NOISE.bind(model, [encoded]).batch(encoded)
    for parameter in model.model.parameters():
        parameter.requires_grad_(False)
    marker = torch.ones(1)
    weight = next(model.model.parameters())
    weight.grad = marker.expand_as(weight).clone()
    whole = attribute_fact(model, encoded, batch, KINDS, "probability", rows=64)
    parts = attribute_fact(model, encoded, batch, KINDS, "probability", rows=2)
    for kind in KINDS:
        np.testing.assert_allclose(whole.restored[kind], parts.restored[kind], rtol=1e-5, atol=1e-8)
    assert bool((weight.grad == 1).all())
    assert not any(parameter.requires_grad for parameter in model.model.parameters())


@pytest.mark.parametrize("family", ["olmo2", "llama", "gpt2"])
def test_with_every_cell_verified_it_is_causal_tracing(family: str) -> None:
    model = tiny(family, dtype=torch.float64)
    facts = known(model)
    exact = CausalTracing(corruption=NOISE, positions="all").localize(model, facts, progress=False)
    verified = AttributionPatching(corruption=NOISE, verify=10**6).localize(model, facts, progress=False)
    few = AttributionPatching(corruption=NOISE, verify=5, chance=0).localize(model, facts, progress=False)
    plain = AttributionPatching(corruption=NOISE, verify=0, chance=0).localize(model, facts, progress=False)
    for kind in ("mlp", "attn"):
        np.testing.assert_allclose(verified.of(kind), exact.of(kind), rtol=0, atol=1e-9)
        assert np.abs(plain.of(kind) - exact.of(kind)).max() > 1e-3
        assert plain.mean(kind).tolist() == few.details["estimated"][kind]
    assert not np.array_equal(few.of("mlp"), plain.of("mlp"))
    assert verified.facts == tuple(facts)
    assert verified.details["verification"]["sentence"].startswith("3 facts; every cell was computed")
    assert "verification" not in plain.details
    assert verified.total is not None
    assert verified.source == "attribution patching (GaussianNoise)"


def test_graddrop_scores_are_sizes_also_where_they_were_verified() -> None:
    model = tiny("llama")
    facts = known(model)
    asked = AttributionPatching(corruption=NOISE, graddrop=True, verify=8, chance=4)
    found = asked.localize(model, facts, progress=False)
    assert all((found.of(kind) >= 0).all() for kind in found.kinds)
    assert found.details["verification"]["sign_agreement"] == {"top": None, "random": None}
    assert "GradDrop" in found.source
    assert not np.array_equal(
        found.of("mlp"), replace(asked, verify=0).localize(model, facts, progress=False).of("mlp")
    )


def test_estimates_have_the_shape_of_a_trace() -> None:
    model = tiny("olmo")
    facts = known(model)
    unknown = replace(facts[0], answer="w30 w31 w32", id="unknown")
    effects = attribute(model, [*facts, unknown], NOISE, progress=False)
    assert [one.fact.id for one in effects.skipped] == ["unknown"]
    assert effects.provenance["engine"] == "attribution"
    assert [cells.shape for cells in effects.restored["mlp"]] == [(len(tokens), 4) for tokens in effects.tokens]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metric": "reciprocal_rank"}, "reciprocal_rank has no gradient"),
        ({"verify": -1}, "verify is -1"),
        ({"chance": -1}, "chance is -1"),
        ({"matters": 0.0}, "matters is 0.0"),
        ({"memory": float("nan")}, "memory is nan"),
        ({"kinds": ("heads",)}, "kinds"),
        ({"roles": ("lst",)}, "lst"),
    ],
)
def test_impossible_settings_are_refused_at_once(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        AttributionPatching(**settings)


def test_nothing_to_attribute_is_refused() -> None:
    with pytest.raises(UserError, match="no facts to attribute"):
        attribute(tiny("olmo"), [], progress=False)
    with pytest.raises(UserError, match="memory is 0"):
        attribute(tiny("olmo"), known(tiny("olmo")), memory=0, progress=False)
