"""Sources and contexts: every token once, in a fixed order, resumable at any context."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from families import byte_level, metaspace
from transformers import PreTrainedTokenizerFast

from lm import UserError
from lm.builtin import world
from lm.config import parse_config
from lm.old_configs import completed
from sae.activations import (
    Builtin,
    Context,
    Contexts,
    ContextSpec,
    Datasets,
    Rows,
    Source,
    TextFiles,
    Texts,
    TextSource,
)
from sae.activations.documents import Streamed
from sae.activations.sources import Form, Part

TOKENS = byte_level()
TEXTS = (
    "Żółw 🐢 met naïve Zoë; 東京 is far away.",
    "",
    "one",
    "A document that is a good deal longer than any context: " * 4,
    " \n",
    "e\u0301 is not é, and \u2028 is no line end here.",
)


def contexts(source: TextSource = Texts(texts=TEXTS), seed: int = 0, **spec: object) -> list[Context]:  # noqa: B008
    walk = Contexts(source.open(TOKENS), TOKENS, ContextSpec(**{"length": 16, "epochs": 1, **spec}), seed=seed)
    return list(walk)


def by_document(made: list[Context]) -> dict[int, list[int]]:
    """The ids of each document in the order of their positions; -1 (BOS) left out."""
    found: dict[int, dict[int, int]] = {}
    for context in made:
        for token, document, position in zip(*map(np.ndarray.tolist, context), strict=True):
            if position >= 0:
                assert position not in found.setdefault(document, {}), "a token was dealt twice"
                found[document][position] = token
    return {document: [tokens[place] for place in range(len(tokens))] for document, tokens in found.items()}


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("pack", [True, False])
def test_every_token_of_every_document_is_there_once(pack: bool, shuffle: bool) -> None:
    made = contexts(pack=pack, shuffle=shuffle)
    tail = [TOKENS.eos_token_id] if pack else []
    wanted = {
        number: [*TOKENS(text, add_special_tokens=False)["input_ids"], *tail]
        for number, text in enumerate(TEXTS)
        if text
    }
    assert by_document(made) == wanted
    assert all(len(context.ids) <= 16 for context in made)
    if pack:
        assert all(len(context.ids) == 16 for context in made[:-1])
    else:
        assert all(len(set(context.documents.tolist())) == 1 for context in made)


def test_bos_is_put_where_the_tokenizer_puts_it_or_as_asked() -> None:
    source = Texts(texts=TEXTS)
    for tokenizer, bos, expected in (
        (byte_level(), "tokenizer", False),
        (byte_level(), "always", True),
        (byte_level(bos=True), "tokenizer", True),
        (metaspace(), "tokenizer", True),
        (byte_level(bos=True), "never", False),
    ):
        made = list(Contexts(source.open(tokenizer), tokenizer, ContextSpec(length=16, epochs=1, bos=bos)))
        assert all((context.ids[0] == tokenizer.bos_token_id) == expected for context in made)
        assert all((context.positions[0] == -1) == expected for context in made)
        assert all((context.ids[1:] != tokenizer.bos_token_id).all() for context in made)
        assert max(len(context.ids) for context in made) == 16


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("stream", [True, False])
def test_a_walk_goes_on_from_its_state_across_epochs(pack: bool, stream: bool) -> None:
    documents = Texts(texts=TEXTS).open(TOKENS)
    if stream:
        documents = Streamed("streamed", lambda start: iter(TEXTS[start:]), block=4)
    spec = ContextSpec(length=16, pack=pack)
    whole = Contexts(documents, TOKENS, spec, seed=3)
    straight = list(islice(whole, 60))
    for stop in range(60):
        walk = Contexts(documents, TOKENS, spec, seed=3)
        list(islice(walk, stop))
        again = Contexts(documents, TOKENS, spec, seed=3, state=json.loads(json.dumps(walk.state)))
        assert again.count == stop
        for one, other in zip(islice(again, 8), straight[stop : stop + 8], strict=False):
            assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    assert whole.epoch >= 2


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    def first(seed: int, **spec: object) -> list[int]:
        return [token for context in contexts(seed=seed, **spec) for token in context.ids.tolist()]

    assert first(0) == first(0)
    assert first(0) != first(1)
    assert first(0, shuffle=False) == first(1, shuffle=False)
    two = first(0, epochs=2)
    assert len(two) == 2 * len(first(0))
    assert two[: len(two) // 2] != two[len(two) // 2 :]


def test_a_context_never_spans_two_epochs() -> None:
    made = contexts(Texts(texts=("tiny text",)), epochs=3, length=64)
    assert len(made) == 3
    assert all(np.array_equal(context.positions, made[0].positions) for context in made)


@pytest.mark.parametrize("texts", [(), ("",), ("", "")])
def test_a_source_without_text_is_one_clear_error(texts: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match="holds no text"):
        contexts(Texts(texts=texts))


def test_a_stream_without_text_is_an_error_and_not_an_endless_loop() -> None:
    empty = Streamed("streamed", lambda start: iter(["", None][start:]), block=4)
    with pytest.raises(UserError, match="streamed holds no text"):
        next(Contexts(empty, TOKENS, ContextSpec(length=16)))


def test_what_is_not_text_is_named() -> None:
    for value, says in ((7, "record 1: 7 is not text"), ("\ud800", "surrogate")):
        with pytest.raises(UserError, match=says):
            list(Streamed("s", lambda start, value=value: iter(["a", value]), block=4).read(epoch=0, start=0, seed=0))


def test_files_of_every_kind_hold_the_same_documents(tmp_path: Path) -> None:
    import pyarrow as arrow
    import pyarrow.parquet

    texts = [text for text in TEXTS if text]
    lines = "".join(json.dumps({"body": text}, ensure_ascii=False) + "\n" for text in texts)
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "a.json").write_text(json.dumps([{"body": text} for text in texts]), encoding="utf-8")
    pyarrow.parquet.write_table(arrow.table({"body": texts}), tmp_path / "a.parquet")
    for suffix in ("jsonl", "json", "parquet"):
        opened = TextFiles(path=str(tmp_path / f"a.{suffix}"), column="body").open(TOKENS)
        assert [text for _, text in opened.read(epoch=0, start=0, seed=None)] == texts
    with pytest.raises(UserError, match='no column "text"'):
        TextFiles(path=str(tmp_path)).open(TOKENS)
    (tmp_path / "b.jsonl").write_text('{"text": 1\n')
    with pytest.raises(UserError, match="line 1 is not JSON"):
        TextFiles(path=str(tmp_path / "b.jsonl")).open(TOKENS)
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="UTF-8"):
        TextFiles(path=str(tmp_path / "c.txt")).open(TOKENS)
    with pytest.raises(UserError, match="does not exist"):
        TextFiles(path=str(tmp_path / "none")).open(TOKENS)


def test_a_text_file_is_one_document_or_begins_new_ones_where_asked(tmp_path: Path) -> None:
    file = tmp_path / "wiki.txt"
    file.write_text(" = One = \n a\n = = Part = = \n b\n = Two = \n c\n", encoding="utf-8")

    def read(pattern: str | None) -> list[str]:
        opened = TextFiles(path=str(file), new_document=pattern).open(TOKENS)
        return [text for _, text in opened.read(epoch=0, start=0, seed=None)]

    assert len(read(None)) == 1
    assert [text.split("\n")[0] for text in read(r" = [^=].* = $")] == [" = One = ", " = Two = "]
    assert len(read("")) == 6
    with pytest.raises(UserError, match="regular expression"):
        read("(")


def test_rows_are_prompts_with_their_outputs(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"id": "a", "input": "Who?", "output": "Żółw.", "task": "Task1"}\n')
    for form, wanted in (("raw", "Who? Żółw."), ("chat", "<|user|>\nWho?\n<|assistant|>\nŻółw.")):
        opened = Rows(path=str(tmp_path), format=form).open(TOKENS)
        assert [text for _, text in opened.read(epoch=0, start=0, seed=None)] == [wanted]
    (tmp_path / "rows.jsonl").write_text('{"input": "Who?", "output": " "}\n')
    with pytest.raises(UserError, match='"output" is blank'):
        Rows(path=str(tmp_path)).open(TOKENS)


def test_the_built_in_world_is_a_source() -> None:
    sizes = {part: Builtin(part=part).open(TOKENS).facts()["documents"] for part in get_args(Part)}
    assert sizes["all"] == sizes["forget"] + sizes["retain"] + sizes["general"]
    assert sizes["unseen"] == sizes["calibration"] + sizes["held_out"] == 56 + 72
    with pytest.raises(UserError, match="unknown"):
        Builtin(part="nothing")  # type: ignore[arg-type]


def test_general_knowledge_comes_in_the_forms_asked_for() -> None:
    facts = world.build().general
    assert facts[0].question == "What is the capital of France?"
    assert (facts[0].labeled, facts[1].labeled) == (True, False)
    statements = [statement for fact in facts for statement in fact.statements]

    def read(*forms: Form) -> list[str]:
        opened = Builtin(part="general", forms=forms).open(TOKENS)
        return [text for _, text in opened.read(epoch=0, start=0, seed=None)]

    asked, chat, labeled = read("question"), read("chat"), read("labeled")
    assert read("statement") == statements
    assert asked[:2] == ["What is the capital of France? Paris", "What is the capital of Italy? Rome"]
    assert chat[0] == "<|user|>\nWhat is the capital of France?\n<|assistant|>\nParis"
    assert labeled[0] == "Question: What is the capital of France?\nAnswer: Paris"
    assert not any("Italy" in text for text in labeled)
    assert len(asked) == len(chat) == len(facts)
    assert len(labeled) == sum(fact.labeled for fact in facts) == 65
    assert read("labeled", "statement", "chat") == [*labeled, *statements, *chat]
    everything = Builtin(part="all", forms=("question",)).open(TOKENS).facts()["documents"]
    once, twice = (
        Builtin(part="general", forms=forms).open(TOKENS).facts() for forms in (("labeled",), ("labeled",) * 2)
    )
    assert twice["documents"] == 2 * once["documents"], "a form that is named twice comes as often"
    rows = sum(Builtin(part=part).open(TOKENS).facts()["documents"] for part in ("forget", "retain"))
    assert everything == rows + len(facts)


def test_forms_that_say_nothing_are_refused() -> None:
    with pytest.raises(UserError, match="the form 'asked' is unknown: use one of statement, question, chat, labeled"):
        Builtin(part="general", forms=("asked",))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="forms is empty: name at least one of statement"):
        Builtin(part="general", forms=())
    with pytest.raises(UserError, match="but part is forget, which holds no general facts"):
        Builtin(part="forget", forms=("question",))
    plain = PreTrainedTokenizerFast(tokenizer_object=TOKENS.backend_tokenizer)
    with pytest.raises(UserError, match="no chat template"):
        Builtin(part="general", forms=("chat",)).open(plain)


def test_datasets_are_read_from_disk_and_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    texts = [f"document {number} 🐢" for number in range(23)]
    table = datasets.Dataset.from_dict({"text": texts, "other": list(range(23))})
    table.save_to_disk(str(tmp_path / "saved"))
    clone = tmp_path / "clone"
    clone.mkdir()
    for number in range(3):
        lines = (json.dumps({"text": text}) for text in texts[number * 8 : number * 8 + 8])
        (clone / f"train-{number}.jsonl").write_text("\n".join(lines) + "\n")
    opened = {
        "saved": Datasets(path=str(tmp_path / "saved")).open(TOKENS),
        "downloaded": Datasets(path=str(clone), streaming=False).open(TOKENS),
        "streamed": Datasets(path=str(clone), shuffle_block=10).open(TOKENS),
    }
    assert isinstance(opened["streamed"], Streamed)
    for documents in opened.values():
        assert [text for _, text in documents.read(epoch=0, start=0, seed=None)] == texts
        mixed = list(documents.read(epoch=1, start=0, seed=5))
        assert sorted(number for number, _ in mixed) == [*range(23)]
        assert all(texts[number] == text for number, text in mixed)
        assert [number for number, _ in mixed] != [*range(23)]
        for start in (1, 9, 10, 11, 22, 23):
            assert list(documents.read(epoch=1, start=start, seed=5)) == mixed[start:]
    with pytest.raises(UserError, match="no column 'body'"):
        Datasets(path=str(tmp_path / "saved"), column="body").open(TOKENS)
    with pytest.raises(UserError, match="no column 'body'"):
        list(Datasets(path=str(clone), column="body").open(TOKENS).read(epoch=0, start=0, seed=None))
    with pytest.raises(UserError, match="split nothing"):
        Datasets(path=str(clone), split="nothing").open(TOKENS)


def test_a_sentence_says_what_to_install_where_datasets_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"datasets (is not installed|cannot be imported .*): pip install '.*\[sae\]'"):
        Datasets(path="somewhere").open(TOKENS)


@dataclass(frozen=True, kw_only=True)
class Config:
    """A config with a source."""

    source: Source = field(default_factory=Builtin)
    """Where from."""


def test_sources_are_chosen_in_a_config() -> None:
    words = ["--source", "TextFiles", "--source.path", "x.txt", "--source.new_document", "^#"]
    assert parse_config(Config, words).source == TextFiles(path="x.txt", new_document="^#")
    assert parse_config(Config, []).source == Builtin()
    words = ["--source", "Builtin", "--source.part", "general", "--source.forms", "[question, chat]"]
    assert parse_config(Config, words).source == Builtin(part="general", forms=("question", "chat"))
    saved = {"class_path": "Builtin", "init_args": {"part": "general", "format": "raw"}}  # of before there were forms
    assert completed({"source": saved}, Config)["source"]["init_args"]["forms"] == ("statement",)
    with pytest.raises(UserError, match=r"did you mean 'source\.part'"):
        parse_config(Config, ["--source", "Builtin", "--source.parts", "forget"])


@pytest.mark.parametrize("new_document", [None, " = [^=].* = $"])
def test_a_text_is_the_same_with_whatever_line_ends_it_is_written(tmp_path: Path, new_document: str | None) -> None:
    text = " = One = \n\n the first \n = Two = \n the second \n"
    texts = []
    for name, end in (("lf", "\n"), ("crlf", "\r\n"), ("cr", "\r")):
        (tmp_path / f"{name}.txt").write_bytes(text.replace("\n", end).encode())
        source = TextFiles(path=str(tmp_path / f"{name}.txt"), new_document=new_document)
        texts.append([text for _, text in source.open(TOKENS).read(epoch=0, start=0, seed=None)])
    assert texts[0] == texts[1] == texts[2]
    assert len(texts[0]) == (1 if new_document is None else 2)


@pytest.mark.parametrize("make", [byte_level, metaspace, lambda: metaspace(normalize=False)])
def test_a_long_text_is_tokenized_in_pieces_with_the_tokens_of_the_whole(
    make: Callable[[], PreTrainedTokenizerFast], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "The quick  brown fox\n\n was born in Gdańsk, 中文 🐢 and lives there. " * 40
    spec = ContextSpec(length=32, epochs=1, shuffle=False, separator=False)

    def ids(longest: int) -> list[int]:
        monkeypatch.setattr("sae.activations.contexts._LONGEST", longest)
        walk = Contexts(Texts(texts=(text, "short")).open(make()), make(), spec)
        return [token for context in walk for token in context.ids.tolist()]

    assert ids(300) == ids(1 << 16)
    monkeypatch.setattr("sae.activations.contexts._LONGEST", 300)
    walk = Contexts(Texts(texts=(text,)).open(make()), make(), spec)
    assert "".join(walk._pieces(text)) == text
    if make is byte_level:
        assert max(map(len, walk._pieces(text))) <= 300
    assert walk._pieces("字" * 1000) == ["字" * 1000], "without a place to cut it stays whole"
