"""What is read off, by hand; foils; and that both engines read the same."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from tiny_tracing import known, say, tiny

from lm import UserError
from lm.old_configs import subclasses
from lm.prompts import PromptSpec
from tracing import Fact, GaussianNoise, plot, trace
from tracing.question import metrics
from tracing.question.encoded_fact import encode_fact
from tracing.question.facts import with_foils
from tracing.question.metrics import Metric, MetricName, beside_clean, metric_label, metric_of, read_off
from tracing.question.target import Target, distinguishing, first_difference

ROOT = Path(__file__).resolve().parents[3]
LOGITS = torch.tensor([[[1.0, 3.0, 2.0, 0.0], [0.0, 1.0, 5.0, 5.0]], [[0.0, 0.0, 0.0, 0.0], [4.0, 1.0, 2.0, 3.0]]])


def target(**foil: Any) -> Target:
    return Target(answer=torch.tensor([[1, 3], [1, 3]]), **foil)


def test_each_metric_by_hand() -> None:
    p = [
        [math.exp(row[token]) / sum(map(math.exp, row)) for row, token in zip(rows, (1, 3), strict=True)]
        for rows in LOGITS.tolist()
    ]
    whole = [a * b for a, b in p]
    assert read_off(LOGITS, target(), "probability").tolist() == pytest.approx(whole)
    assert read_off(LOGITS, target(), "log_probability").tolist() == pytest.approx([math.log(x) for x in whole])
    first = Target(answer=torch.tensor([[1], [1]]))
    assert read_off(LOGITS[:, :1], first, "first_token_probability").tolist() == pytest.approx([row[0] for row in p])
    assert read_off(LOGITS, target(), "reciprocal_rank").tolist() == [
        (1 + 1) / 2,
        (1 + 1 / 2) / 2,
    ]  # a tie is the better rank
    second = target(counted=torch.tensor([[False, True], [True, True]]))
    telling = read_off(LOGITS, second, "distinguishing_log_probability").tolist()
    assert telling == pytest.approx([math.log(p[0][1]), math.log(whole[1])])
    foils = target(place=torch.tensor([0, 1]), foil=torch.tensor([2, 0]))
    assert read_off(LOGITS, foils, "logit_difference").tolist() == [3 - 2, 3 - 4]
    clean = replace(target(), fact=torch.tensor([0, 0])).beside(LOGITS[:1])
    mine, other = (rows.double().softmax(-1) for rows in LOGITS)
    divergence = float((mine * (mine / other).log()).sum())
    assert read_off(LOGITS, clean, "negative_kl").tolist() == pytest.approx([0, -divergence], abs=1e-6)
    with pytest.raises(UserError, match="compares with a clean pass"):
        read_off(LOGITS, target(), "negative_kl")
    with pytest.raises(UserError, match="needs a foil"):
        read_off(LOGITS, target(), "logit_difference")


def test_nan_stays_nan_and_types_are_wide() -> None:
    bad = LOGITS.clone()
    bad[1, :, 3] = torch.nan
    for metric in get_args(MetricName):
        foils = target(place=torch.tensor([1, 1]), foil=torch.tensor([0, 0]), fact=torch.tensor([0, 0]))
        foils = beside_clean(foils, LOGITS[:1], [metric])
        found = read_off(bad.bfloat16(), foils, metric)
        assert found.dtype == torch.float64
        assert found.isnan().tolist() == [False, True], metric


@pytest.mark.parametrize(
    ("answer", "foil", "found"),
    [
        ([5, 6, 7], [5, 8, 7], (1, 8)),
        ([5], [5, 6], None),
        ([5, 6], [5], None),
        ([5], [4, 9], (0, 4)),
        ([5, 6], [5, 6], None),
    ],
)
def test_where_a_foil_first_differs(answer: list[int], foil: list[int], found: tuple[int, int] | None) -> None:
    assert first_difference(answer, foil) == found


def test_foils_are_other_answers_to_the_same_question() -> None:
    facts = [
        Fact("where is ada ?", "ada", "here"),
        Fact("where is byron ?", "byron", "there"),
        Fact("where is king ?", "king", "here", foil="now"),
        Fact("who is ada", "ada", "a poet"),
    ]
    found = with_foils(facts)
    assert [fact.foil for fact in found] == ["there", "here", "now", ""]
    assert with_foils(found) == found
    many = [Fact(f"where is w{n} ?", f"w{n}", f"w{n + 20}") for n in range(9)]
    assert with_foils(many, seed=1) == with_foils(many, seed=1) != with_foils(many, seed=2)
    assert all(fact.foil != fact.answer for fact in with_foils(many))


@pytest.mark.parametrize("metric", get_args(MetricName))
def test_both_engines_read_the_same(metric: Any) -> None:
    model = tiny("olmo2")
    facts = known(model, answer_tokens=3)
    if metric == "logit_difference":
        facts = [Fact(f.prompt, f.subject, f.answer, f.id, foil=f"{f.answer.split()[0]} w40 w41") for f in facts]
    both = [
        trace(model, facts, corruption=GaussianNoise(samples=3), metric=metric, engine=engine, progress=False)
        for engine in ("wavefront", "reference")
    ]
    for kind in both[0].kinds:
        spread = 0.0
        for mine, theirs in zip(both[0].restored[kind], both[1].restored[kind], strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)
            spread = max(spread, float(np.ptp(theirs)))
        assert spread > 1e-6
    assert both[0].clean == pytest.approx(both[1].clean)


EVERY: tuple[MetricName, ...] = get_args(MetricName)


@pytest.mark.parametrize("engine", ["wavefront", "reference"])
def test_several_metrics_of_one_sweep_are_those_of_sweeps_of_their_own(engine: Any, tmp_path: Path) -> None:
    model = tiny("olmo2")
    facts = [
        Fact(f.prompt, f.subject, f.answer, f.id, foil=f"{f.answer.split()[0]} w40 w41")
        for f in known(model, answer_tokens=3, how_many=2)
    ]
    how: dict[str, Any] = {
        "engine": engine,
        "memory": 0.0002,
        "positions": "subject_and_last",
        "progress": False,
    }  # in parts
    noise = GaussianNoise(samples=3)
    together = trace(model, facts, corruption=noise, metric=EVERY[0], also_metrics=EVERY[1:], cache=tmp_path, **how)
    assert tuple(together.also) == EVERY[1:]
    for metric in EVERY:
        alone = trace(model, facts, corruption=noise, metric=metric, **how)
        found = together.also.get(metric, together)
        assert (found.metric, found.facts) == (metric, alone.facts)
        np.testing.assert_allclose(found.clean, alone.clean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.corrupted, alone.corrupted, rtol=1e-4, atol=1e-5)
        for kind in alone.kinds:
            for mine, theirs in zip(found.restored[kind], alone.restored[kind], strict=True):
                np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)
        cells = np.concatenate([each.ravel() for each in found.restored["resid"]])
        assert np.nanmax(cells) - np.nanmin(cells) > 1e-6
    files = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again = trace(model, facts, corruption=noise, metric=EVERY[0], also_metrics=EVERY[1:3], cache=tmp_path, **how)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == files  # nothing was computed again
    np.testing.assert_array_equal(again.also[EVERY[2]].restored["mlp"][1], together.also[EVERY[2]].restored["mlp"][1])
    assert "also log_probability" in repr(again.some([0]))
    with pytest.raises(UserError, match="repeat one"):
        trace(model, facts, metric="probability", also_metrics=["probability"], progress=False)


def test_restoring_everything_leaves_no_divergence_from_the_clean_distribution() -> None:
    model = tiny("llama")
    effects = trace(model, known(model, answer_tokens=1), metric="negative_kl", kinds=["resid"], progress=False)
    np.testing.assert_allclose(effects.clean, 0, atol=1e-6)
    assert (effects.corrupted < -1e-3).all()
    for cells, (_, end), low in zip(effects.restored["resid"], effects.subject_spans, effects.corrupted, strict=True):
        assert cells[-1, -1] == pytest.approx(0, abs=1e-5)  # the last token's whole stream is the clean answer
        assert cells[end - 1].max() > low


def test_a_fact_without_a_foil_is_left_out_of_logit_differences() -> None:
    model = tiny()
    pair = [f"where does {name} live ?" for name in ("ada byron", "king now")]
    facts = [Fact(prompt, prompt[11:-7], say(model, prompt, 2)) for prompt in pair]
    assert facts[0].answer != facts[1].answer
    lone = known(model, how_many=1)
    effects = trace(model, [*facts, *lone], metric="logit_difference", kinds=["mlp"], progress=False)
    assert len(effects.facts) == 2
    assert [fact.foil for fact in effects.facts] == [facts[1].answer, facts[0].answer]
    assert effects.skipped[0].reason == "it has no foil, another answer that differs from its own"


def test_a_difference_of_logits_is_that_of_the_model() -> None:
    model = tiny("llama")
    (fact,) = known(model, answer_tokens=2, how_many=1)
    fact = Fact(fact.prompt, fact.subject, fact.answer, foil=f"{fact.answer.split()[0]} w44")
    effects = trace(model, [fact], metric="logit_difference", kinds=["mlp"], progress=False)
    answer, foil = (model.tokenizer.encode(text) for text in (fact.answer, fact.foil))
    with torch.no_grad():
        logits = model.model(torch.tensor([[*model.tokenizer.encode(fact.prompt), answer[0]]])).logits[0, -1]
    assert effects.clean[0] == pytest.approx(float(logits[answer[1]] - logits[foil[1]]), abs=1e-4)
    assert encode_fact(model, fact, PromptSpec(), "logit_difference").foil == (1, foil[1])


def test_effects_as_shares_of_what_was_lost() -> None:
    model = tiny()
    effects = trace(model, known(model), kinds=["resid"], metric="log_probability", progress=False)
    for plain, share, total in zip(
        effects.indirect("resid"), effects.indirect("resid", normalized=True), effects.total, strict=True
    ):
        np.testing.assert_allclose(share, plain / total)


@pytest.mark.parametrize(
    ("prompt", "answer", "words"),
    [
        ("When was Ada Byron born?", "Ada was born on 10 December 1815.", ["10", "December", "1815"]),
        ("Where is Ada Byron?", "The poet lives in Łódź now.", ["Łódź"]),
        ("What is the mail of Ada?", "ada.b@mail.org", ["ada.b@mail.org"]),
        ("What does Ada like?", "the sea", ["sea"]),  # nothing but words the prompt does not hold
        ("Who is it? Ada", "Ada", ["Ada"]),  # nothing at all: the whole answer
    ],
)
def test_what_tells_an_answer_from_others(prompt: str, answer: str, words: list[str]) -> None:
    if words == ["sea"]:
        prompt = "What does the Ada like?"
    assert [answer[start:end] for start, end in distinguishing(prompt, answer)] == words


def test_distinguishing_tokens_are_read_off_alone_by_both_engines() -> None:
    model = tiny("olmo2")
    prompt = next(  # one whose answer has words with and without digits, of which those with count unless they were asked
        text
        for text in (f"is ada {word} now" for word in ("", "w1", "w2", "w3", "w4", "w5", "w6", "w7", "w8", "w9"))
        if len({word[0] == "w" and word[1:].isdigit() and word not in text for word in say(model, text, 4).split()})
        == 2
    )
    words = say(model, prompt, 4).split()
    fact = Fact(prompt, "ada", " ".join(words))
    encoded = encode_fact(model, fact, PromptSpec(), "distinguishing_log_probability")
    counted = [place for place, word in enumerate(words) if word[1:].isdigit() and word not in prompt.split()]
    assert list(encoded.counted or ()) == counted
    assert 0 < len(counted) < 4
    found = [
        trace(model, [fact], metric="distinguishing_log_probability", engine=engine, kinds=["mlp"], progress=False)
        for engine in ("wavefront", "reference")
    ]
    assert np.allclose(found[0].restored["mlp"][0], found[1].restored["mlp"][0], atol=1e-5)
    ids = [*encoded.prompt_ids, *encoded.answer_ids]
    with torch.no_grad():
        logs = model.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    start = len(encoded.prompt_ids)
    by_hand = sum(float(logs[start + place - 1, ids[start + place]]) for place in counted)
    assert found[0].clean[0] == pytest.approx(by_hand, abs=1e-4)


def test_each_name_is_a_class_of_the_one_file_that_knows_it() -> None:
    own = {cls.name: cls for cls in subclasses(Metric).values() if cls.__module__ == metrics.__name__}
    assert sorted(own) == sorted(get_args(MetricName))
    with pytest.raises(UserError, match="the metric 'loss' is unknown: use one of probability, log_probability"):
        metric_of("loss")
    others = [path for path in (ROOT / "tracing").rglob("*.py") if path.name != "metrics.py"]
    assert [path.name for path in others if "negative_kl" in path.read_text()] == []


class Margin(Metric):
    """Of a notebook: by how much the answer's first token leads all others."""

    name = "margin"
    label = "lead of the answer's first token"
    first_token = True

    def read(self, logits: torch.Tensor, target: Target) -> torch.Tensor:
        own = logits[:, 0].gather(1, target.answer.to(logits.device)[:, :1]).squeeze(1)
        return (own - logits[:, 0].mean(-1)).double()

    def tolerance(self, nats: float, size: float) -> float:
        return nats


def test_a_metric_of_a_notebook_is_traced_and_drawn_as_any_other() -> None:
    model = tiny("olmo2")
    both = [
        trace(model, known(model), metric=Margin.name, engine=engine, kinds=["mlp"], progress=False)  # type: ignore[arg-type]
        for engine in ("wavefront", "reference")
    ]
    for mine, theirs in zip(both[0].restored["mlp"], both[1].restored["mlp"], strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)
    assert both[0].metric == "margin"
    assert metric_label("margin") == Margin.label
    assert plot(both[0]).png.startswith(b"\x89PNG")
