"""Localizers that ask the weights: gradients against the loss that training uses, scores against flat vectors by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from families import FAMILIES
from families import tiny as tiny_family
from tiny_tracing import known, tiny
from torch import Tensor

from lm import UserError
from lm.model import LanguageModel
from lm.prompts import PromptSpec
from tracing import Fact, GradientOverlap, WeightAttribution
from tracing.localizers.gradient_overlap import unexplained
from tracing.localizers.gradients import answer_gradient, answer_loss, differentiable, module_weights, zeroing_effects
from tracing.localizers.weight_attribution import weight_effects, weight_shares
from tracing.question.encoded_fact import EncodedFact, encode_fact

FACT = Fact("Where was Anna Kowalska born?", "Anna Kowalska", "in 1984")


def probe_of(model: LanguageModel, fact: Fact = FACT) -> EncodedFact:
    return encode_fact(model, fact, PromptSpec(), "log_probability")


def trained_gradient(model: LanguageModel, encoded: EncodedFact) -> dict[str, Tensor]:
    """What `loss.backward()` of the transformers library leaves, with only the answer supervised."""
    labels = [-100] * len(encoded.prompt_ids) + list(encoded.answer_ids)
    ids = torch.tensor([[*encoded.prompt_ids, *encoded.answer_ids]])
    model.model.zero_grad()
    model.model(ids, labels=torch.tensor([labels])).loss.backward()
    found = {name: weight.grad.clone() for name, weight in model.model.named_parameters() if weight.grad is not None}
    model.model.zero_grad()
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_belong_to_one_module_and_gradients_are_those_of_training(name: str) -> None:
    model = tiny_family(name)
    weights = module_weights(model, ("mlp", "attn"))
    assert set(weights) == {(kind, layer) for kind in ("mlp", "attn") for layer in range(3)}
    every = {name: weight for some in weights.values() for name, weight in some.items()}
    assert len(every) == sum(len(some) for some in weights.values())
    matrices = [key for key, weight in model.model.named_parameters() if weight.ndim > 1]
    outside = [key for key in matrices if key not in every and model.anatomy.reads_text(key)]
    assert all(any(word in key for word in ("embed", "wte", "wpe", "lm_head")) for key in outside)
    encoded = probe_of(model)
    expected = trained_gradient(model, encoded)
    with differentiable(list(every.values())):
        found = answer_gradient(model, encoded, every)
    for key in every:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-3, atol=1e-5)
    assert all(weight.grad is None for weight in every.values())


def test_frozen_weights_stay_frozen_and_gradients_of_others_stay() -> None:
    model = tiny("olmo2")
    facts = known(model)
    for weight in model.model.parameters():
        weight.requires_grad_(False)
    head = model.model.get_output_embeddings().weight
    head.grad = torch.ones_like(head)
    model.model.train(True)
    GradientOverlap().localize(model, facts[:2], retain=facts[2:], progress=False)
    WeightAttribution(relative=True).localize(model, facts[:2], retain=facts[2:], progress=False)
    assert not any(weight.requires_grad for weight in model.model.parameters())
    assert bool((head.grad == 1).all())
    assert model.model.training
    with pytest.raises(RuntimeError, match="stop"), differentiable([head]):
        raise RuntimeError("stop")
    assert not head.requires_grad


def flat(gradient: dict[str, Tensor], names: dict[str, torch.nn.Parameter]) -> np.ndarray:
    return torch.cat([gradient[name].flatten() for name in names]).double().numpy()


@pytest.mark.parametrize("family", ["olmo2", "gpt2"])
def test_overlap_is_what_is_across_the_mean_retain_gradient(family: str) -> None:
    model = tiny(family)
    facts = known(model, how_many=6)
    found = GradientOverlap().localize(model, facts[:2], retain=facts[2:], progress=False)
    modules = module_weights(model, ("mlp", "attn"))
    gradients = [trained_gradient(model, probe_of(model, fact)) for fact in facts]
    whole = [np.sqrt(sum((flat(g, names) ** 2).sum() for names in modules.values())) for g in gradients[:2]]
    for (kind, layer), names in modules.items():
        mean = np.mean([flat(gradient, names) for gradient in gradients[2:]], axis=0)
        along = mean / np.linalg.norm(mean)
        assert found.details["retain_norm"][kind][layer] == pytest.approx(np.linalg.norm(mean), rel=1e-4)
        for row in range(2):
            own = flat(gradients[row], names)
            across = own - (own @ along) * along
            assert found.of(kind)[row, layer] == pytest.approx(np.linalg.norm(across) / whole[row], rel=1e-3)
            assert found.details["norm"][kind][row][layer] == pytest.approx(np.linalg.norm(own), rel=1e-4)
            cosine = own @ along / np.linalg.norm(own)
            assert found.details["cosine"][kind][row][layer] == pytest.approx(cosine, rel=1e-3, abs=1e-5)
    assert found.total is None
    assert found.facts == tuple(facts[:2])


def test_a_fact_that_must_stay_has_nothing_of_its_own() -> None:
    model = tiny("olmo", dtype=torch.float64)
    facts = known(model)
    found = GradientOverlap().localize(model, facts[:1], retain=facts[:1], progress=False)
    other = GradientOverlap().localize(model, facts[:1], retain=facts[1:], progress=False)
    for kind in found.kinds:
        assert found.of(kind).max() < 1e-6
        assert other.of(kind).max() > 0.1


def test_what_is_unexplained_by_hand() -> None:
    norms = np.array([[[3.0, 4.0]], [[0.0, 0.0]], [[2.0, 0.0]]])
    cosines = np.array([[[0.0, 0.6]], [[np.nan, np.nan]], [[-1.0, np.nan]]])
    found = unexplained(norms, cosines)
    np.testing.assert_allclose(found[0, 0], [3 / 5, 4 * 0.8 / 5])
    assert np.isnan(found[1]).all()
    np.testing.assert_allclose(found[2, 0], [0.0, 0.0], atol=1e-12)


def test_a_weight_s_effect_is_the_slope_of_the_loss_as_it_goes_to_zero() -> None:
    model = tiny("llama", dtype=torch.float64)
    encoded = probe_of(model, known(model)[0])
    weights = module_weights(model, ("mlp",))["mlp", 1]
    with differentiable(list(weights.values())):
        effects = zeroing_effects(weights, answer_gradient(model, encoded, weights))
    for name, weight in weights.items():
        place = (1, 2)
        before = float(weight.detach()[place])
        losses = []
        for scale in (1 - 1e-2, 1 + 1e-2):
            with torch.no_grad():
                weight[place] = before * scale
                losses.append(float(answer_loss(model, encoded)))
        with torch.no_grad():
            weight[place] = before
        assert float(effects[name][place]) == pytest.approx(abs(losses[0] - losses[1]) / 2e-2, rel=1e-3, abs=1e-7)


def test_weight_scores_are_sums_over_modules_and_shares_of_all() -> None:
    model = tiny("olmo2")
    facts = known(model, how_many=6)
    found = WeightAttribution().localize(model, facts, progress=False)
    modules = module_weights(model, ("mlp", "attn"))
    gradient = trained_gradient(model, probe_of(model, facts[4]))
    sums = {
        place: sum(float((weight.detach() * gradient[name]).abs().sum()) for name, weight in names.items())
        for place, names in modules.items()
    }
    for (kind, layer), value in sums.items():
        assert found.of(kind)[4, layer] == pytest.approx(value / sum(sums.values()), rel=1e-3)
    np.testing.assert_allclose(found.of("mlp").sum(1) + found.of("attn").sum(1), 1.0, rtol=1e-5)
    only = WeightAttribution(kinds=("attn",)).localize(model, facts, progress=False)
    assert only.kinds == ("attn",)
    np.testing.assert_allclose(only.of("attn").sum(1), 1.0, rtol=1e-5)


def test_relative_weight_scores_count_what_exceeds_the_retain_mean() -> None:
    model = tiny("olmo2")
    facts = known(model, how_many=5)
    asked = WeightAttribution(relative=True)
    found = asked.localize(model, facts[:2], retain=facts[2:], progress=False)
    modules = module_weights(model, ("mlp", "attn"))
    every = {name: weight for names in modules.values() for name, weight in names.items()}
    with differentiable(list(every.values())):
        mean = weight_effects(model, [probe_of(model, fact) for fact in facts[2:]], every)
        shares = weight_shares(model, probe_of(model, facts[1]), every)
    assert sum(float(value.sum()) for value in mean.values()) == pytest.approx(1, rel=1e-5)
    for (kind, layer), names in modules.items():
        expected = sum(float((shares[name] - mean[name]).clamp(min=0).sum()) for name in names)
        assert found.of(kind)[1, layer] == pytest.approx(expected, rel=1e-5)
    same = asked.localize(model, facts[:1], retain=facts[:1], progress=False)
    assert max(same.of(kind).max() for kind in same.kinds) < 1e-6


def test_unknown_facts_are_left_out_on_both_sides() -> None:
    model = tiny("olmo")
    facts = known(model)
    wrong = replace(facts[0], answer="w30 w31 w32", id="wrong")
    found = GradientOverlap().localize(model, [*facts[:2], wrong], retain=[facts[2], wrong], progress=False)
    assert found.facts == tuple(facts[:2])
    assert list(found.details["left_out"]) == ["wrong"]
    assert list(found.details["retain_left_out"]) == ["wrong"]
    assert found.details["retain_facts"] == ["fact2"]


def test_a_certain_answer_has_no_gradient() -> None:
    model = tiny("olmo")
    with torch.no_grad():
        model.model.get_output_embeddings().weight.mul_(1e6)
    facts = known(model)
    for one in (GradientOverlap(), WeightAttribution()):
        with pytest.raises(UserError, match="no score of mlp for any of the 3 facts"):
            one.localize(model, facts, retain=facts, progress=False)
    with pytest.raises(UserError, match="none of the 3 facts has a gradient"):
        WeightAttribution(relative=True).localize(model, facts, retain=facts, progress=False)


def test_what_cannot_be_done_is_refused() -> None:
    model = tiny("olmo")
    facts = known(model)
    with pytest.raises(UserError, match="give retain facts"):
        GradientOverlap().localize(model, facts, progress=False)
    with pytest.raises(UserError, match="needs retain facts"):
        WeightAttribution(relative=True).localize(model, facts, progress=False)
    with pytest.raises(UserError, match="choose of mlp and attn"):
        GradientOverlap(kinds=("resid",))
    with pytest.raises(UserError, match="choose of mlp and attn"):
        WeightAttribution(kinds=("mlp", "mlp"))
    with pytest.raises(UserError, match="no facts to locate"):
        WeightAttribution().localize(model, [], progress=False)
