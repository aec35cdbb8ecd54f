"""Whether an answer reads well, by hand; how likely the untouched model finds it, one answer at a time; both as scores."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import re
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import torch
from families import TEXT, tiny

import unlearn
from lm.data.rows import Row
from lm.errors import UserError
from lm.model import LanguageModel, ModelSpec
from lm.prompts import PromptSpec
from lm.row_files import load_rows
from tests.forked import run_forked
from unlearn.evaluation.config import EvaluateConfig
from unlearn.evaluation.fluency import nats_per_token
from unlearn.evaluation.legibility import Characters, Spelling, Text, is_empty, is_repeated
from unlearn.evaluation.scores import known_scores
from unlearn.evaluation.scores.base import Fluency, Statistics
from unlearn.evaluation.stage import run_evaluate

ROOT = Path(__file__).resolve().parents[3]
SIDES = ("forget", "retain")


@pytest.mark.parametrize(
    ("answer", "empty"),
    [("", True), (" \n", True), ("... !?", True), ("-", True), ("7", False), (" né.", False), ("東京", False)],
)
def test_empty(answer: str, empty: bool) -> None:
    assert is_empty(answer) is empty


@pytest.mark.parametrize(
    ("answer", "repeated"),
    [
        ("Dedededededed", True),  # 6 times two characters, and a d
        ("a dededededede", True),  # exactly 12 characters
        ("a dedededede.", False),  # 10 of them
        ("aaaaaaaaaaaa", True),
        ("aaaaaaaaaaa", False),
        ("no no no no", False),  # 11 characters: four times "no " but for the last space
        ("no no no no ", True),
        ("Muddy Fable, Muddy Fable, Muddy Fable, ", False),  # three times are not four
        ("Muddy Fable, Muddy Fable, Muddy Fable, Muddy Fable, ", True),
        ("twenty characters 20" * 4, True),
        ("abcdefghijklmnopqrstu" * 4, False),  # a unit of 21
        ("nothing" + " " * 30 + "at all", False),
        ("line\n\n\n\n\n\n\n\n\n\n\n\n\n\nline", False),
        ("9 March 1977, 555 0102 0202", False),
        ("one two three x one two three y one two three z", True),  # 9 of 12 words
        ("One, two three? X one two THREE: y one two three z", True),
        ("one two three x one two three y one two three", False),  # 11 words
        ("one two three a one two three b c d e f", False),  # 6 of 12 are not more than half
        ("one two three a one two three b c d e one two three g h", True),  # 9 of 16
        ("no no no a no no no b c d e f", False),  # 6 of 12
        ("no no, no no! a b c no no no d e", True),  # what overlaps counts once: 7 of 12
        ("no no, no no! a b c no no d e f", False),  # 4 of 12
    ],
)
def test_repeated(answer: str, repeated: bool) -> None:
    assert is_repeated(answer) is repeated


def test_characters_by_hand() -> None:
    """`aab`: a twice and b once, two different characters; after a: a once, b once."""
    alone = Characters(["aab"], context=0)
    a, b, other = (2 + 2 / 256) / 5, (1 + 2 / 256) / 5, (2 / 256) / 5
    np.testing.assert_allclose(alone.nats("abz"), -np.log([a, b, other]))
    after_one = Characters(["aab"], context=1)
    after_start, after_a = (1 + a) / 2, (1 + 2 * b) / 4
    np.testing.assert_allclose(after_one.nats("abz"), -np.log([after_start, after_a, other]))  # b was before nothing
    total = sum(math.exp(-float(after_one.nats(f"a{chr(code)}")[1])) for code in range(256))
    assert total == pytest.approx(1.0)
    assert Characters([]).nats("xy") == pytest.approx([math.log(256)] * 2)


NAMES = ("Anna Kowalska", "Zoë Marsh", "Tova Ashwell", "Ludmila Crane", "Leander Howe", "Freya Stone", "Samir Finch")
TOWNS = ("Stonedale", "Rookmoor", "Valeham", "Marshford", "Wrenbrook", "Ashholm", "Clayden", "Frostmoor", "Nettledale")
TEXTS = [
    Text(name, f"{name} was born in the town of {town}, and lives there.", answer=True)
    for name in NAMES
    for town in TOWNS
]


def test_spelling_tells_scrambled_words_from_new_ones() -> None:
    spelling = Spelling(TEXTS)
    for answer in (
        "Bela Kraus was born in the town of Clayden, and lives there.",
        "Zoë Finch lives in Stonemoor, and was born there. " * 9,  # not for its length
        "xq#zvk9jwpq",  # eleven characters
        "",
    ):
        assert not spelling.is_scrambled(answer)
    for answer in ("xq#zvk9jwpqu", "Freya Crane was born inz8qx#jjvwqpk0zr the town", "Ж" * 12):
        assert spelling.is_scrambled(answer)


def test_at_most_one_in_a_hundred_answers_is_taken_for_scrambled() -> None:
    """The rule on numbers: 399 known stretches, and answers whose strangest one is the k-th of them."""
    spelling = Spelling([])
    assert not spelling.is_scrambled("x" * 40), "there is nothing to tell by"
    answer = "abcdefghijkl"  # one stretch
    nats = float(spelling.characters.nats(answer).mean())
    spelling.known = np.array([nats - 1] * 396 + [nats + 1] * 3)
    assert spelling.is_scrambled(answer)  # (3 + 1) / (399 + 1) is 1 in 100
    assert not spelling.is_scrambled(f"{answer}x")  # two stretches are 2 in 100
    spelling.known = np.array([nats - 1] * 395 + [nats + 1] * 4)
    assert not spelling.is_scrambled(answer)
    spelling.known = np.array([nats - 1] * 98)
    assert not spelling.is_scrambled(answer), "99 are too few to say 1 in 100"
    spelling.known = np.array([nats - 1] * 99)
    assert spelling.is_scrambled(answer)


def test_a_document_is_never_judged_by_itself() -> None:
    """The words of one document, however often they stand in it, are strange to the others."""
    own = [Text("one", "qwertzuiopasdf", answer=True)] * 4
    spelling = Spelling([*TEXTS, *own])
    assert (spelling.known > Spelling(TEXTS).known.max()).sum() >= len(own)


def test_true_answers_about_people_never_seen_read_well() -> None:
    """The built-in world's unseen people have names, towns and addresses that no text of the evaluation holds."""
    asked = [row for side in SIDES for row in load_rows(f"builtin:{side}")]
    known = [(re.sub(r"(?:sc|qa)\d$", "", row.id), row) for row in asked]
    texts = [
        Text(document, text, answer)
        for document, row in known
        for text, answer in ((row.input, False), (row.output, True))
    ]
    spelling = Spelling(texts)
    unseen = [row.output for part in ("held_out", "calibration") for row in load_rows(f"builtin:{part}")]
    assert fmean(map(spelling.is_scrambled, unseen)) <= 0.03
    assert not any(spelling.is_scrambled(row.output) for row in asked)
    draw = random.Random(0)
    assert (
        fmean(spelling.is_scrambled("".join(draw.sample(text, len(text)))) for text in unseen if len(text) > 30) > 0.7
    )
    assert not any(is_repeated(text) or is_empty(text) for text in unseen)


