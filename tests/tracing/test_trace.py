"""`trace`: unknown facts are reported, training's tokens are traced, an interrupted run goes on, mistakes are refused."""

from __future__ import annotations

import doctest
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_tracing import known, say, tiny

from lm.errors import UserError
from lm.model import fingerprint
from lm.prompts import PromptSpec, encode_pair, encode_prompt
from tracing import Effects, Fact, GaussianNoise, TraceSettings, causal_tracing, estimate, trace
from tracing.corruption.noise import embedding_std
from tracing.question.encoded_fact import encode_fact, why_unknown


def test_unknown_facts_are_left_out_with_what_the_model_said() -> None:
    model = tiny()
    facts = known(model, answer_tokens=2)
    words = facts[1].answer.split()
    half = replace(facts[1], answer=f"{words[0]} w30" if words[1] != "w30" else f"{words[0]} w31", id="half")
    effects = trace(model, [facts[0], half, facts[2]], kinds=["resid"], progress=False)
    assert [fact.id for fact in effects.facts] == ["fact0", "fact2"]
    (left,) = effects.skipped
    assert left.fact == half
    assert facts[1].answer in left.reason
    assert half.answer in left.reason
    assert len(effects.clean) == len(effects.tokens) == len(effects.restored["resid"]) == 2
    # The noise is measured on the subjects of all facts, known or not.
    assert effects.sigma == trace(model, facts, kinds=["resid"], progress=False).sigma
    # Its first token alone is right.
    first = trace(model, [facts[0], half], kinds=["resid"], metric="first_token_probability", progress=False)
    assert not first.skipped


def test_no_known_fact_is_an_error_that_names_the_first() -> None:
    model = tiny()
    with pytest.raises(UserError, match=r"none of the 1 facts can be traced .*'wrong'.*instead of"):
        trace(model, [Fact("where is ada now ?", "ada", "w30 w31 w32 w33", id="wrong")], progress=False)


def test_max_facts_leaves_the_others_out_in_words() -> None:
    model = tiny()
    effects = trace(model, known(model), kinds=["mlp"], max_facts=1, progress=False)
    assert len(effects.facts) == 1
    assert [one.reason for one in effects.skipped] == ["not needed: max_facts is 1"] * 2


def test_max_facts_are_drawn_over_subjects() -> None:
    model = tiny()
    facts = [replace(fact, group="ada" if place < 4 else "king") for place, fact in enumerate(known(model, how_many=6))]

    def traced(**settings: Any) -> list[str]:
        effects = trace(model, facts, kinds=["mlp"], positions="subject_and_last", progress=False, **settings)
        assert sorted(one.fact.id for one in effects.skipped) == sorted(
            {f"fact{n}" for n in range(6)} - set(ids(effects))
        )
        return ids(effects)

    def ids(effects: Effects) -> list[str]:
        return [fact.id for fact in effects.facts]

    for seed in range(4):
        drawn = traced(max_facts=4, seed=seed)
        assert drawn == sorted(drawn)  # in the order given
        assert {"fact4", "fact5"} < set(drawn)  # two of each person, not four of the first
        assert set(traced(max_facts=2, seed=seed)) < set(drawn)
    assert traced(max_facts=4) == traced(max_facts=4, seed=0)
    assert len({tuple(traced(max_facts=2, seed=seed)) for seed in range(8)}) > 1
    assert traced(max_facts=4, seed=None) == ["fact0", "fact1", "fact2", "fact3"]
    assert traced() == [f"fact{place}" for place in range(6)]


