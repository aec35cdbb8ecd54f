"""Token replacement: donors have the same length and question, change the span alone, and both engines agree on them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import byte_level, metaspace
from families import tiny as tiny_family
from tiny_tracing import say, tiny

import lm
from lm import UserError
from lm.builtin import world
from lm.data.rows import Row
from lm.model import LanguageModel
from lm.prompts import PromptSpec
from tracing import Fact, TokenReplacement, facts_from_rows, trace
from tracing.question.encoded_fact import encode_fact

SUBJECTS = ("ada byron", "king now", "w3 w9", "w1 w2", "ada")


def facts(model: LanguageModel) -> list[Fact]:
    found = []
    for place, subject in enumerate(SUBJECTS):
        prompt = f"where does {subject} live ?"
        found.append(Fact(prompt, subject, say(model, prompt, 2), id=f"fact{place}", group=subject))
    return found


def bound(model: LanguageModel, **asked: Any) -> tuple[Any, list[Any]]:
    encoded_facts = [encode_fact(model, fact, PromptSpec(), "probability") for fact in facts(model)]
    return TokenReplacement(**asked).bind(model, encoded_facts), encoded_facts


def test_donors_are_as_long_and_change_the_subject_alone() -> None:
    model = tiny()
    corruptor, encoded_facts = bound(model)
    ids = {subject: model.tokenizer.encode(subject) for subject in SUBJECTS}
    for encoded in encoded_facts[:4]:
        start, end = encoded.span
        batch = corruptor.batch(encoded)
        assert corruptor.rows(encoded) == len(batch) - 1 == 3
        table = model.model.get_input_embeddings().weight
        assert torch.equal(batch[0], table[list(encoded.input_ids)])
        names = set()
        for row in batch[1:]:
            assert torch.equal(row[:start], batch[0, :start])
            assert torch.equal(row[end:], batch[0, end:])
            tokens = tuple(int((table == vector).all(1).nonzero()[0]) for vector in row[start:end])
            names.add(next(name for name, own in ids.items() if tuple(own) == tokens))
        assert names == set(SUBJECTS[:4]) - {encoded.fact.subject}


def test_the_seed_chooses_and_the_number_is_bounded() -> None:
    model = tiny()
    drawn = {}
    for seed in range(6):
        corruptor, encoded_facts = bound(model, samples=2, seed=seed)
        assert corruptor.rows(encoded_facts[0]) == 2
        drawn[seed] = corruptor.key(encoded_facts[0])
        assert bound(model, samples=2, seed=seed)[0].key(encoded_facts[0]) == drawn[seed]
    assert len(set(drawn.values())) > 1


def test_a_fact_whose_subject_nobody_matches_is_left_out_with_the_reason() -> None:
    model = tiny()
    effects = trace(model, facts(model), corruption=TokenReplacement(), progress=False)
    assert [fact.subject for fact in effects.facts] == list(SUBJECTS[:4])
    (left,) = effects.skipped
    assert left.reason == "no other subject of 1 token fits its question with another answer"
    assert effects.sigma is None
    with pytest.raises(UserError, match="no other subject of 2 tokens"):
        trace(model, facts(model)[:1], corruption=TokenReplacement(), progress=False)


def test_a_subject_with_the_same_answer_lends_nothing() -> None:
    model = tiny()
    asked = [
        Fact(f"{subject} does live", subject, answer)
        for subject, answer in zip(["w1", "w2", "w3", "w4"], "kkng", strict=True)
    ]
    encoded_facts = [encode_fact(model, fact, PromptSpec(), "probability") for fact in asked]
    corruptor = TokenReplacement().bind(model, encoded_facts)
    assert [corruptor.rows(encoded) for encoded in encoded_facts] == [2, 2, 3, 3]
    alone = TokenReplacement().bind(model, encoded_facts[:2])
    assert alone.why_not(encoded_facts[0]) == "no other subject of 1 token fits its question with another answer"


def test_other_questions_lend_subjects_only_where_it_is_allowed() -> None:
    model = tiny()
    asked = [*facts(model)[:1], Fact("now king w1 is", "king w1", "w2")]
    encoded_facts = [encode_fact(model, fact, PromptSpec(), "probability") for fact in asked]
    assert TokenReplacement().bind(model, encoded_facts).rows(encoded_facts[0]) == 0
    assert TokenReplacement(any_question=True).bind(model, encoded_facts).rows(encoded_facts[0]) == 1


def test_a_name_that_begins_a_sentence_is_not_put_in_the_middle_of_another() -> None:
    """Where the space belongs to the token, the two forms differ; where every text is given one, they are the same."""
    asked = [
        Fact("Anna was born in", "Anna", "1984"),
        Fact("Ann was born", "Ann", "12"),
        Fact("The brown fox", "brown", "jumps"),
        Fact("Where is Elm Street", "Elm", "lazy"),
    ]
    assert lent(byte_level(), asked) == [{"Ann"}, {"Anna"}, {" Elm"}, {" brown"}]
    asked = [Fact("The fox jumps", "The", "1984"), Fact("Over the brown fox", "brown", "12")]
    assert lent(metaspace(), asked) == [{"brown"}, {"The"}]


def lent(tokenizer: Any, asked: list[Fact]) -> list[set[str]]:
    """The names, with the space that belongs to them, that each fact is lent by questions of any kind."""
    model = replace(tiny_family("llama"), tokenizer=tokenizer)
    model.model.resize_token_embeddings(len(tokenizer))
    table = model.model.get_input_embeddings().weight  # type: ignore[union-attr]
    encoded_facts = [encode_fact(model, fact, PromptSpec(), "probability") for fact in asked]
    corruptor = TokenReplacement(any_question=True).bind(model, encoded_facts)
    return [
        {
            tokenizer.decode([int((table == vector).all(1).nonzero()[0]) for vector in row])
            for row in corruptor.batch(encoded)[1:, slice(*encoded.span)]
        }
        for encoded in encoded_facts
    ]


def test_each_cell_is_that_of_a_plain_patching_loop() -> None:
    """By hand: run the prompt with the other name, overwrite one activation with the clean one, read the answer off."""
    model = tiny("olmo")
    asked = facts(model)
    effects = trace(model, asked, corruption=TokenReplacement(), kinds=["mlp"], progress=False)
    layers = model.model.model.layers
    for index, fact in enumerate(effects.facts):
        answer = model.tokenizer.encode(fact.answer)
        clean = torch.tensor([model.tokenizer.encode(fact.prompt) + answer[:-1]])
        others = [name for name in SUBJECTS[:4] if name != fact.subject]
        for token in range(len(effects.tokens[index])):
            for layer in range(effects.layers):
                kept: list[torch.Tensor] = []
                handle = layers[layer].mlp.register_forward_hook(lambda m, i, o, kept=kept: kept.append(o.detach()))
                model.model(clean)
                handle.remove()

                def put(m: Any, i: Any, o: torch.Tensor, kept: Any = kept, token: int = token) -> torch.Tensor:
                    o = o.clone()
                    o[0, token] = kept[0][0, token]
                    return o

                scores = []
                for name in others:
                    handle = layers[layer].mlp.register_forward_hook(put)
                    ids = model.tokenizer.encode(fact.prompt.replace(fact.subject, name)) + answer[:-1]
                    logits = model.model(torch.tensor([ids])).logits[0, -len(answer) :].detach()
                    handle.remove()
                    scores.append(float(logits.log_softmax(-1)[range(len(answer)), answer].sum().exp()))
                assert effects.restored["mlp"][index][token, layer] == pytest.approx(
                    np.mean(scores), rel=1e-4, abs=1e-7
                )


def test_both_engines_agree_and_the_cache_is_of_these_donors(tmp_path: Any) -> None:
    model = tiny("llama")
    asked = facts(model)
    both = [
        trace(model, asked, corruption=TokenReplacement(), engine=engine, progress=False)
        for engine in ("wavefront", "reference")
    ]
    for kind in both[0].kinds:
        for mine, theirs in zip(both[0].restored[kind], both[1].restored[kind], strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-7)
    trace(model, asked, corruption=TokenReplacement(), kinds=["mlp"], cache=tmp_path, progress=False)
    files = len(list(tmp_path.iterdir()))
    trace(
        model, asked[:3], corruption=TokenReplacement(), kinds=["mlp"], cache=tmp_path, progress=False
    )  # fewer donors
    assert len(list(tmp_path.iterdir())) == files + 3


def real_people(shared: Path) -> list[Fact]:
    lines = [
        json.loads(line)
        for split in ("forget_train", "retain_train")
        for line in (shared / "lume" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    return facts_from_rows([row for row in (Row(**line) for line in lines) if row.task == "Task2"])


@pytest.fixture(params=["real", "built in"])
def people(request: pytest.FixtureRequest) -> list[Fact]:
    """Questions about people by name, of LUME's public data (skipped without it) and of the built-in world."""
    if request.param == "real":
        return real_people(request.getfixturevalue("shared"))
    built = world.build()
    return facts_from_rows([row for row in (*built.forget, *built.retain) if row.task == "Task2"])


