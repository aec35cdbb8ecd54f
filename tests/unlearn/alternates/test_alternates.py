"""Alternates: the row's own prompt before them, the same for a row wherever it stands, and files that are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from families import tiny as tiny_model

from lm.data.rows import Row
from lm.errors import UserError
from lm.loading import load
from lm.model import LanguageModel
from lm.prompts import PromptSpec, encode_pair, encode_prompt
from lm.row_files import load_rows
from unlearn.alternates.base import REFUSALS, AlternateFile, Alternates, NoAlternates, RandomTokens, Refusals

RAW = PromptSpec()


@pytest.fixture(name="model")
def fixture_model(tiny: Path) -> LanguageModel:
    return load(str(tiny / "model"), device="cpu")


@pytest.fixture(name="rows")
def fixture_rows(tiny: Path) -> tuple[Row, ...]:
    return load_rows(str(tiny / "forget.jsonl"))


def write(path: Path, *lines: object) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.mark.parametrize("alternates", [Refusals(per_row=3), RandomTokens(per_row=3)], ids=repr)
def test_each_row_has_its_own_after_its_own_prompt(model, rows, alternates: Alternates) -> None:  # type: ignore[no-untyped-def]
    found = alternates.encode(model, rows, RAW)
    assert [len(several) for several in found] == [3] * len(rows)
    for row, several in zip(rows, found, strict=True):
        assert len({tuple(one.ids) for one in several}) == 3
        for one in several:
            assert one.ids[: one.answer_start] == encode_prompt(model.tokenizer, row.input, RAW)
            assert one.ids[-1] == model.tokenizer.eos_token_id
    assert len({tuple(several[0].ids[several[0].answer_start :]) for several in found}) > 3, "rows differ"


@pytest.mark.parametrize("kind", [Refusals, RandomTokens])
def test_only_the_seed_and_the_row_decide(model, rows, kind: type[Refusals] | type[RandomTokens]) -> None:  # type: ignore[no-untyped-def]
    first = kind(seed=1).encode(model, rows, RAW)
    assert kind(seed=1).encode(model, rows, RAW) == first
    assert kind(seed=1).encode(model, rows[::-1], RAW) == first[::-1]
    assert kind(seed=1).encode(model, rows[4:5], RAW) == first[4:5]
    assert kind(seed=2).encode(model, rows, RAW) != first


def test_refusals_are_sentences_of_the_list(model, rows) -> None:  # type: ignore[no-untyped-def]
    assert len(set(REFUSALS)) == len(REFUSALS)
    for row, (one,) in zip(rows, Refusals().encode(model, rows, RAW), strict=True):
        assert one in [encode_pair(model.tokenizer, row.input, text, RAW) for text in REFUSALS]


@pytest.mark.parametrize("append_eos", [True, False])
def test_random_tokens_are_as_many_as_the_answers_and_ordinary(model, rows, append_eos: bool) -> None:  # type: ignore[no-untyped-def]
    prompt = PromptSpec(append_eos=append_eos)
    special = set(model.tokenizer.all_special_ids)
    for row, (one,) in zip(rows, RandomTokens().encode(model, rows, prompt), strict=True):
        answer = encode_pair(model.tokenizer, row.input, row.output, prompt)
        assert (len(one.ids), one.answer_start) == (len(answer.ids), answer.answer_start)
        assert one.ids != answer.ids
        drawn = one.ids[one.answer_start : -1 if append_eos else None]
        assert not special & set(drawn)
        assert max(drawn) < model.anatomy.vocabulary


def test_alternates_from_a_file(model, rows, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    lines = [{"id": f'"{row.id}"', "alternates": ["one", f"two of {row.id}"]} for row in reversed(rows)]
    path = write(tmp_path / "a.jsonl", {"id": "of another set", "alternates": ["x"]}, *lines)
    found = AlternateFile(path=path).encode(model, rows, RAW)
    assert found == [
        tuple(encode_pair(model.tokenizer, row.input, text, RAW) for text in ("one", f"two of {row.id}"))
        for row in rows
    ]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([{"id": "p0sc1", "alternates": ["x"]}], "no alternates for row p0qa0 and 10 more"),
        ([{"id": "a", "alternates": ["x"]}, {"id": '"a"', "alternates": ["y"]}], "line 2: id a occurs twice"),
        ([{"id": "a", "alternates": []}], "at least one text"),
        ([{"id": "a", "alternates": "x"}], "at least one text"),
        ([{"id": "a", "alternates": ["x", 3]}], "line 1.*3, not text"),
        ([{"id": "a", "alternates": [" "]}], "blank"),
        ([{"id": "a", "alternate": ["x"]}], "did you mean .*alternate"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(model, rows, tmp_path: Path, lines: list[object], words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=words):
        AlternateFile(path=write(tmp_path / "a.jsonl", *lines)).encode(model, rows, RAW)


def test_an_alternate_beyond_the_context_is_refused(tmp_path: Path) -> None:
    model, row = tiny_model("olmo"), Row(id="a1qa0", input="Where?", output="There.", task="Task1")
    path = write(tmp_path / "a.jsonl", {"id": row.id, "alternates": ["short", "x" * 80]})
    with pytest.raises(UserError, match=r"row a1qa0 .* reads 64"):
        AlternateFile(path=path).encode(model, [row], RAW)
    assert len(Refusals(per_row=2).encode(model, [replace(row, input="?")], RAW)[0]) == 2


def test_none_are_none(model, rows) -> None:  # type: ignore[no-untyped-def]
    assert NoAlternates().encode(model, rows, RAW) == []


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Refusals(per_row=0), "per_row is 0"),
        (lambda: Refusals(per_row=1000), "give fewer"),
        (lambda: RandomTokens(per_row=0), "per_row is 0"),
    ],
)
def test_impossible_settings_are_refused(build, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=words):
        build()
