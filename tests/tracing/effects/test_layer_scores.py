"""Layer scores: means, intervals, facts in common, and the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lm.errors import UserError
from tracing import Fact, LayerScores, agreement, choose_layers
from tracing.effects.layer_scores import in_common


def made(values: list[list[float]], source: str = "one", names: str = "abcdefgh") -> LayerScores:
    facts = tuple(Fact(f"Where is {name}?", name, "here", group=name) for name in names[: len(values)])
    return LayerScores(source=source, unit="points", facts=facts, values={"mlp": np.array(values)})


def test_means_leave_out_facts_that_say_nothing() -> None:
    scores = made([[1.0, 3.0], [3.0, 5.0], [np.nan, np.nan]])
    assert scores.mean("mlp").tolist() == [2.0, 4.0]
    low, high = scores.interval("mlp")
    assert low.tolist() == [1.0, 3.0]
    assert high.tolist() == [3.0, 5.0]
    assert repr(scores) == "LayerScores(one: points; 3 facts; mlp of 2 layers)"
    with pytest.raises(UserError, match="does not score 'attn': use one of mlp"):
        scores.of("attn")


def test_a_file_brings_everything_back(tmp_path: Path) -> None:
    one = made([[1.0, 2.0], [3.0, 4.0]])
    total = LayerScores(
        source="x", unit="ü", facts=one.facts, values=one.values, total=np.array([5.0, 6.0]), details={"verified": [1]}
    )
    for scores in (one, total):
        scores.save(tmp_path / "scores.npz")
        again = LayerScores.load(tmp_path / "scores.npz")
        assert (again.source, again.unit, again.facts, again.details) == (
            scores.source,
            scores.unit,
            scores.facts,
            scores.details,
        )
        assert np.array_equal(again.of("mlp"), scores.of("mlp"))
        assert (again.total is None) == (scores.total is None)
    (tmp_path / "scores.npz").write_bytes(b"PK nonsense")
    with pytest.raises(UserError, match="not a readable file of layer scores"):
        LayerScores.load(tmp_path / "scores.npz")
    with pytest.raises(UserError, match="there is no file of layer scores"):
        LayerScores.load(tmp_path / "absent.npz")


def test_facts_in_common_come_in_the_order_of_the_first() -> None:
    one, other = made([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]]), made([[30.0, 0.0], [10.0, 0.0]], "other", "cax")
    mine, theirs = in_common([one, other])
    assert [fact.subject for fact in mine.facts] == [fact.subject for fact in theirs.facts] == ["a", "c"]
    assert mine.of("mlp")[:, 0].tolist() == [1.0, 3.0]
    assert theirs.of("mlp")[:, 0].tolist() == [10.0, 30.0]
    with pytest.raises(UserError, match="one and other have 1 facts in common"):
        in_common([one, made([[1.0, 2.0]], "other")])
    with pytest.raises(UserError, match="over 2 and 3 layers"):
        in_common([one, made([[1.0, 2.0, 3.0]] * 3)])


def test_plans_and_agreement_are_drawn_from_scores_alone() -> None:
    draw = np.random.default_rng(0)
    profile = np.array([0.0, 0.0, 3.0, 3.0, 0.0, 0.0])
    one = made((profile + draw.normal(0, 0.2, (8, 6))).tolist())
    plan = choose_layers(one, size=2)
    assert plan.layers == (2, 3)
    assert plan.singled_out
    assert "one" in plan.rule
    assert "points" in plan.rule
    assert "brings back" not in plan.verdict  # the scores are a part of nothing
    assert agreement(one, made((-10 * one.of("mlp")).tolist(), "other")).correlation == pytest.approx(-1)
    assert agreement(one, made((7 * one.of("mlp") + 1).tolist(), "other")).correlation == pytest.approx(1)


def test_wrong_shapes_and_empty_scores_are_refused() -> None:
    with pytest.raises(UserError, match="give \\(facts, layers\\) each"):
        LayerScores(source="s", unit="u", facts=(), values={"mlp": np.ones((2, 3))})
    with pytest.raises(UserError, match="no score of mlp for any of the 1 facts"):
        made([[np.nan, np.nan]])