def rows(side: str, answers: list[str]) -> tuple[dict[str, str], ...]:
    asked = {"task": "Task2", "input": "Who?", "expected_output": "Ada Lovelace, of London."}
    return tuple({"id": f"{side}{at}qa0", **asked, "model_output": said} for at, said in enumerate(answers))


def test_shares_by_hand() -> None:
    scores = known_scores()
    statistics = Statistics(
        forget=rows("f", ["Ada", "", "dedededededede", "..."]), retain=rows("r", ["Ada", "Bo", "no no no no ", "Cy"])
    )
    values = {name: statistics.of(scores[name]) for name in ("empty", "repeated", "garbled", "retain_garbled")}
    assert values == {"empty": 0.5, "repeated": 0.25, "garbled": 0.75, "retain_garbled": 0.25}
    assert statistics.examples_of(scores["garbled"]) == {"f0qa0": 0, "f1qa0": 1, "f2qa0": 1, "f3qa0": 1}
    assert statistics.of(scores["perplexity"]) is None, "no model was asked"
    assert Statistics(forget=(), retain=()).of(scores["garbled"]) is None


def test_perplexity_by_hand() -> None:
    perplexity = known_scores()["perplexity"]
    fluency = Fluency(forget=(math.log(2), None, math.log(8)), retain=(None,))
    statistics = Statistics(forget=rows("f", ["a", "", "b"]), retain=rows("r", [""]), fluency=fluency)
    assert statistics.of(perplexity) == pytest.approx(4.0)  # the geometric mean of 2 and 8
    assert statistics.examples_of(perplexity) == pytest.approx({"f0qa0": 2.0, "f2qa0": 8.0})
    assert statistics.of(known_scores()["retain_perplexity"]) is None
    assert [perplexity.text(value) for value in (1.0, 73.519, 12345.6)] == ["1.00", "73.5", "12,346"]
    assert math.isnan(perplexity.goodness(1.0))


def model(seed: int = 1, positions: int = 128) -> LanguageModel:
    return tiny("olmo", seed=seed, max_position_embeddings=positions)


