"""The same facts again in a changed model: the same noise, nothing dropped, and differences fact by fact."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_tracing import known, made_up, say, tiny

from lm.errors import UserError
from lm.model import LanguageModel, ModelSpec
from lm.prompts import PromptSpec
from tests.forked import run_forked
from tracing import Effects, Fact, GaussianNoise, TokenReplacement, difference, plot_difference, retrace, trace
from tracing.question.encoded_fact import encode_fact, why_unknown
from tracing.stages.retrace.config import RetraceConfig
from tracing.stages.retrace.stage import run_retrace

ROOT = Path(__file__).resolve().parents[2]


def changed(model: LanguageModel, layer: int = 2) -> LanguageModel:
    """The model with the MLP of a layer silenced, so that it answers otherwise."""
    with torch.no_grad():
        model.model.model.layers[layer].mlp.down_proj.weight.zero_()  # type: ignore[union-attr, index]
    return model


def swappable(model: LanguageModel) -> list[Fact]:
    names = ("ada byron", "king now", "w3 w9", "ada")
    return [Fact(f"where is {name} ?", name, say(model, f"where is {name} ?", 2), id=name) for name in names]


@pytest.mark.parametrize(
    "corruption",
    [GaussianNoise(), GaussianNoise(covariance="full"), GaussianNoise(sigma=0.2), TokenReplacement(samples=2)],
    ids=["noise", "full", "absolute", "names"],
)
def test_an_unchanged_model_gives_the_same_effects(corruption: GaussianNoise | TokenReplacement) -> None:
    model = tiny()
    before = trace(model, swappable(model), corruption=corruption, kinds=["mlp", "resid"], window=2, progress=False)
    again = retrace(model, before, progress=False)
    assert again.facts == before.facts
    assert again.sigma == before.sigma
    assert (again.metric, again.window, again.kinds) == (before.metric, before.window, before.kinds)
    for kind in before.kinds:
        for one, other in zip(before.restored[kind], again.restored[kind], strict=True):
            assert np.array_equal(one, other)
    found = difference(before, again)
    assert found.clean.change == found.corrupted.change == 0
    assert not np.nan_to_num(found.change["mlp"].mean).any()
    assert "did not change beyond chance" in found.sentence("mlp")


def test_settings_come_from_the_first_trace() -> None:
    model = tiny()
    spec = PromptSpec(format="chat")
    facts = [replace(fact, answer=say(model, f"<|user|> {fact.prompt} <|assistant|>", 2)) for fact in known(model)]
    settings = {"metric": "log_probability", "prompt": spec, "positions": "subject_and_last", "sever": "attn"}
    before = trace(model, facts, kinds=["mlp", "attn"], progress=False, **settings)  # type: ignore[arg-type]
    again = retrace(model, before, kinds=["mlp"], progress=False)
    assert again.kinds == ("mlp",)
    for name in ("prompt", "positions", "sever", "engine"):
        assert again.provenance[name] == before.provenance[name]
    for one, other in zip(before.restored["mlp"], again.restored["mlp"], strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)  # other cells in the batch round otherwise


def test_facts_that_are_no_longer_answered_stay_and_the_noise_is_that_of_before(tmp_path: Path) -> None:
    model = tiny()
    facts = [*known(model, how_many=4), Fact("w3 w9 ada byron does live", "ada", "w20 w21", id="never known")]
    before = trace(model, facts, kinds=["mlp"], progress=False)
    before.save(tmp_path / "effects.npz")
    before = Effects.load(tmp_path / "effects.npz")
    with torch.no_grad():  # the measured deviation of the subjects would be another one
        model.model.get_input_embeddings().weight.mul_(1.5)  # type: ignore[union-attr]
    after = retrace(changed(model), before, progress=False)
    assert after.facts == before.facts
    assert after.sigma == before.sigma
    assert [one.fact.id for one in after.skipped] == ["never known"]
    assert after.provenance["before"] == before.provenance["weights"] != after.provenance["weights"]
    assert any(why_unknown(model, encode_fact(model, fact, PromptSpec(), "probability")) for fact in before.facts)
    direct = trace(
        model, facts[:4], corruption=GaussianNoise(sigma=before.sigma), kinds=["mlp"], only=facts[:4], progress=False
    )
    for one, other in zip(direct.restored["mlp"], after.restored["mlp"], strict=True):
        assert np.array_equal(one, other)


def test_differences_are_paired_and_of_the_right_cells() -> None:
    one, other = made_up([0.1, 0.5, 0.2], facts=12, noise=0.4, seed=1), made_up([0.1, 0.0, 0.2], facts=12, noise=0.0)
    after = replace(other, clean=one.clean - 0.3, restored={"mlp": [cells.copy() for cells in one.restored["mlp"]]})
    for cells in after.restored["mlp"]:
        cells[1:4, 1] -= 0.4  # the same facts but for one layer
    found = difference(one, after)
    assert (found.clean.before, found.clean.after) == (pytest.approx(0.9), pytest.approx(0.6))
    assert [found.clean.change, found.clean.low, found.clean.high] == pytest.approx([-0.3] * 3)
    assert found.corrupted.change == 0
    row = found.change["mlp"].roles.index("last_subject")
    assert found.change["mlp"].mean[row] == pytest.approx([0.0, -0.4, 0.0], abs=1e-12)
    assert found.change["mlp"].high[row, 1] == pytest.approx(-0.4)  # noise that is in both is not in the difference
    gaps = (after.by_role("mlp", ["last"]) - one.by_role("mlp", ["last"])).mean(axis=0)[0]
    assert found.change["mlp"].mean[-1] == pytest.approx(gaps)
    role, layer, cell = found.strongest("mlp")
    assert (layer, cell.change) == (1, pytest.approx(-0.4))
    assert role in ("first_subject", "middle_subject", "last_subject")
    said = found.sentence("mlp")
    assert "On 12 facts the answer's mean probability fell from 0.9 to 0.6 (a change of -0.3" in said
    assert "the MLP of layer 1 at the" in said


def test_the_streams_end_at_the_last_token_is_never_the_strongest() -> None:
    one = made_up([0.1, 0.5, 0.2], facts=4, noise=0.0)
    stream = [cells.copy() for cells in one.restored["mlp"]]
    for cells in stream:
        cells[-1] = 0.9  # the answer itself
    both = replace(one, restored={"resid": stream, "mlp": stream})
    found = difference(both, both)
    assert found.strongest("resid")[:2] == ("first_subject", 1)
    assert found.strongest("mlp")[0] == "last"


def test_intervals_of_the_change_cover_it() -> None:
    held = 0
    for seed in range(40):
        one, other = (
            made_up([0.5], facts=30, noise=0.3, seed=seed),
            made_up([0.2], facts=30, noise=0.3, seed=seed + 500),
        )
        change = difference(one, other, confidence=0.9, resamples=300).change["mlp"]
        row = change.roles.index("last_subject")
        held += bool(change.low[row, 0] <= -0.3 <= change.high[row, 0])
    assert 31 <= held <= 40


def test_traces_of_other_facts_or_settings_are_not_compared() -> None:
    one = made_up([0.1, 0.2], facts=3)
    with pytest.raises(UserError, match="hold other facts"):
        difference(one, made_up([0.1, 0.2], facts=2))
    with pytest.raises(UserError, match="have the window 1 and 3"):
        difference(one, replace(one, window=3))
    with pytest.raises(UserError, match="no kind is in both"):
        difference(one, made_up([0.1, 0.2], facts=3, kinds=("attn",)))
    with pytest.raises(UserError, match="have the layers 2 and 3"):
        difference(one, made_up([0.1, 0.2, 0.3], facts=3))


def test_a_model_or_effects_that_do_not_fit_are_refused() -> None:
    model = tiny()
    before = trace(model, known(model), kinds=["mlp"], progress=False)
    with pytest.raises(UserError, match="has 3 layers and the effects of before 4"):
        retrace(tiny(layers=3), before, progress=False)
    with pytest.raises(UserError, match="into other tokens than before"):
        retrace(model, replace(before, tokens=(("x",), *before.tokens[1:])), progress=False)
    with pytest.raises(UserError, match="do not say their corruption"):
        retrace(model, made_up([0.1] * 4), progress=False)
    full = trace(model, known(model), corruption=GaussianNoise(covariance="full"), kinds=["mlp"], progress=False)
    with torch.no_grad():
        model.model.get_input_embeddings().weight.mul_(1.1)  # type: ignore[union-attr]
    with pytest.raises(UserError, match="can be repeated in absolute units"):
        retrace(model, full, progress=False)


def test_some_facts_of_effects() -> None:
    effects = made_up([0.1, 0.4], facts=5, noise=0.2)
    some = effects.some([3, 1])
    assert [fact.id for fact in some.facts] == ["f3", "f1"]
    assert np.array_equal(some.restored["mlp"][0], effects.restored["mlp"][3])
    assert some.total.tolist() == effects.total[[3, 1]].tolist()


def test_the_picture_shows_what_fell_and_what_rose() -> None:
    one = made_up([0.5, 0.1, 0.1, 0.1], facts=4)
    fell, rose = (
        difference(one, made_up(profile, facts=4)) for profile in ([0.0, 0.1, 0.1, 0.1], [0.5, 0.1, 0.1, 0.6])
    )
    assert plot_difference(fell, "mlp").png.startswith(b"\x89PNG")
    assert plot_difference(fell, "mlp").png == plot_difference(fell, "mlp").png != plot_difference(rose, "mlp").png
    assert plot_difference(fell, "mlp", layers=[0]).png != plot_difference(fell, "mlp").png
    assert plot_difference(difference(one, one), "mlp").png.startswith(b"\x89PNG")
    with pytest.raises(UserError, match="'attn' was not traced both times"):
        plot_difference(fell, "attn")


def test_the_script_writes_what_changed(tmp_path: Path) -> None:
    model = tiny("olmo")
    facts = known(model, how_many=5)
    before = trace(model, facts, kinds=["resid", "mlp"], progress=False)
    before.save(tmp_path / "trace" / "effects.npz")
    changed(model).model.save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(tmp_path / "model")
    words = ["--before", str(tmp_path / "trace"), "--model.path", str(tmp_path / "model"), "--model.device", "cpu"]
    out = tmp_path / "again"
    done = run_forked(ROOT / "scripts" / "retrace.py", *words, "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("On 5 facts the answer's mean probability") == 2
    written = json.loads((out / "difference.json").read_text())
    after = Effects.load(out / "effects.npz")
    found = difference(before, after)
    assert written["clean"]["change"] == pytest.approx(found.clean.change)
    assert written["strongest_before"]["mlp"]["layer"] == found.strongest("mlp")[1]
    row = found.change["mlp"].roles.index("last_subject")
    assert written["tables"]["change"]["mlp"]["last_subject"]["mean"] == pytest.approx(found.change["mlp"].mean[row])
    assert (out / "mlp.png").read_bytes().startswith(b"\x89PNG")
    before.some([0, 1, 2]).save(tmp_path / "trace" / "effects.npz")
    with pytest.raises(UserError, match="before changed since it began"):
        run_retrace(
            RetraceConfig(
                model=ModelSpec(path=str(tmp_path / "model"), device="cpu"),
                before=str(tmp_path / "trace"),
                out=str(out),
                resume=True,
            )
        )
    with pytest.raises(UserError, match="no effects file"):
        run_retrace(RetraceConfig(before=str(tmp_path / "absent.npz"), out=str(tmp_path / "x")))


def test_of_one_group_nothing_is_said_to_have_fallen() -> None:
    before, after = (made_up([height, 0.1, 0.1], facts=4, noise=0.01, groups=1) for height in (0.9, 0.2))
    found = difference(before, after)
    assert np.isnan([found.clean.low, found.change["mlp"].low[3, 0]]).all()
    assert "chance cannot be told" in found.sentence("mlp")
    assert "fell" not in found.sentence("mlp")
    written = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert written["clean"]["low"] is written["strongest_before"]["mlp"]["high"] is None


def test_a_fact_that_is_given_twice_is_traced_again_as_often_as_before() -> None:
    model = tiny()
    one, other = known(model, how_many=2)
    before = trace(model, [one, other, one], kinds=["mlp"], max_facts=2, seed=None, progress=False)
    assert before.facts == retrace(model, before, progress=False).facts == (one, other)
    twice = trace(model, [one, other, one], kinds=["mlp"], progress=False)
    assert retrace(model, twice, progress=False).facts == (one, other, one)
