"""What windows bring back beyond their layers: nothing where layers add up, and by hand from two traces of one model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tiny_tracing import known, made_up, tiny

from lm import UserError
from tracing import CausalTracing, Effects, GaussianNoise, interaction, trace

PROFILE = np.array([0.1, 0.5, 0.3, 0.2, 0.05, 0.0, 0.0, 0.1])


def windowed(single: Effects, window: int, extra: float) -> Effects:
    """Made-up effects of windows: `extra` times the sum of their layers' effects."""
    restored = {}
    for kind in single.kinds:
        restored[kind] = []
        for cells, low in zip(single.restored[kind], single.corrupted, strict=True):
            effects = cells - low
            layers = effects.shape[1]
            starts = [(max(0, layer - window // 2), layer + (window + 1) // 2) for layer in range(layers)]
            restored[kind].append(low + extra * np.stack([effects[:, a:b].sum(1) for a, b in starts], 1))
    return replace(single, restored=restored, window=window)


def test_windows_that_add_up_have_no_interaction() -> None:
    single = made_up(PROFILE, facts=8, noise=0.05, kinds=("mlp", "attn"))
    found = interaction(windowed(single, 3, 1.0), single)
    assert found.kinds == ("mlp", "attn")
    for kind in found.kinds:
        assert max(np.abs(cells).max() for cells in found.beyond.indirect(kind)) < 1e-12
        assert found.ratio(kind) == pytest.approx((1, 1, 1))
    assert found.edges("mlp") == [0, 7]


def test_what_is_beyond_the_sum_has_an_interval_and_a_ratio() -> None:
    single = made_up(PROFILE, facts=30, noise=0.05)
    found = interaction(windowed(single, 3, 1.5), single)
    assert found.ratio("mlp") == pytest.approx((1.5, 1.5, 1.5))
    table = found.beyond.table("mlp", roles=["last_subject"])
    expected = 0.5 * (PROFILE[0] + PROFILE[1] + PROFILE[2])
    assert table.mean[0, 1] == pytest.approx(expected, abs=0.05)
    assert table.low[0, 1] < table.mean[0, 1] < table.high[0, 1]
    assert table.window == 3
    told = found.to_json()
    assert told["kinds"]["mlp"]["edges"] == [0, 7]
    row = told["kinds"]["mlp"]["roles"]["last_subject"]
    np.testing.assert_allclose(
        np.array(row["window"]["mean"]) - row["summed"]["mean"], row["beyond"]["mean"], atol=1e-12
    )
    assert told["kinds"]["mlp"]["roles"]["first_after"]["beyond"]["mean"] == [0.0] * 8
    noisy = replace(
        windowed(single, 3, 1.5), restored={"mlp": [cells + 0.1 * n for n, cells in enumerate(single.restored["mlp"])]}
    )
    ratio, low, high = interaction(noisy, single).ratio("mlp")
    assert low < ratio < high


def test_of_one_group_the_ratio_has_no_interval() -> None:
    single = made_up(PROFILE, facts=4, noise=0.05, groups=1)
    found = interaction(windowed(single, 3, 1.5), single)
    ratio, *spread = found.ratio("mlp")
    assert ratio == pytest.approx(1.5)
    assert np.isnan(spread).all()
    assert found.sentence("mlp") == "Windows of 3 MLPs bring back 1.50 times what their layers bring back one by one."
    assert found.to_json()["kinds"]["mlp"]["ratio"] == [pytest.approx(1.5), None, None]


def test_by_hand_from_two_traces_of_a_model() -> None:
    model = tiny("olmo")
    facts = known(model)
    noise = GaussianNoise(samples=2)
    single, wide = (
        trace(model, facts, corruption=noise, kinds=["resid", "mlp", "attn"], window=window, progress=False)
        for window in (1, 2)
    )
    found = interaction(wide, single)
    assert found.kinds == ("mlp", "attn")
    alone, window = single.indirect("mlp")[1], wide.indirect("mlp")[1]
    np.testing.assert_allclose(
        found.beyond.indirect("mlp")[1][:, 2], window[:, 2] - alone[:, 1] - alone[:, 2], atol=1e-9
    )
    np.testing.assert_allclose(found.beyond.indirect("mlp")[1][:, 0], window[:, 0] - alone[:, 0], atol=1e-9)
    np.testing.assert_allclose(found.beyond.indirect("mlp")[1][:, 0], 0, atol=1e-6)  # a window of a single layer
    assert np.abs(found.beyond.indirect("mlp")[1][:, 2]).max() > 1e-4
    assert found.edges("attn") == [0]
    asked = CausalTracing(corruption=noise, window=2, metric="probability", positions="all")
    told = asked.localize(model, facts, progress=False).details["interaction"]
    ratio = [None if np.isnan(one) else pytest.approx(one) for one in found.ratio("mlp")]
    assert told["kinds"]["mlp"]["ratio"] == ratio
    assert told["kinds"]["attn"]["edges"] == [0]
    assert "interaction" not in replace(asked, window=1).localize(model, facts, progress=False).details
    wide_as_the_model = replace(asked, window=9).localize(model, facts, progress=False)
    assert wide_as_the_model.details["interaction"]["kinds"]["mlp"]["ratio"] is None
    with pytest.raises(UserError, match="differ in corruption"):
        interaction(wide, trace(model, facts, corruption=replace(noise, sigma=found.window.sigma), progress=False))
    with pytest.raises(UserError, match="differ in facts"):
        interaction(wide, trace(model, facts[:2], corruption=replace(noise, sigma=wide.sigma), progress=False))


def test_traces_that_do_not_belong_together_are_refused() -> None:
    single = made_up(PROFILE)
    wide = windowed(single, 3, 1.0)
    with pytest.raises(UserError, match="not of 1 and 1"):
        interaction(single, single)
    with pytest.raises(UserError, match="not of 3 and 3"):
        interaction(wide, wide)
    with pytest.raises(UserError, match="differ in metric"):
        interaction(wide, replace(single, metric="log_probability"))
    with pytest.raises(UserError, match="neither mlp nor attn in common"):
        interaction(wide, made_up(PROFILE, kinds=("attn",)))
    with pytest.raises(UserError, match="no window of 9 layers is whole in a model of 8"):
        interaction(windowed(single, 9, 1.0), single).ratio("mlp")


def test_a_ratio_to_nothing_is_not_told() -> None:
    """Single layers whose sum is not shown to be above zero: any ratio could come out, and none means anything."""
    single = made_up([0.0] * 8, facts=30, noise=0.05)
    found = interaction(windowed(single, 3, 1.5), single)
    assert np.isnan(found.ratio("mlp")).all()
    assert found.sentence("mlp") == (
        "Windows of 3 MLPs cannot be compared with single layers: one by one their layers bring back nothing that could be "
        "told from zero."
    )
    assert found.to_json()["kinds"]["mlp"]["ratio"] == [None, None, None]
    below = made_up([-0.1] * 8, facts=30)
    assert np.isnan(interaction(windowed(below, 3, 1.5), below).ratio("mlp")).all()
