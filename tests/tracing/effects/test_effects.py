"""Effects: roles index the right tokens, baselines are subtracted, intervals are right, files come back whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_tracing import known, made_up, tiny

from lm.errors import UserError
from tracing import ROLES, Effects, Fact, GaussianNoise, Skipped, plot, trace
from tracing.bootstrap import interval, resample_counts, share_of, shares, units, weighted_means
from tracing.effects.roles import token_roles
from tracing.effects.summary import peak


def roles(tokens: int, span: tuple[int, int]) -> list[str]:
    """The role of each position."""
    found = token_roles(tokens, span)
    assert tuple(found) == ROLES
    out = [""] * tokens
    for role, positions in found.items():
        for position in positions:
            assert out[position] == "", f"position {position} has two roles"
            out[position] = role
    assert "" not in out
    return out


def test_every_position_has_one_role() -> None:
    b, f, m, e, a, u, z = ROLES
    assert roles(9, (2, 6)) == [b, b, f, m, m, e, a, u, z]
    assert roles(6, (0, 2)) == [f, e, a, u, u, z]
    assert roles(4, (1, 3)) == [b, f, e, z]  # one token after the subject is the last one
    assert roles(3, (1, 3)) == [b, f, e]  # the subject ends the prompt
    assert roles(5, (1, 2)) == [b, e, a, u, z]  # a one-token subject is its own last token
    assert roles(1, (0, 1)) == [e]
    for tokens in range(1, 9):
        for start in range(tokens):
            for end in range(start + 1, tokens + 1):
                assert len(roles(tokens, (start, end))) == tokens
    with pytest.raises(UserError, match="3:3"):
        token_roles(5, (3, 3))


def test_the_slips_of_the_authors_pictures_are_a_switch() -> None:
    found = token_roles(9, (2, 6), "authors")
    assert found["last_subject"] == found["first_subject"] == [2], "their last subject token is the first again"
    assert found["first_after"] == [7], "one token is left out after the subject"
    assert found["further"] == [7], "and further starts with the same one"
    assert found["last"] == [8]
    assert token_roles(6, (2, 6), "authors")["first_after"] == []


def numbered() -> Effects:
    """Two facts of different lengths; the score at (token, layer) is 100 * fact + 10 * token + layer, baseline 1000."""
    spans = ((1, 4), (0, 1))
    restored = [
        np.add.outer(10.0 * np.arange(count), np.arange(2.0)) + 100 * index for index, count in enumerate((7, 3))
    ]
    return Effects(
        facts=(Fact("a b", "a", "c", id="x"), Fact("a b", "a", "c", id="y")),
        clean=np.array([5000.0, 6000.0]),
        corrupted=np.array([1000.0, 1000.0]),
        restored={"mlp": restored},
        tokens=(tuple("abcdefg"), tuple("abc")),
        subject_spans=spans,
        sigma=0.5,
        metric="probability",
        window=3,
        skipped=(Skipped(fact=Fact("a b", "b", "c"), reason="no"),),
        provenance={"model": "m"},
    )


def test_rows_average_the_right_tokens_minus_the_corrupted_score() -> None:
    values = numbered().by_role("mlp") + 1000
    assert values[0, :, 0].tolist() == [0.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0]
    expected = {"last_subject": 100.0, "first_after": 110.0, "last": 120.0}
    for row, role in enumerate(ROLES):
        if role in expected:
            assert values[1, row, 0] == expected[role]
            assert values[1, row, 1] == expected[role] + 1
        else:
            assert np.isnan(values[1, row]).all()
    table = numbered().table("mlp")
    assert table.facts.tolist() == [1, 1, 1, 2, 2, 1, 2]
    assert table.mean[3].tolist() == [65 - 1000, 66 - 1000]
    assert table.mean[1].tolist() == [10 - 1000, 11 - 1000]  # over the one fact that has such a token
    assert np.isnan(table.low[1]).all()
    assert not np.isnan(table.low[3]).any()
    assert (table.window, table.sigma, table.total_facts) == (3, 0.5, 2)
    assert numbered().total.tolist() == [4000.0, 5000.0]


def test_positions_that_were_not_traced_do_not_count() -> None:
    effects = numbered()
    effects.restored["mlp"][0][4:6] = np.nan
    values = effects.by_role("mlp")
    assert np.isnan(values[0, ROLES.index("first_after")]).all()
    assert effects.table("mlp").facts.tolist() == [1, 1, 1, 2, 1, 0, 2]
    assert np.isnan(effects.table("mlp").mean[ROLES.index("further")]).all()


def test_intervals_cover_the_mean_as_often_as_they_say() -> None:
    hits = []
    for seed in range(60):
        table = made_up([0.2, 0.4], facts=40, noise=0.3, seed=seed).table("mlp", confidence=0.9, seed=seed)
        row = ROLES.index("last_subject")
        hits += [
            low <= true <= high for low, high, true in zip(table.low[row], table.high[row], [0.2, 0.4], strict=True)
        ]
    assert 0.8 < np.mean(hits) < 0.97


def test_intervals_repeat_with_the_seed_and_differ_without() -> None:
    effects = made_up([0.2, 0.4], noise=0.3)
    first, again, other = (effects.table("mlp", seed=seed) for seed in (3, 3, 4))
    assert np.array_equal(first.low, again.low, equal_nan=True)
    assert not np.array_equal(first.low, other.low, equal_nan=True)


def test_people_are_resampled_whole() -> None:
    assert units(["a", "", "a", "", "b"]).tolist() == [0, 1, 0, 2, 3]
    counts = resample_counts(["a", "a", "", "b", "b"], 200, seed=0)
    assert np.array_equal(counts[:, 0], counts[:, 1])
    assert np.array_equal(counts[:, 3], counts[:, 4])
    assert (counts[:, 0] + counts[:, 2] + counts[:, 3] == 3).all()
    # Copies of the same four people are no new evidence: the interval must not shrink.
    people = np.array([0.1, 0.3, 0.5, 0.9])
    apart = interval(weighted_means(people, resample_counts(["", "", "", ""], 2000, 0)), 0.95)
    copied = interval(weighted_means(np.tile(people, 9), resample_counts(list("abcd") * 9, 2000, 0)), 0.95)
    assert np.subtract(*copied) == pytest.approx(np.subtract(*apart), rel=1e-9)


def test_resampled_means_leave_out_missing_values() -> None:
    values = np.array([[1.0, np.nan], [3.0, np.nan], [np.nan, 5.0]])
    means = weighted_means(values, np.array([[1.0, 1.0, 1.0], [2.0, 1.0, 0.0]]))
    assert means[0].tolist() == [2.0, 5.0]
    assert means[1, 0] == pytest.approx(5 / 3)
    assert np.isnan(means[1, 1])
    low, high = interval(np.full((5, 1), np.nan), 0.9)
    assert np.isnan(low).all()
    assert np.isnan(high).all()


def test_saved_effects_come_back_whole(tmp_path: Path) -> None:
    model = tiny()
    facts = [*known(model), Fact("w3 w9 ada byron does live", "ada", "w20 w21 w22", id="odd")]
    effects = trace(model, facts, positions="subject_and_last", progress=False)
    effects.save(tmp_path / "sub" / "effects.npz")
    again = Effects.load(tmp_path / "sub" / "effects.npz")
    assert again.facts == effects.facts
    assert again.skipped == effects.skipped
    assert [one.fact.id for one in again.skipped] == ["odd"]
    for name in ("tokens", "subject_spans", "sigma", "metric", "window", "provenance", "kinds", "layers"):
        assert getattr(again, name) == getattr(effects, name), name
    for name in ("clean", "corrupted"):
        assert np.array_equal(getattr(again, name), getattr(effects, name))
    for kind in effects.kinds:
        for one, other in zip(again.restored[kind], effects.restored[kind], strict=True):
            assert np.array_equal(one, other, equal_nan=True)


def test_broken_effects_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "effects.npz"
    with pytest.raises(UserError, match="no effects file"):
        Effects.load(path)
    path.write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(UserError, match="not a readable effects file"):
        Effects.load(path)
    np.savez(path, clean=np.zeros(1))
    with pytest.raises(UserError, match="not a readable effects file"):
        Effects.load(path)
    np.savez(path, about=np.array('{"version": 99}'))
    with pytest.raises(UserError, match="version 99"):
        Effects.load(path)


def test_wrong_questions_are_refused() -> None:
    effects = numbered()
    with pytest.raises(UserError, match="'attn' was not traced"):
        effects.table("attn")
    with pytest.raises(UserError, match="first_subjet"):
        effects.table("mlp", roles=["first_subjet"])
    with pytest.raises(UserError, match="confidence is 95"):
        effects.table("mlp", confidence=95)
    with pytest.raises(UserError, match="sigmas is -1"):
        GaussianNoise(sigmas=-1)
    with pytest.raises(UserError, match="samples is 0"):
        GaussianNoise(samples=0)
    with pytest.raises(UserError, match="seed is -1"):
        GaussianNoise(seed=-1)


def test_a_table_of_cells_holds_every_number_once() -> None:
    effects = made_up([0.1, 0.4, 0.2], facts=2, kinds=("mlp", "attn"), tokens=5, span=(1, 3))
    effects.restored["mlp"][0][4, 2] = np.nan  # not traced
    table = effects.to_dataframe()
    assert len(table) == 2 * 2 * 5 * 3 - 1
    assert (table.indirect == table.restored - table.corrupted).all()
    row = table[(table.fact == "f1") & (table.kind == "attn") & (table.position == 2) & (table.layer == 1)].iloc[0]
    assert row.indirect == pytest.approx(0.4)
    assert (row.role, row.subject, row.token, row.clean) == ("last_subject", "ada", "c", 0.9)
    assert (row.total, row.share) == (pytest.approx(0.8), pytest.approx(0.5))
    for role, found in table[table.kind == "attn"].groupby("role"):
        place = list(effects.by_role("attn", [str(role)])[:, 0].mean(0))
        assert found.groupby("layer").indirect.mean().tolist() == pytest.approx(place)


def test_what_is_held_is_said_in_a_line() -> None:
    said = repr(made_up([0.1, 0.4, 0.2], facts=4, kinds=("mlp",)))
    assert said == (
        "Effects(4 facts; mlp of 3 layers; probability, noise σ 0.1; mean total effect 0.8, at most 50.0% brought back "
        "(mlp 1, first subject))"
    )
    other = repr(replace(made_up([0.1], facts=1), sigma=None, window=5))
    assert "other names" in other
    assert "windows of 5" in other


def test_one_group_has_no_interval_rather_than_one_of_no_width() -> None:
    for groups, told in ((1, False), (2, True)):
        effects = made_up([0.1, 0.5, 0.2], facts=8, noise=0.1, groups=groups)
        table = effects.table("mlp", roles=["last_subject"])
        assert np.isfinite(table.low).all() == told
        assert np.isfinite(table.high).all() == told
        assert np.isfinite(table.mean).all()
        assert np.isfinite(np.array(effects.scores().interval("mlp"))).all() == told


@pytest.mark.filterwarnings("error")
def test_a_fact_that_lost_nothing_has_no_shares() -> None:
    effects = replace(made_up([0.1, 0.4], facts=2), clean=np.array([0.9, 0.1]))
    kept, lost = effects.indirect("mlp", normalized=True)
    np.testing.assert_allclose(kept, effects.indirect("mlp")[0] / 0.8)
    assert np.isnan(lost).all()


@pytest.mark.filterwarnings("error")
def test_a_share_is_one_of_averages() -> None:
    effects = np.array([[1.0], [1.0], [np.nan]])
    totals = np.array([10.0, 0.1, 1000.0])  # a tiny total, and one of a fact that has no such token
    share, low, high = shares(effects, totals, ["a", "b", "c"], confidence=0.95, resamples=4000)
    assert share == pytest.approx(2 / 10.1)  # the mean of the shares is 5.05
    assert low == pytest.approx(1 / 10)  # drawn twice: the one,
    assert high == pytest.approx(1 / 0.1)  # the other
    share, low, high = shares(effects, totals, ["a", "a", "c"], confidence=0.95)
    assert share == pytest.approx(2 / 10.1)
    assert np.isnan([low, high]).all()  # of one group there is nothing to draw


@pytest.mark.filterwarnings("error")
def test_of_nothing_there_is_no_share() -> None:
    assert np.isnan(share_of(np.array([1.0, -1.0, 0.0]), np.array([0.0, -2.0, 0.0]))).all()
    assert np.isnan(share_of(np.array([1.0, 1.0]), np.array([5e-324, np.nan]))).all()  # never infinite
    effects = np.array([[1.0], [1.0]])
    for totals in ([1.0, -1.0], [0.0, 0.0], [-2.0, 1.0]):
        assert np.isnan(np.array(shares(effects, np.array(totals), ["a", "b"], confidence=0.95))).all()
    share, low, high = shares(effects, np.array([3.0, -1.0]), ["a", "b"], confidence=0.95)
    assert share == 1.0
    assert np.isnan([low, high]).all()  # a resample of the second fact alone has no share


def test_tables_hold_the_shares_of_the_facts_that_have_the_role() -> None:
    table = numbered().table("mlp")
    assert table.total_effect == 4500
    assert table.share[ROLES.index("first_subject")].tolist() == [(10 - 1000) / 4000, (11 - 1000) / 4000]
    assert table.share[ROLES.index("last_subject")].tolist() == [(65 - 1000) / 4500, (66 - 1000) / 4500]
    place = ROLES.index("last_subject"), 0
    assert table.share_low[place] == pytest.approx((30 - 1000) / 4000)
    assert table.share_high[place] == pytest.approx((100 - 1000) / 5000)


@pytest.mark.filterwarnings("error")
def test_the_summary_tells_what_was_taken_and_what_came_back() -> None:
    effects = made_up([0.1, 0.4, 0.2], facts=4, kinds=("resid", "mlp"))
    assert effects.summary().split("\n") == [
        "The corruption lowers the answer's mean probability by 0.8, from 0.9 to 0.1, on 4 facts. Restoring one clean activation "
        "brings back at most (the stream counts at subject tokens alone: at the last token it ends as the answer's first token):",
        "- the stream after layer 1 at the first subject token: 0.4, 50.0% (95% interval 50.0% to 50.0%) of what the corruption "
        "took.",
        "- the MLP of layer 1 at the first subject token: 0.4, 50.0% (95% interval 50.0% to 50.0%) of what the corruption took.",
    ]
    some = replace(effects, clean=np.array([0.9, 0.9, 0.9, 0.1]))
    assert "the MLP of layer 1 at the first subject token: 0.4, 66.7%" in some.summary()  # 0.4 of a mean of 0.6
    assert some.summary().endswith(
        "The corruption took nothing of 1 fact: it has no share of its own, and counts in the means."
    )
    assert ", 0.0% (95% interval 0.0% to 0.0%) of" in made_up([-1e-5], facts=4, tokens=3, span=(0, 3)).summary()
    nothing = replace(effects, clean=np.array([0.1, 0.1, 0.1, 0.0]))
    assert nothing.summary().endswith("There are no shares: on average the corruption took nothing (-0.025).")
    assert "%" not in nothing.summary()
    assert "mean total effect -0.025, no shares: it is not above zero)" in repr(nothing)
    assert nothing.to_dataframe().share.isna().all()
    assert plot(nothing).png.startswith(b"\x89PNG")
    assert plot(nothing, 0).png.startswith(b"\x89PNG")


def test_cut_windows_are_also_told_per_layer_restored() -> None:
    effects = replace(made_up([0.4, 0.5, 0.3, 0.3, 0.0], facts=3, kinds=("resid", "mlp")), window=4)
    many = [2, 3, 4, 4, 3]  # from two before a layer to one after it, within five layers
    table = effects.table("mlp")
    assert table.layers_restored.tolist() == many
    row = ROLES.index("last_subject")
    assert table.per_layer[row] == pytest.approx([0.2, 0.5 / 3, 0.075, 0.075, 0.0])
    stream = effects.table("resid")
    assert stream.layers_restored.tolist() == [1] * 5
    assert np.array_equal(stream.per_layer, stream.mean, equal_nan=True)

    cells = effects.to_dataframe()
    found = cells[(cells.fact == "f1") & (cells.position == 2)].sort_values("layer")
    assert found[found.kind == "mlp"].layers_restored.tolist() == many
    assert found[found.kind == "mlp"].indirect_per_layer.tolist() == pytest.approx([0.2, 0.5 / 3, 0.075, 0.075, 0.0])
    assert found[found.kind == "resid"].layers_restored.tolist() == [1] * 5
    assert (cells[cells.kind == "resid"].indirect_per_layer == cells[cells.kind == "resid"].indirect).all()

    said = effects.summary().split("\n")
    assert said[0].endswith(
        "Restoring one clean activation (MLPs: 4 layers together) brings back at most (the stream counts at subject tokens "
        "alone: at the last token it ends as the answer's first token):"
    )
    assert said[1].startswith("- the stream after layer 1 at the first subject token: 0.5, 62.5%")
    assert said[2].startswith("- the MLPs of layers 0-2 at the first subject token: 0.5, 62.5%")
    assert said[3] == (
        "  Windows of 4 are cut short by the ends of the model (2 about layer 0, 3 about layer 1, 3 about layer 4). Per layer "
        "restored, most comes back from the MLPs of layers 0-1 at the first subject token: 0.2 each."
    )
    assert len(said) == 4
    assert "cut short" not in replace(effects, window=1).summary()


def test_that_the_end_of_the_stream_is_the_answer_is_no_finding() -> None:
    effects = made_up([0.1, 0.4, 0.2], facts=4, kinds=("resid", "mlp"))
    for kind in effects.kinds:
        for cells in effects.restored[kind]:
            cells[-1, 2] = 0.9  # all of it, at the last token
    said = effects.summary()
    assert "- the stream after layer 1 at the first subject token: 0.4, 50.0%" in said
    assert "- the MLP of layer 2 at the last token: 0.8, 100.0%" in said
    stream = replace(effects, restored={"resid": effects.restored["resid"]})
    assert "at most 50.0% brought back (resid 1, first subject)" in repr(stream)
    assert "at most 100.0% brought back (mlp 2, last)" in repr(effects)
    assert peak("resid", ["last"], np.array([[np.nan, 0.3]])) == (0, 1)  # nothing else was traced
    assert peak("mlp", ["last"], np.array([[np.nan, np.nan]])) is None
