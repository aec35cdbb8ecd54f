"""Fact lookup: what the head reads last is what the model says, and a planted fact becomes readable where it is."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES
from families import tiny as tiny_family
from sklearn.linear_model import Ridge
from tiny_tracing import LAYERS, known, tiny

from lm import UserError
from lm.model import LanguageModel
from lm.prompts import PromptSpec
from tracing import Fact, FactLookup
from tracing.localizers.fact_lookup import streams
from tracing.localizers.readout import folds_of, linear_probe, logit_lens, usable
from tracing.question.encoded_fact import embed, encode_fact, forward
from tracing.question.metrics import read_off
from tracing.question.target import Target

FACT = Fact("Where was Anna Kowalska born?", "Anna Kowalska", "in 1984")


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_the_lens_on_the_last_stream_is_the_model_itself(name: str) -> None:
    model = tiny_family(name)
    encoded = encode_fact(model, FACT, PromptSpec(), "log_probability")
    keep = len(encoded.answer_ids)
    says = range(len(encoded.prompt_ids) - 1, len(encoded.input_ids))
    states = streams(model, encoded, list(says))
    assert states.shape == (7, keep, 32)
    found = logit_lens(model, encoded, states, "log_probability")
    own = read_off(
        forward(model, embed(model, encoded.input_ids)[None], keep), Target.of([encoded], 1), "log_probability"
    )
    assert found[-1] == pytest.approx(float(own), rel=1e-4)
    assert np.ptp(found) > 0.1
    alone = streams(model, encoded, [3])
    assert alone.shape == (7, 1, 32)
    assert not torch.allclose(alone[1], alone[0])
    logits = model.model.get_output_embeddings()(model.model.get_submodule(model.anatomy.norm)(alone[4, 0]))
    config = model.model.config
    logits = logits * (getattr(config, "logit_scale", None) or 1.0) / getattr(config, "logits_scaling", 1.0)
    if cap := getattr(model.model.config, "final_logit_softcapping", None):
        logits = cap * torch.tanh(logits / cap)
    expected = float(logits.float().log_softmax(-1)[list(encoded.answer_ids)].sum())
    assert logit_lens(model, encoded, alone, "log_probability")[4] == pytest.approx(expected, rel=1e-4)


def test_rises_add_up_to_the_curve() -> None:
    model = tiny("olmo2")
    facts = known(model)
    for position in ("last", "last_subject"):
        found = FactLookup(position=position).localize(model, facts, progress=False)
        curve = np.array(found.details["curve"])
        assert len(curve) == LAYERS + 1
        np.testing.assert_allclose(found.mean("resid"), np.diff(curve), atol=1e-9)
        np.testing.assert_allclose(found.of("mlp") + found.of("attn"), found.of("resid"), atol=1e-9)
        assert found.total is None
    encoded = encode_fact(model, facts[0], PromptSpec(), "log_probability")
    last = len(encoded.prompt_ids) - 1
    curves = logit_lens(model, encoded, streams(model, encoded, [last, last + 1]), "log_probability")
    at_last = FactLookup(position="last").localize(model, facts[:1], progress=False)
    assert at_last.of("mlp")[0, 1] == pytest.approx(curves[4] - curves[3])
    assert at_last.of("attn")[0, 1] == pytest.approx(curves[3] - curves[2])


@functools.cache
def planted(layer: int, answers: int) -> tuple[LanguageModel, list[Fact]]:
    """A random model of which one layer's MLP was trained on fifteen facts with so many answers; the subject ends the prompt."""
    model = tiny("olmo", seed=1)
    facts = [Fact(f"where is now w{n}", f"w{n}", f"w{20 + n % answers}", id=f"w{n}") for n in range(15)]
    prompts = torch.tensor([model.tokenizer.encode(fact.prompt) for fact in facts])
    targets = torch.tensor([model.tokenizer.encode(fact.answer)[0] for fact in facts])
    trained = [
        weight for name, weight in model.model.named_parameters() if name.startswith(f"model.layers.{layer}.mlp.")
    ]
    optimizer = torch.optim.Adam(trained, lr=2e-2)
    for _ in range(200):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model.model(prompts).logits[:, -1], targets).backward()
        optimizer.step()
    return model, facts


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("readout", ["logit_lens", "linear_probe"])
def test_a_planted_fact_becomes_readable_at_the_mlp_that_holds_it(layer: int, readout: Any) -> None:
    model, facts = planted(layer, 3)
    found = FactLookup(readout=readout).localize(model, facts, progress=False)
    assert len(found.facts) == 15
    rises = {(kind, one): value for kind in ("mlp", "attn") for one, value in enumerate(found.mean(kind))}
    assert max(rises, key=lambda place: rises[place]) == ("mlp", layer)
    if readout == "linear_probe":
        curve, accuracy = found.details["curve"], found.details["accuracy"]
        assert curve[layer + 1] > 0.95
        assert accuracy[layer + 1] > 0.9
        assert curve[layer] < 0.8
        assert found.details["probed"] == 15


