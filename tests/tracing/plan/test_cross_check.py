"""Does another corruption confirm a plan? Where it does, where it does not, and where that cannot be told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tiny_tracing import made_up

from tracing import Agreement, Effects, LayerPlan, agreement, choose_layers
from tracing.plan.cross_check import confirm

PROFILE = [0.1, 0.2, 0.9, 0.8, 0.3, 0.05, 0.0, 0.15]


def named(profile: list[float], seed: int, **settings: Any) -> Effects:
    """Effects of facts with prompts of their own."""
    effects = made_up(profile, noise=0.05, facts=20, seed=seed, **settings)
    facts = tuple(replace(fact, prompt=f"who is ada {place}") for place, fact in enumerate(effects.facts))
    return replace(effects, facts=facts)


def test_a_corruption_that_agrees_confirms_and_says_how_far() -> None:
    one, other = named(PROFILE, 1), named([value / 3 for value in PROFILE], 2)
    plan = choose_layers(one, size=2)
    found = confirm(plan, one, {"TokenReplacement": other})
    assert found.singled_out
    assert (found.layers, found.controls, found.rule) == (plan.layers, plan.controls, plan.rule)
    said = found.evidence["also"]["TokenReplacement"]
    assert said["confirms"] is True
    assert said["facts"] == 20
    assert Agreement(**said["agreement"]["mlp"]) == agreement(one, other)
    values = other.scores().of("mlp")
    lead = values[:, [2, 3]].mean() - values[:, [0, 1, 4, 5, 6, 7]].mean()
    assert said["planned_layers"]["margin"] == pytest.approx(lead)
    assert said["planned_layers"]["low"] < lead < said["planned_layers"]["high"]
    assert found.verdict.startswith(plan.verdict)
    assert "TokenReplacement confirms them" in found.verdict


@pytest.mark.parametrize(
    ("profile", "says"),
    [
        ([-value for value in PROFILE], "not shown to be ranked alike (rank correlation -1.00"),
        ([0.1, 0.2, 0.02, 0.01, 0.9, 0.05, 0.8, 0.15], "these layers do not lead"),
    ],
)
def test_one_that_disagrees_takes_the_singling_out_away(profile: list[float], says: str) -> None:
    one = named(PROFILE, 1)
    plan = choose_layers(one, size=2)
    assert plan.singled_out
    agrees = named(PROFILE, 3)
    found = confirm(plan, one, {"good": agrees, "bad": named(profile, 2)})
    assert not found.singled_out
    assert found.layers == plan.layers
    assert found.verdict.startswith("The evidence does not single out layers: layers 2-3 have the largest effect")
    assert "the corruptions disagree: under bad" in found.verdict
    assert says in found.verdict
    assert [one["confirms"] for one in found.evidence["also"].values()] == [True, False]


def test_ranks_of_every_planned_module_must_agree() -> None:
    one, other = (named(PROFILE, seed, kinds=("mlp", "attn", "resid")) for seed in (1, 2))
    for cells in other.restored["attn"]:
        cells[:] = cells[:, ::-1]  # attention is ranked the other way round
    assert confirm(choose_layers(one, size=2), one, {"other": other}).singled_out
    both = choose_layers(one, size=2, kind="both")
    assert both.modules == ("mlp", "attn")
    found = confirm(both, one, {"other": other})
    assert not found.singled_out
    assert "attn effects are not shown to be ranked alike" in found.verdict
    assert set(found.evidence["also"]["other"]["agreement"]) == {"mlp", "attn", "resid"}
    stream = choose_layers(one, size=2, kind="resid")
    assert confirm(stream, one, {"other": other}).singled_out


def test_a_plan_that_was_not_singled_out_stays_so() -> None:
    one = named([0.5] * 8, 1)
    plan = choose_layers(one, size=2)
    assert not plan.singled_out
    found = confirm(plan, one, {"other": named([0.5] * 8, 2)})
    assert not found.singled_out
    assert found.verdict.startswith(plan.verdict)
    assert "Besides, under other" in found.verdict


def test_what_cannot_be_compared_does_not_confirm() -> None:
    one = named(PROFILE, 1)
    plan = choose_layers(one, size=2)
    lacking = confirm(plan, one, {}, {"TokenReplacement": "no other subject fits."})
    assert not lacking.singled_out
    assert "TokenReplacement could not be compared: no other subject fits" in lacking.verdict
    few = replace(
        one,
        facts=one.facts[:1],
        clean=one.clean[:1],
        corrupted=one.corrupted[:1],
        restored={kind: cells[:1] for kind, cells in one.restored.items()},
        tokens=one.tokens[:1],
        subject_spans=one.subject_spans[:1],
    )
    assert "1 facts in common" in confirm(plan, one, {"few": few}).verdict
    whole = choose_layers(one, size=8)
    assert confirm(whole, one, {"other": one}).evidence["also"]["other"]["planned_layers"] is None


def test_a_confirmed_plan_is_a_file_like_any_other(tmp_path: Any) -> None:
    one = named(PROFILE, 1)
    found = confirm(choose_layers(one, size=2), one, {"other": named(PROFILE, 2)})
    found.save(tmp_path / "plan.json")
    assert LayerPlan.load(tmp_path / "plan.json") == found


def test_intervals_cover_the_lead_of_fixed_layers() -> None:
    """The planned layers were not chosen by the other effects, so 9 in 10 intervals hold the true lead."""
    one = named(PROFILE, 1)
    plan = choose_layers(one, size=2, confidence=0.9)
    true = np.mean(np.array(PROFILE)[[2, 3]]) - np.mean(np.array(PROFILE)[[0, 1, 4, 5, 6, 7]])
    held = 0
    for seed in range(40):
        lead = confirm(plan, one, {"o": named(PROFILE, 10 + seed)}, resamples=200).evidence["also"]["o"][
            "planned_layers"
        ]
        held += lead["low"] <= true <= lead["high"]
    assert 30 <= held <= 40


def test_one_group_of_facts_can_confirm_nothing_and_no_correlation_is_blamed() -> None:
    effects = named(PROFILE, 1, groups=1)
    found = confirm(choose_layers(effects, size=2), effects, {"names": effects})
    assert not found.singled_out
    assert "under names only one group of facts was traced, too few to compare" in found.verdict
    assert "nan" not in found.verdict


def test_effects_without_an_order_are_not_taken_for_a_single_group() -> None:
    effects = named(PROFILE, 1)
    flat = replace(effects, restored={"mlp": [np.full_like(cells, 0.3) for cells in effects.restored["mlp"]]})
    found = confirm(choose_layers(effects, size=2), effects, {"names": flat})
    assert not found.singled_out
    assert "under names the layers have no order that could be compared" in found.verdict
    assert "one group" not in found.verdict
