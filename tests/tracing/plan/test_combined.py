"""Localizers together: ranks by hand, a plan where they agree, and a refusal that names who does not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lm import UserError
from lm.anatomy import Kind
from tracing import Fact, LayerScores, agreement, choose_layers, combine, combined_plan, compare_all
from tracing.plan.combined import layer_ranks

BUMP = np.array([0.1, 0.2, 0.4, 0.9, 0.8, 0.7, 0.3, 0.0])


def made(
    profile: np.ndarray, *, scale: float = 1.0, noise: float = 0.02, seed: int = 0, kinds: tuple[Kind, ...] = ("mlp",)
) -> LayerScores:
    draw = np.random.default_rng(seed)
    facts = tuple(Fact(f"Where is {n}?", f"{n}", "here", group=f"{n}") for n in range(12))
    values = {kind: scale * (profile + draw.normal(0, noise, (12, len(profile)))) for kind in kinds}
    return LayerScores(source=f"made {seed}", unit="points", facts=facts, values=values, provenance={"seed": seed})


def test_ranks_by_hand() -> None:
    scores = np.array([[3.0, 1.0, 2.0], [5.0, 5.0, 0.0], [np.nan, np.nan, np.nan]])
    np.testing.assert_array_equal(layer_ranks(scores), [[1, 0, 0.5], [0.75, 0.75, 0], [np.nan] * 3])
    assert layer_ranks(np.array([[7.0]])).tolist() == [[0.0]]


def test_units_do_not_matter_but_order_does() -> None:
    one, other = made(BUMP, seed=1, kinds=("mlp", "attn")), made(BUMP, scale=1e6, seed=2)
    found = combine({"a": one, "b": other})
    assert found.kinds == ("mlp",)
    np.testing.assert_allclose(found.of("mlp"), (layer_ranks(one.of("mlp")) + layer_ranks(other.of("mlp"))) / 2)
    assert combine({"a": one, "b": replace(other, values={"mlp": np.exp(other.of("mlp") / 1e6)})}).of(
        "mlp"
    ).tolist() == (found.of("mlp").tolist())
    assert found.details["localizers"] == {"a": "made 1", "b": "made 2"}
    assert found.provenance["localizers"]["b"] == {"seed": 2}


def test_only_facts_of_which_all_say_something_count() -> None:
    one, other = made(BUMP, seed=1), made(BUMP, seed=2).some([5, 3, 2, 7])
    silent = np.array(other.of("mlp"))
    silent[1] = np.nan
    found = combine({"a": one, "b": replace(other, values={"mlp": silent})})
    assert [fact.subject for fact in found.facts] == ["2", "3", "5", "7"]
    assert np.isnan(found.of("mlp")).all(axis=1).tolist() == [False, True, False, False]


def test_every_pair_is_compared_and_written_down() -> None:
    three = {"a": made(BUMP, seed=1), "b": made(BUMP, seed=2), "c": made(-BUMP, seed=3)}
    found = compare_all(three)
    assert list(found.pairs["mlp"]) == [("a", "b"), ("a", "c"), ("b", "c")]
    assert found.pairs["mlp"]["a", "c"] == agreement(three["a"], three["c"])
    matrix = found.matrix("mlp")
    np.testing.assert_array_equal(matrix, matrix.T)
    assert matrix.diagonal().tolist() == [1, 1, 1]
    assert matrix[0, 1] > 0.9
    assert matrix[1, 2] < -0.9
    assert list(found.apart(["mlp"])) == sorted(
        [("a", "c"), ("b", "c")], key=lambda pair: found.pairs["mlp"][pair].correlation
    )
    rows = found.to_json()["kinds"]["mlp"]
    assert [(row["one"], row["other"], row["shown"]) for row in rows] == [
        ("a", "b", True),
        ("a", "c", False),
        ("b", "c", False),
    ]
    lines = found.to_markdown().splitlines()
    assert lines[0] == "| mlp | b | c |"
    assert lines[2].startswith("| a | **")
    assert lines[3].startswith("| b |  | -")


def test_localizers_that_agree_make_a_plan() -> None:
    three = {name: made(BUMP, scale=10.0**seed, seed=seed) for seed, name in enumerate("abc")}
    plan = combined_plan(three, compare_all(three), size=3)
    assert plan.layers == (3, 4, 5)
    assert plan.singled_out
    assert plan.verdict == choose_layers(combine(three), size=3).verdict
    assert plan.evidence["apart"] == []
    assert plan.evidence["agreement"]["localizers"] == ["a", "b", "c"]
    assert plan.provenance["localizers"]["a"] == {"seed": 0}
    assert plan.provenance["model_layers"] == 8


def test_one_that_differs_is_named_and_no_layers_are_singled_out() -> None:
    three = {"tracing": made(BUMP, seed=1), "gradients": made(BUMP, seed=2), "probes": made(np.roll(BUMP, 4), seed=3)}
    plan = combined_plan(three, compare_all(three), size=3)
    assert not plan.singled_out
    assert plan.verdict.startswith("The localizers do not agree, so no layers are singled out: 2 of 3 pairs ")
    assert "tracing and probes (mlp: rank correlation " in plan.verdict
    assert "gradients and probes (" in plan.verdict
    assert "tracing and gradients" not in plan.verdict
    assert len(plan.layers) == 3
    assert set(plan.controls) == {"random", "inverse", "all"}


def test_disagreement_on_any_kind_that_counts_is_disagreement() -> None:
    one = made(BUMP, seed=1, kinds=("mlp", "attn"))
    other = replace(one, values={"mlp": one.of("mlp"), "attn": -one.of("attn")})
    both = {"a": one, "b": other}
    assert combined_plan(both, compare_all(both), size=3).singled_out
    plan = combined_plan(both, compare_all(both), size=3, kind="both")
    assert not plan.singled_out
    assert "a and b (attn: rank correlation -1.00" in plan.verdict


def test_noise_agrees_with_nothing() -> None:
    singled = 0
    for seed in range(20):
        both = {"a": made(np.zeros(8), noise=1.0, seed=seed), "b": made(np.zeros(8), noise=1.0, seed=100 + seed)}
        singled += combined_plan(both, compare_all(both, resamples=200), size=3, resamples=200).singled_out
    assert singled == 0


def test_what_cannot_be_combined_is_refused() -> None:
    with pytest.raises(UserError, match="1 localizer cannot be compared"):
        combine({"a": made(BUMP)})
    with pytest.raises(UserError, match="1 localizer cannot be compared"):
        compare_all({"a": made(BUMP)})
    with pytest.raises(UserError, match=r"no kind in common \(a: mlp; b: attn\)"):
        compare_all({"a": made(BUMP), "b": made(BUMP, kinds=("attn",))})
    one, other = (replace(made(BUMP), provenance={"weights": name}) for name in ("abc", "def"))
    with pytest.raises(UserError, match=r"other weights \(abc and def\)"):
        compare_all({"a": one, "b": other, "c": made(BUMP)})
    with pytest.raises(UserError, match="over 4 and 8 layers"):
        combine({"a": made(BUMP), "b": made(BUMP[:4])})