def test_a_probe_is_ridge_regression_on_the_other_folds() -> None:
    generator = np.random.default_rng(0)
    states = generator.normal(size=(30, 6))
    labels = [("a", "b", "c")[n % 3] for n in range(30)]
    states[:, 0] += np.array([n % 3 for n in range(30)])
    folds = folds_of(labels, [str(n) for n in range(30)], 5, seed=1)
    below, first = linear_probe(states, labels, folds, ridge=0.5)
    for fold in range(5):
        fit, out = folds != fold, np.flatnonzero(folds == fold)
        centered = states[fit] - states[fit].mean(0)
        one_hot = np.eye(3)[["abc".index(label) for label in np.array(labels)[fit]]]
        model = Ridge(alpha=0.5 * (centered**2).sum(1).mean()).fit(centered, one_hot)
        guess = model.predict(states[out] - states[fit].mean(0)) - one_hot.mean(0)
        for place, row in zip(out, guess, strict=True):
            own = "abc".index(labels[place])
            assert below[place] == (row < row[own]).sum() / 2
            assert first[place] == float(row.argmax() == own)
    assert 0.5 < below.mean() < 1
    assert first.mean() <= below.mean()


def test_probes_of_nothing_are_at_chance_and_of_everything_perfect() -> None:
    labels = ["a", "b"] * 20
    groups = [str(n) for n in range(40)]
    folds = folds_of(labels, groups, 5, seed=0)
    below, first = linear_probe(np.ones((40, 3)), labels, folds, 1.0)
    assert (below == 0.5).all()
    assert (first == 0.5).all()
    signal = np.array([[n % 2, 0.0, 0.0] for n in range(40)])
    assert (linear_probe(signal, labels, folds, 1.0)[0] == 1).all()
    noise = [
        linear_probe(np.random.default_rng(seed).normal(size=(40, 3)), labels, folds, 1.0)[0].mean()
        for seed in range(30)
    ]
    assert abs(np.mean(noise) - 0.5) < 0.05


def test_folds_hold_out_whole_groups_and_spread_classes() -> None:
    labels = ["a"] * 6 + ["b"] * 4 + ["a", "b"]
    groups = [str(n) for n in range(10)] + ["0", "9"]
    for seed in range(5):
        folds = folds_of(labels, groups, 3, seed)
        assert folds[10] == folds[0]
        assert folds[11] == folds[9]
        assert {*folds[:6].tolist()} == {*folds[6:10].tolist()} == {0, 1, 2}
    assert not np.array_equal(folds_of(labels, groups, 3, 0), folds_of(labels, groups, 3, 1))
    assert np.array_equal(folds_of(labels, groups, 3, 0), folds_of(labels, groups, 3, 0))
    assert usable(["a", "a", "b", "b", "c"], ["1", "2", "1", "3", "4"]) == [0, 1, 2, 3]
    assert usable(["a", "a", "b", "b"], ["1", "1", "2", "3"]) == []


def test_what_cannot_be_probed_is_left_out_or_refused() -> None:
    model, facts = planted(1, 3)
    alone = replace(facts[3], answer=facts[3].answer, prompt="where does w3", subject="w3", id="alone")
    with torch.no_grad():
        said = int(model.model(torch.tensor([model.tokenizer.encode(alone.prompt)])).logits[0, -1].argmax())
    alone = replace(alone, answer=model.tokenizer.decode([said]))
    found = FactLookup(readout="linear_probe").localize(model, [*facts, alone], progress=False)
    assert found.facts == tuple(facts)
    assert found.details["left_out"] == {"alone": "no other subject with its answer is asked this question"}
    with pytest.raises(
        UserError, match=r"none of the 3 facts can be probed: .* answers .*: use classes: first_token, or"
    ):
        FactLookup(readout="linear_probe").localize(model, facts[:3], progress=False)
    with pytest.raises(UserError, match=r"two first tokens that .*: use readout: logit_lens"):
        FactLookup(readout="linear_probe", classes="first_token").localize(model, facts[:3], progress=False)
    tokens = FactLookup(readout="linear_probe", classes="first_token").localize(model, facts, progress=False)
    np.testing.assert_array_equal(tokens.of("mlp"), found.of("mlp"))


def test_facts_without_a_foil_are_left_out_of_a_logit_difference() -> None:
    model, facts = planted(1, 3)
    lone = known(model, how_many=1)
    found = FactLookup(metric="logit_difference").localize(model, [*facts, *lone], progress=False)
    assert len(found.facts) == 15
    assert "foil" in found.details["left_out"]["fact0"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"readout": "lens"}, "readout is 'lens': use logit_lens or linear_probe"),
        ({"position": "first"}, "position is 'first'"),
        ({"classes": "letters"}, "classes is 'letters'"),
        ({"metric": "loss"}, "metric 'loss' is unknown"),
        ({"folds": 1}, "folds is 1"),
        ({"ridge": 0.0}, "ridge is 0.0"),
        ({"ridge": float("nan")}, "ridge is nan"),
    ],
)
def test_impossible_settings_are_refused_at_once(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        FactLookup(**settings)
