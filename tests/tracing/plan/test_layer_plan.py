"""Layer plans: the right band, an honest "cannot tell", controls that differ, and files that refuse nonsense."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_tracing import known, made_up, tiny

from lm.errors import UserError
from tracing import LayerPlan, choose_layers, trace
from tracing.plan.layer_plan import control_layers

BUMP = [0.1, 0.2, 0.3, 0.9, 0.8, 0.7, 0.1, 0.0, 0.0, 0.0]


def test_the_band_with_the_largest_sum_is_chosen_and_singled_out() -> None:
    plan = choose_layers(made_up(BUMP, noise=0.2), size=3)
    assert plan.layers == (3, 4, 5)
    assert plan.modules == ("mlp",)
    assert plan.singled_out
    assert plan.verdict.startswith("The evidence singles out layers 3-5")
    assert "3 of 10 layers" in plan.rule
    assert plan.evidence["layer_scores"] == pytest.approx(BUMP, abs=0.15)
    assert plan.evidence["band_scores"][3] == pytest.approx(2.4, abs=0.2)
    assert plan.evidence["layer_low"][3] < plan.evidence["layer_scores"][3] < plan.evidence["layer_high"][3]
    assert plan.provenance["model"] == "made up"
    assert plan.provenance["model_layers"] == 10
    assert len(plan.provenance["facts_used"]) == 30
    fewer = choose_layers(made_up(BUMP, noise=0.2, facts=29), size=3)
    assert plan.provenance["facts_sha256"] == choose_layers(made_up(BUMP, seed=1), size=3).provenance["facts_sha256"]
    assert plan.provenance["facts_sha256"] != fewer.provenance["facts_sha256"]
    assert choose_layers(made_up(BUMP, noise=0.2), size=1).verdict.startswith("The evidence singles out layer 3: its")


@pytest.mark.parametrize("rule", ["band", "permutation"])
def test_facts_that_lie_each_elsewhere_single_out_as_rarely_as_it_says(rule: Any) -> None:
    """Smooth bumps at random layers: neighbors are alike, which shuffled layers are not. Of 60 draws 5 % are 3; more than 7 come
    in 1 % of the cases."""
    draw, singled_out = np.random.default_rng(0), 0
    for seed in range(60):
        away = np.arange(16) - draw.uniform(0, 16, size=(12, 1))
        bumps = np.exp(-0.5 * (((away + 8) % 16 - 8) / 3) ** 2) + 0.05 * draw.standard_normal((12, 16))
        cells = [np.where((np.arange(6) % 4 > 0)[:, None], bump, 0.0) + 0.1 for bump in bumps]
        effects = replace(made_up(np.zeros(16), facts=12), restored={"mlp": cells})
        size = 6 if rule == "band" else None
        singled_out += choose_layers(effects, rule=rule, size=size, resamples=300, seed=seed).singled_out
    assert singled_out <= 7


def test_a_certain_but_tiny_effect_does_not_single_out() -> None:
    profile = [0.0, 0.0, 0.0, 0.01, 0.01, 0.01, 0.0, 0.0, 0.0, 0.0]
    effects = made_up(profile, noise=0.0005)
    plan = choose_layers(effects, size=3)
    assert plan.evidence["share_of_total"] == pytest.approx(
        max(plan.evidence["layer_scores"]) / float(effects.total.mean())
    )
    assert not plan.singled_out
    assert "of what the corruption took" in plan.verdict
    assert choose_layers(effects, size=3, least_share=0.0).singled_out


def test_scores_are_means_over_roles_then_summed_over_the_band_without_noise() -> None:
    effects = made_up(BUMP, facts=5)
    effects.restored["mlp"][0][1] += (
        3.0  # the first subject token of one fact: a third of its score, a fifth of the mean
    )
    plan = choose_layers(effects, size=3)
    assert plan.evidence["layer_scores"] == pytest.approx(np.array(BUMP) + 3 / 3 / 5)
    first = choose_layers(effects, size=3, roles=["first_subject"])
    assert first.evidence["layer_scores"] == pytest.approx(np.array(BUMP) + 3 / 5)
    margin = 2.4 - np.mean([sum(BUMP[i : i + 3]) for i in range(8) if i != 3])
    assert choose_layers(made_up(BUMP), size=3).evidence["margin"] == pytest.approx(margin)


def test_of_equal_bands_the_lowest_is_chosen() -> None:
    assert choose_layers(made_up([0.5] * 6), size=2).layers == (0, 1)


def test_without_a_preference_nothing_is_singled_out() -> None:
    said = [choose_layers(made_up([0.5] * 12, noise=0.5, facts=20, seed=s), size=4, resamples=300) for s in range(60)]
    assert (
        sum(plan.singled_out for plan in said) <= 5
    )  # a true rate of 5 % exceeds this in 8 % of the cases; seeds are fixed
    plan = next(plan for plan in said if not plan.singled_out)
    assert plan.verdict.startswith("The evidence does not single out layers: layers ")
    assert "have the largest effect, but" in plan.verdict
    assert len(plan.layers) == 4


def test_an_effect_that_is_not_above_zero_singles_nothing_out() -> None:
    below = choose_layers(made_up([-0.5, -0.1, -0.5, -0.6], noise=0.01), size=1)
    assert below.layers == (1,)
    assert not below.singled_out
    assert "its effect is not above zero" in below.verdict
    assert "layer 1 has the largest effect" in below.verdict


def test_few_people_are_no_evidence_however_many_questions_they_answer() -> None:
    plan = choose_layers(made_up(BUMP, facts=50, noise=0.05, groups=2), size=3)
    assert not plan.singled_out
    assert "only 2 independent group(s)" in plan.verdict
    assert choose_layers(made_up(BUMP, facts=50, noise=0.05, groups=10), size=3).singled_out


def test_all_layers_leave_nothing_to_compare_with(tmp_path: Path) -> None:
    plan = choose_layers(made_up(BUMP), size=10)
    assert plan.layers == tuple(range(10))
    assert not plan.singled_out
    assert "nothing to compare with" in plan.verdict
    assert plan.controls == {"all": tuple(range(10))}
    assert plan.evidence["margin"] is None
    plan.save(tmp_path / "plan.json")
    assert LayerPlan.load(tmp_path / "plan.json") == plan


def test_controls_have_equal_size_and_are_not_the_plan() -> None:
    scores = np.array(BUMP)
    for seed in range(50):
        controls = control_layers((3, 4, 5), scores, seed)
        assert set(controls) == {"random", "inverse", "all"}
        assert len(set(controls["random"])) == 3
        assert controls["random"] != (3, 4, 5)
        assert list(controls["random"]) == sorted(controls["random"])
        assert controls == control_layers((3, 4, 5), scores, seed)
        # Even when there is but one other choice it is found.
        assert control_layers((0,), [1.0, 0.0], seed)["random"] == (1,)
    assert control_layers((3, 4, 5), scores, 0)["inverse"] == (7, 8, 9)
    assert control_layers((0, 1, 2), [3.0, 2.0, 1.0, 0.0], 0)["inverse"] == (1, 2, 3)
    drawn = {control_layers((3, 4, 5), scores, seed)["random"] for seed in range(50)}
    assert len(drawn) > 20


def test_modules_follow_the_kind() -> None:
    effects = made_up(BUMP, noise=0.1, kinds=("resid", "mlp", "attn"))
    assert choose_layers(effects, size=3, kind="attn").modules == ("attn",)
    assert choose_layers(effects, size=3, kind="resid").modules == ("all",)
    both = choose_layers(effects, size=3, kind="both")
    assert both.modules == ("mlp", "attn")
    assert both.evidence["layer_scores"][3] == pytest.approx(1.8, abs=0.15)
    for cells in effects.restored["attn"]:
        cells[1:4] = 0.1 - 0.01  # attention brings nothing back
    assert choose_layers(effects, size=3, kind="both").modules == ("mlp",)
    assert choose_layers(effects, size=3).evidence["other_kinds_in_band"]["attn"] == pytest.approx(-0.03)


def test_wide_windows_and_left_out_facts_are_told() -> None:
    model = tiny()
    facts = known(model)
    effects = trace(model, facts, window=3, max_facts=2, seed=None, progress=False)
    caveats = " ".join(choose_layers(effects, size=2).evidence["caveats"])
    assert "wider than the plan of 2" in caveats
    assert "1 of 3 facts were left out" in caveats
    plan = choose_layers(effects, size=2)
    assert plan.provenance["facts_left_out"] == {"fact2": "not needed: max_facts is 2"}
    assert plan.provenance["sigma"] == effects.sigma
    assert plan.provenance["prompt"]["format"] == "raw"
    assert plan.provenance["window"] == 3


def test_the_verdict_names_the_tokens_that_counted() -> None:
    effects = made_up(BUMP, noise=0.1)
    assert "at one subject token brings back" in choose_layers(effects, size=3).verdict
    for cells in effects.restored["mlp"]:
        cells[-1] = cells[1]
    assert "at one token (last) brings back" in choose_layers(effects, size=3, roles=["last"]).verdict


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "size is 0"),
        ({"size": 11}, "size is 11 but the model has 10 layers"),
        ({"size": 2, "kind": "attn"}, "does not score 'attn'"),
        ({"size": 2, "kind": "mpl"}, "kind 'mpl' is unknown"),
        ({"size": 2, "roles": ["middle"]}, "middle"),
        ({"size": 2, "roles": []}, "not usable"),
        ({"size": 2, "confidence": 0}, "confidence is 0"),
        ({"size": 2, "stability": 2}, "stability is 2"),
    ],
)
def test_impossible_plans_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        choose_layers(made_up(BUMP), **settings)


def test_roles_that_no_fact_has_are_refused() -> None:
    effects = made_up(BUMP, span=(0, 3))
    with pytest.raises(UserError, match="no fact has traced tokens in the roles before"):
        choose_layers(effects, size=2, roles=["before"])


def test_a_fact_without_the_roles_does_not_count() -> None:
    effects = made_up(BUMP, facts=4)
    effects.restored["mlp"][2][:] = np.nan
    plan = choose_layers(effects, size=3)
    assert plan.layers == (3, 4, 5)
    assert plan.evidence["layer_scores"] == pytest.approx(BUMP)


def test_plans_come_back_whole(tmp_path: Path) -> None:
    plan = choose_layers(made_up(BUMP, noise=0.1, kinds=("mlp", "attn")), size=3)
    plan.save(tmp_path / "plan.json")
    again = LayerPlan.load(tmp_path / "plan.json")
    assert again == plan
    assert isinstance(again.layers, tuple)
    assert isinstance(again.controls["random"], tuple)
    stored = json.loads((tmp_path / "plan.json").read_text())
    assert stored["version"] == 1
    assert stored["layers"] == [3, 4, 5]


def test_a_plan_written_by_hand_needs_layers_only(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text('{"version": 1, "layers": [0, 1, 2]}')
    plan = LayerPlan.load(path)
    assert (plan.layers, plan.modules, plan.singled_out) == ((0, 1, 2), ("mlp",), False)


def test_a_control_is_a_plan_of_its_own() -> None:
    plan = choose_layers(made_up(BUMP), size=3)
    inverse = plan.control("inverse")
    assert inverse.layers == plan.controls["inverse"]
    assert inverse.modules == plan.modules
    assert not inverse.singled_out
    assert "control" in inverse.verdict
    with pytest.raises(UserError, match="did you mean 'random'"):
        plan.control("randon")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "not a JSON object"),
        ('{"layers": [1]}', "version None"),
        ('{"version": 2, "layers": [1]}', "version 2"),
        ('{"version": 1, "layer": [1]}', r"unknown key 'layer' \(did you mean 'layers'\?\)"),
        ('{"version": 1}', "has no layers"),
        ('{"version": 1, "layers": 3}', "layers 3: give a list"),
        ('{"version": 1, "layers": []}', "layers are \\[\\]"),
        ('{"version": 1, "layers": [2, 1]}', "ascending"),
        ('{"version": 1, "layers": [1, 1]}', "each once"),
        ('{"version": 1, "layers": [-1]}', "from 0 on"),
        ('{"version": 1, "layers": [1.5]}', "whole numbers"),
        ('{"version": 1, "layers": ["1"]}', "whole numbers"),
        ('{"version": 1, "layers": [true]}', "whole numbers"),
        ('{"version": 1, "layers": [1], "modules": ["mpl"]}', r"modules .*did you mean 'mlp'"),
        ('{"version": 1, "layers": [1], "modules": []}', "use mlp, attn or all"),
        ('{"version": 1, "layers": [1], "controls": {"random": 2}}', "controls.random 2: give a list"),
        ('{"version": 1, "layers": [1], "controls": {"random": [3, 2]}}', "controls.random"),
        ('{"version": 1, "layers": [1], "singled_out": "yes"}', "give true or false"),
    ],
)
def test_a_broken_plan_file_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as raised:
        LayerPlan.load(path)
    assert str(path) in str(raised.value)


def test_a_missing_plan_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no layer plan"):
        LayerPlan.load(tmp_path / "plan.json")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="no layer plan"):
        LayerPlan.load(tmp_path / "folder")