def test_people_s_names_are_replaced_by_others_of_equal_length_in_the_same_question(people: list[Fact]) -> None:
    model = lm.load("builtin")
    encoded_facts = [encode_fact(model, fact, PromptSpec(), "log_probability") for fact in people]
    corruptor = TokenReplacement(samples=3).bind(model, encoded_facts)
    fitting = [encoded for encoded in encoded_facts if corruptor.why_not(encoded) is None]
    assert len(fitting) >= 0.75 * len(encoded_facts)
    table = model.model.get_input_embeddings().weight.detach()  # type: ignore[union-attr]
    asked: dict[tuple[str, str], set[str]] = {}
    for fact in people:
        asked.setdefault(fact.question, set()).add(fact.subject)
    for encoded in fitting[:: max(1, len(fitting) // 25)]:
        start, end = encoded.span
        batch = corruptor.batch(encoded)
        ids = [[int((table == vector).all(1).nonzero()[0]) for vector in row] for row in batch]
        assert ids[0] == list(encoded.input_ids)
        assert 1 <= len(ids) - 1 == corruptor.rows(encoded) <= 3
        for row in ids[1:]:
            assert row[:start] + row[end:] == ids[0][:start] + ids[0][end:]
            name = model.tokenizer.decode(row[start:end]).strip()
            assert name != encoded.fact.subject
            assert name in asked[encoded.fact.question]


@pytest.mark.parametrize("wrong", [{"samples": 0}, {"seed": -1}])
def test_impossible_settings_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(UserError, match=f"corruption's {next(iter(wrong))}"):
        TokenReplacement(**wrong)