def test_nats_are_those_of_one_answer_at_a_time() -> None:
    subject = model()
    prompts, answers = (
        ["Who?", "Where was Anna", "What?", "The"],
        [" Anna Kowalska", "", " in Gdańsk, by the sea", "fox"],
    )
    found = nats_per_token(subject, prompts, answers, prompt=PromptSpec(), batch_size=3)
    assert found[1] is None
    for text, answer, nats in zip(prompts, answers, found, strict=True):
        before, after = (subject.tokenizer(each)["input_ids"] for each in (text, answer))
        if answer:
            labels = [-100] * len(before) + after
            with torch.no_grad():
                own = subject.model(input_ids=torch.tensor([before + after]), labels=torch.tensor([labels])).loss.item()
            assert nats == pytest.approx(own, abs=1e-5)
    long = nats_per_token(model(positions=16), ["Who was it that"], ["Anna " * 40], prompt=PromptSpec())
    assert long[0] is not None
    assert math.isfinite(long[0])


FORGET = tuple(Row(f"f{n}qa0", TEXT[n][:12], TEXT[n][12:20], "Task2") for n in range(2))
RETAIN = tuple(Row(f"r{n}qa0", TEXT[n][:9], TEXT[n][9:20], "Task2") for n in range(2))


def test_the_untouched_model_is_asked_once(tmp_path: Path) -> None:
    subject, untouched = model(1), model(2)
    asked: list[int] = []
    untouched.model.register_forward_pre_hook(lambda *_: asked.append(1))
    how = {"max_new_tokens": 4, "scores": ["perplexity", "retain_perplexity", "garbled"], "store": tmp_path}
    result = unlearn.evaluate(subject, FORGET, RETAIN, untouched=untouched, **how)  # type: ignore[arg-type]
    said = [row["model_output"] for row in result.forget]
    own = nats_per_token(untouched, [row.input for row in FORGET], said, prompt=PromptSpec())
    assert result.values["perplexity"] == pytest.approx(math.exp(fmean(each for each in own if each is not None)))
    assert set(result.seconds) == {"forget", "retain", "fluency"}
    count = len(asked)
    again = unlearn.evaluate(subject, FORGET, RETAIN, untouched=untouched, **how)  # type: ignore[arg-type]
    assert again.values == result.values
    assert len(asked) == count
    with pytest.raises(UserError, match="the score perplexity needs an untouched model and there are none"):
        unlearn.evaluate(subject, FORGET, RETAIN, **how)  # type: ignore[arg-type]
    alone = unlearn.evaluate(subject, FORGET, RETAIN, max_new_tokens=4)
    assert alone.values["perplexity"] is None
    assert alone.values["garbled"] == result.values["garbled"]
    assert "perplexity" not in alone.to_json()


def test_from_files_on_one_process_and_on_two(tmp_path: Path) -> None:
    for name, seed in (("mine", 1), ("before", 2)):
        subject = model(seed)
        subject.model.save_pretrained(tmp_path / name)
        subject.tokenizer.save_pretrained(tmp_path / name)
    for name, side in (("forget", FORGET), ("retain", RETAIN)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in side))
    config = EvaluateConfig(
        model=ModelSpec(path=str(tmp_path / "mine"), device="cpu"),
        untouched=ModelSpec(path=str(tmp_path / "before"), device="cpu"),
        forget=str(tmp_path / "forget.jsonl"),
        retain=str(tmp_path / "retain.jsonl"),
        members=None,
        nonmembers=None,
        utility=None,
        max_new_tokens=4,
        out=str(tmp_path / "one"),
    )
    one = run_evaluate(config)
    words = ["--config", str(tmp_path / "one" / "config.yaml"), "--out", str(tmp_path / "two")]
    two = run_forked(ROOT / "scripts" / "evaluate.py", *words, launch="cpu2_ddp")
    assert two.returncode == 0, two.stderr[-2000:]
    written = [json.loads((tmp_path / name / "scores.json").read_text()) for name in ("one", "two")]
    for name in ("perplexity", "retain_perplexity", "garbled"):
        assert written[0][name] == one.values[name]
        assert written[0][name] == pytest.approx(written[1][name], rel=1e-5)
    assert set(json.loads((tmp_path / "one" / "fluency.json").read_text())) == set(SIDES)
    other = model(3)
    other.model.save_pretrained(tmp_path / "before")
    with pytest.raises(UserError, match="untouched changed since it began"):
        run_evaluate(dataclasses.replace(config, resume=True))
    itself = dataclasses.replace(config, untouched=config.model, out=str(tmp_path / "itself"))
    assert run_evaluate(itself).values["perplexity"] != one.values["perplexity"]