@pytest.mark.parametrize(
    "spec", [PromptSpec(), PromptSpec(format="chat"), PromptSpec(format="chat", system="ada is now")]
)
def test_the_traced_prompt_is_the_trained_one(spec: PromptSpec) -> None:
    model = tiny()
    prompt = "where is ada byron now ?"
    ids = encode_prompt(model.tokenizer, prompt, spec)
    with torch.no_grad():
        answer = model.tokenizer.decode([int(model.model(torch.tensor([ids])).logits[0, -1].argmax())])
    fact = Fact(prompt, "ada byron", answer)
    effects = trace(model, [fact], kinds=["resid"], prompt=spec, progress=False)
    trained = encode_pair(model.tokenizer, prompt, answer, spec)
    encoded = encode_fact(model, fact, spec, "probability")
    assert list(encoded.prompt_ids) == trained.ids[: trained.answer_start] == ids
    assert list(encoded.answer_ids) == trained.ids[trained.answer_start : -1]  # all but the EOS that training appends
    assert trained.ids[-1] == model.tokenizer.eos_token_id
    assert len(effects.restored["resid"][0]) == len(ids)
    start, end = effects.subject_spans[0]
    assert effects.tokens[0][start:end] == ("ada", "byron")
    assert effects.provenance["prompt"]["format"] == spec.format


def test_the_first_of_two_occurrences_is_corrupted() -> None:
    model = tiny()
    encoded = encode_fact(model, Fact("is ada where ada is", "ada", "w3"), PromptSpec(), "probability")
    assert encoded.span == (1, 2)


def test_the_noise_is_three_deviations_of_the_subjects_own_embeddings() -> None:
    model = tiny()
    subjects = ["ada byron", "king", "king"]
    rows = [model.tokenizer.encode(one) for one in subjects]
    weight = model.model.get_input_embeddings().weight.detach()
    values = torch.cat([weight[row].reshape(-1) for row in rows])
    assert embedding_std(model, subjects) == pytest.approx(float(values.std()), rel=1e-6)
    assert GaussianNoise().measure(model, subjects) == pytest.approx(3 * float(values.std()), rel=1e-6)
    assert GaussianNoise(sigma=0.25).measure(model, subjects) == 0.25


def test_the_noise_is_drawn_as_published() -> None:
    embeddings = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    batch = GaussianNoise(samples=3, seed=7).corrupt(embeddings, (2, 4), sigma=0.5)
    assert torch.equal(batch[0], embeddings)
    draws = np.random.RandomState(7).randn(3, 2, 4)
    expected = embeddings.double()[None, 2:4] + 0.5 * torch.from_numpy(draws)
    assert torch.equal(batch[1:, 2:4], expected.float())
    untouched = [0, 1, 4, 5]
    assert torch.equal(batch[1:, untouched], embeddings[untouched].expand(3, -1, -1))
    assert torch.equal(batch, GaussianNoise(samples=3, seed=7).corrupt(embeddings, (2, 4), sigma=0.5))
    assert GaussianNoise().corrupt(embeddings.bfloat16(), (0, 1), 0.5).dtype == torch.bfloat16


def test_noise_of_the_full_covariance_has_that_of_the_embeddings() -> None:
    model = tiny()
    with torch.no_grad():
        model.model.get_input_embeddings().weight[:, 0] *= 4  # so that the coordinates differ
    rows = model.model.get_input_embeddings().weight.detach().double()
    noise = GaussianNoise(covariance="full", samples=40_000, sigmas=2.0)
    encoded = encode_fact(model, known(model, how_many=1)[0], PromptSpec(), "probability")
    batch = noise.bind(model, [encoded]).batch(encoded).double()
    start, end = encoded.span
    drawn = (batch[1:, start:end] - batch[:1, start:end]).reshape(-1, rows.shape[1])
    expected = 4.0 * torch.cov(rows.T)
    assert torch.allclose(torch.cov(drawn.T), expected, atol=0.05 * float(expected.diagonal().max()))
    assert torch.equal(batch[1:, end:], batch[:1, end:].expand(len(batch) - 1, -1, -1))
    effects = trace(model, known(model), corruption=GaussianNoise(covariance="full"), kinds=["mlp"], progress=False)
    assert effects.sigma == pytest.approx(3 * float(rows.var(0).mean().sqrt()))
    for wrong, says in (
        ({"covariance": "diagonal"}, "use isotropic or full"),
        ({"covariance": "full", "sigma": 1.0}, "give sigmas"),
    ):
        with pytest.raises(UserError, match=says):
            GaussianNoise(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("engine", ["wavefront", "reference"])
def test_an_interrupted_trace_goes_on_and_ends_in_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    model = tiny()
    facts = known(model)
    whole = trace(model, facts, engine=engine, progress=False)
    computed: list[str] = []
    real = causal_tracing.make_engine

    def counting(*args: Any) -> Any:
        made = real(*args)
        traced = made.trace

        def counted(encoded_facts: Any, *rest: Any) -> Any:
            for encoded in encoded_facts:
                if encoded.fact.id == "fact2" and not (tmp_path / "go").exists():
                    raise KeyboardInterrupt
                computed.append(encoded.fact.id)
            return traced(encoded_facts, *rest)

        monkeypatch.setattr(made, "trace", counted)
        return made

    monkeypatch.setattr(causal_tracing, "make_engine", counting)
    with pytest.raises(KeyboardInterrupt):
        trace(model, facts, engine=engine, cache=tmp_path / "cache", progress=False)
    assert computed == ["fact0", "fact1"]
    files = sorted((tmp_path / "cache").iterdir())
    assert len(files) == 2
    files[0].write_bytes(files[0].read_bytes()[:50])  # damaged: counts as absent
    (tmp_path / "go").touch()
    again = trace(model, facts, engine=engine, cache=tmp_path / "cache", progress=False)
    assert len(computed) == 4
    assert computed.count("fact2") == 1
    assert np.array_equal(again.clean, whole.clean)
    for kind in whole.kinds:
        for one, other in zip(again.restored[kind], whole.restored[kind], strict=True):
            assert np.array_equal(one, other)
    trace(model, facts, engine=engine, cache=tmp_path / "cache", progress=False)
    assert len(computed) == 4


def test_the_cache_is_of_these_settings_and_weights_only(tmp_path: Path) -> None:
    model = tiny()
    facts = known(model, how_many=1)
    trace(model, facts, kinds=["mlp"], cache=tmp_path, progress=False)
    for changed in (
        {"corruption": GaussianNoise(seed=2)},
        {"corruption": GaussianNoise(sigmas=2)},
        {"window": 2},
        {"metric": "log_probability"},
        {"kinds": ["attn"]},
        {"positions": "subject_and_last"},
    ):
        before = len(list(tmp_path.iterdir()))
        settings = {"kinds": ["mlp"], **changed}
        fresh = trace(model, facts, cache=tmp_path, progress=False, **settings)  # type: ignore[arg-type]
        assert len(list(tmp_path.iterdir())) == before + 1, changed
        direct = trace(model, facts, progress=False, **settings)  # type: ignore[arg-type]
        kind = fresh.kinds[0]
        assert np.array_equal(fresh.restored[kind][0], direct.restored[kind][0], equal_nan=True)
    mark = fingerprint(model)
    assert fingerprint(tiny()) == mark
    with torch.no_grad():
        model.model.model.layers[2].mlp.up_proj.weight[3, 4] += 1e-3
    assert fingerprint(model) != mark


def test_a_model_that_gives_nan_is_refused_in_words() -> None:
    model = tiny("llama")
    facts = known(model, how_many=1)
    with torch.no_grad():
        model.model.model.norm.weight[0] = float("nan")
    with pytest.raises(UserError, match=r"NaN or infinite logits for fact 'fact0'.*float32"):
        trace(model, facts, progress=False)


def test_nan_that_only_the_noise_brings_is_refused_in_words() -> None:
    model = tiny()
    facts = known(model, how_many=1)
    with pytest.raises(UserError, match=r"'fact0' gave NaN"):
        trace(model, facts, corruption=GaussianNoise(sigma=1e38), progress=False)


def test_wrong_settings_are_refused_before_anything_runs() -> None:
    model = tiny()
    facts = known(model, how_many=1)
    for settings, message in (
        ({"engine": "refrence"}, "did you mean 'reference'"),
        ({"engine": "wave"}, "did you mean 'wavefront'"),
        ({"memory": 0}, "memory is 0"),
        ({"sever": "resid"}, "sever is 'resid'"),
        ({"kinds": ["head"]}, "choose of resid, mlp, attn"),
        ({"kinds": []}, "choose of resid, mlp, attn"),
        ({"kinds": ["mlp", "mlp"]}, "once each"),
        ({"window": 0}, "window is 0"),
        ({"metric": "logit"}, "metric 'logit' is unknown"),
        ({"positions": "subject"}, "positions 'subject' are unknown"),
        ({"max_facts": 0}, "max_facts is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"facts": []}, "no facts"),
    ):
        with pytest.raises(UserError, match=message):
            trace(**{"model": model, "facts": facts, "progress": False, **settings})  # type: ignore[arg-type]


def test_a_known_fact_is_what_greedy_decoding_says() -> None:
    model = tiny("gpt2")
    prompt = "w3 w9 ada byron does live"
    answer = say(model, prompt, 4)
    assert why_unknown(model, encode_fact(model, Fact(prompt, "ada", answer), PromptSpec(), "probability")) is None
    other = " ".join([*answer.split()[:3], "w30" if answer.split()[3] != "w30" else "w31"])
    reason = why_unknown(model, encode_fact(model, Fact(prompt, "ada", other), PromptSpec(), "probability"))
    assert reason is not None
    assert repr(answer) in reason


def test_facts_of_which_the_corruption_takes_too_little_are_left_out_first() -> None:
    model = tiny()
    facts = known(model, how_many=5)
    everything = trace(model, facts, kinds=["mlp"], metric="log_probability", progress=False)
    bound = float(np.median(everything.total))
    some = trace(model, facts, kinds=["mlp"], metric="log_probability", least_total=bound, progress=False)
    kept = [index for index, total in enumerate(everything.total) if total >= bound]
    assert 0 < len(kept) < len(facts)
    assert some.facts == tuple(facts[index] for index in kept)
    for mine, index in enumerate(kept):
        assert np.array_equal(some.restored["mlp"][mine], everything.restored["mlp"][index])
    assert all("under least_total" in one.reason for one in some.skipped)
    assert len(some.skipped) == len(facts) - len(kept)
    with pytest.raises(UserError, match="takes only"):
        trace(model, facts, kinds=["mlp"], least_total=2.0, progress=False)
    with pytest.raises(UserError, match="least_total is -1"):
        trace(model, facts, least_total=-1, progress=False)


def test_the_example_in_the_help_runs() -> None:
    (example,) = doctest.DocTestFinder(recurse=False).find(trace, "trace")
    told = doctest.DocTestRunner(verbose=False).run(example)
    assert (told.failed, told.attempted) == (0, 8)


def test_settings_give_what_keywords_give_and_are_not_mixed_with_them() -> None:
    model = tiny("olmo")
    facts = known(model, how_many=2)
    settings = TraceSettings(kinds=["mlp"], metric="log_probability", progress=False)
    by_settings = trace(model, facts, settings)
    by_keywords = trace(model, facts, kinds=["mlp"], metric="log_probability", progress=False)
    assert by_settings.provenance == by_keywords.provenance
    for mine, theirs in zip(by_settings.restored["mlp"], by_keywords.restored["mlp"], strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert estimate(model, facts, settings).cells == estimate(model, facts, kinds=["mlp"], progress=False).cells
    with pytest.raises(UserError, match="settings and keywords: put all into the settings"):
        trace(model, facts, settings, window=3)
    with pytest.raises(UserError, match="the settings are a GaussianNoise: give TraceSettings"):
        trace(model, facts, GaussianNoise())  # type: ignore[arg-type]
