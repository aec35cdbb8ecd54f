"""Readers end in rows or in one sentence, whatever the bytes: what stands in other people's files, and bytes at random."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from lm.config import parse_config
from lm.data.files import read_file, read_text
from lm.data.yaml_files import read_yaml
from lm.errors import UserError
from lm.row_files import load_questions, load_rows
from tracing.question.facts import load_known_facts
from unlearn.config import UnlearnConfig

ROW = '{"id": "a1qa0", "input": "Who?", "output": "Zoë", "task": "Task1"}'
ROUNDS = 150
"""Damaged files a reader; a few seconds for all of them."""


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[" * 1000 + "]" * 1000, "nested too deep|not an object"),
        ('{"id": ' + "[" * 100_000, "line 1 is JSON that is nested too deep"),
        (ROW.replace('"Who?"', "1" * 5000), "line 1 holds a number that is too long"),
        (ROW.replace('"task"', '"id"'), "line 1 has the key 'id' twice: leave one of them out"),
        (ROW.replace("Who?", "\\ud83d"), 'line 1: column "input" holds half of a surrogate pair'),
        (ROW.replace("a1qa0", "\\ud83d"), 'line 1: column "id" holds half of a surrogate pair'),
        ("\n" + ROW[:30], "line 2 is not JSON"),
    ],
)
def test_json_that_cannot_be_rows_is_one_sentence_with_its_line(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=says) as refused:
        load_rows(path)
    assert "\n" not in str(refused.value)


def test_a_choice_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text('{"question": "Who?", "choices": ["a", "\\udc00"], "answer": 0}')
    with pytest.raises(UserError, match='column "choices" holds half of a surrogate pair'):
        load_questions(path)


def test_parquet_with_strings_that_are_no_text_dates_that_are_none_and_a_column_twice(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    broken = pyarrow.array([b"\xff\xfe"]).view(pyarrow.string())
    late = pyarrow.array([2**62], pyarrow.timestamp("ms"))
    for column in (broken, late):
        pyarrow.parquet.write_table(pyarrow.table({"id": ["a1qa0"], "input": column}), path)
        with pytest.raises(UserError, match=r"rows\.parquet is not a readable Parquet file"):
            load_rows(path)
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["id", "id"])
    pyarrow.parquet.write_table(twice, path)
    with pytest.raises(UserError, match=r"not a readable Parquet file \(Multiple matches for FieldRef.Name\(id\)"):
        load_rows(path)


def test_what_is_merged_into_a_mapping_may_be_set_anew(tmp_path: Path) -> None:
    path = tmp_path / "list.yaml"
    path.write_text("a: {x: &x {<<: &base {k: 1, l: 2}, k: 3}}\nb: {<<: *x, k: 4}\nc: {<<: *base}\n")
    assert read_yaml(path)[1] == {"a": {"x": {"k": 3, "l": 2}}, "b": {"k": 4, "l": 2}, "c": {"k": 1, "l": 2}}
    path.write_text("b: {<<: {k: 1}, <<: {l: 2}}\n")
    with pytest.raises(UserError, match="'<<' stands twice"):
        read_yaml(path)


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("trainer:\n  steps: 1\n  steps: 2\n", "line 3 is not YAML .*'steps' stands twice"),
        (BOMB, "unfolds by its aliases into more than 100000 values"),
        ("forget: &a [*a]\n", "holds itself by an alias"),
        ("forget: " + "[" * 5000, "nested too deep"),
        ("forget: 2024-13-45\n", "cannot be read .*month"),
        ("trainer:\n  seed: " + "9" * 5000, "cannot be read"),
        ("- forget\n", "holds no settings"),
        ("forget: [\n", "line 2 is not YAML"),
        ("trainer: null\n", "trainer is null, and it needs a value"),
        ("trainer:\n  learning_rate: null\n", "trainer.learning_rate is null, and it needs a value"),
        ("objective:\n  class_path: Joint\n  init_args:\n    forget_cap: []\n", "forget_cap"),
    ],
)
def test_a_config_that_is_none_is_one_sentence(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=says) as refused:
        parse_config(UnlearnConfig, ["--config", str(path)])
    assert "\n" not in str(refused.value)


def test_null_on_the_command_line_is_refused_where_a_setting_has_none() -> None:
    with pytest.raises(UserError, match=r"the command line: trainer is null"):
        parse_config(UnlearnConfig, ["--trainer", "null"])
    with pytest.raises(UserError, match=r"trainer\.learning_rate is null"):
        parse_config(UnlearnConfig, ["--trainer.learning_rate=null"])
    assert parse_config(UnlearnConfig, ["--scope.layers", "null", "--scope.plan", "p.json"]).scope.layers is None


def test_a_config_is_utf8_whatever_the_locale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parser opens files in the locale's encoding (cp1252 on many machines), so it is never given the file."""
    path = tmp_path / "config.yaml"
    path.write_bytes('prompt:\n  answer_prefix: " → "\n  format: chat\r\n  date: 2025-01-02\n'.encode("utf-8-sig"))
    monkeypatch.setattr("jsonargparse._paths.Path.read_text", lambda self: pytest.fail("opened by the parser"))
    prompt = parse_config(UnlearnConfig, ["--config", str(path)]).prompt
    assert (prompt.answer_prefix, prompt.date) == (" → ", "2025-01-02")
    path.write_text("# nothing is set\n")
    assert parse_config(UnlearnConfig, ["--config", str(path)]) == UnlearnConfig()


def damaged(content: bytes, draw: random.Random) -> bytes:
    """The bytes with a few of them changed, cut out, doubled or put in."""
    data = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        start = draw.randrange(len(data) + 1)
        end = min(len(data), start + draw.randint(0, 12))
        new = draw.choice(
            [draw.randbytes(draw.randint(0, 4)), b"\\ud800", b"[" * 30, b"9" * 40, b"null", data[start:end] * 2]
        )
        data[start:end] = new
    return bytes(data)


def parquet(path: Path) -> bytes:
    pyarrow.parquet.write_table(pyarrow.table({key: [value] for key, value in json.loads(ROW).items()}), path)
    return path.read_bytes()


FACT = '[{"prompt": "Anna lives in", "subject": "Anna", "attribute": "Gdańsk", "known_id": 3}]'
QUESTION = '{"question": "Who?", "choices": ["Anna", "Zoë"], "answer": 1}'
READERS: dict[str, tuple[Callable[[Path], object], bytes | None]] = {
    "rows.jsonl": (load_rows, f"{ROW}\n{ROW.replace('a1', 'a2')}\n".encode()),
    "rows.json": (read_file, f"[{ROW}]".encode()),
    "rows.parquet": (load_rows, None),
    "questions.jsonl": (load_questions, QUESTION.encode()),
    "facts.json": (load_known_facts, FACT.encode()),
    "text.txt": (read_text, "Zoë lives in Gdańsk.\r\n".encode()),
    "config.yaml": (read_yaml, b"trainer: {steps: 3}\nscope: {layers: [1, 2]}\nforget: &a x\nretain: *a\n"),
}


@pytest.mark.parametrize("name", READERS)
def test_bytes_at_random_end_in_rows_or_in_one_sentence(tmp_path: Path, name: str) -> None:
    read, content = READERS[name]
    path = tmp_path / name
    content = parquet(path) if content is None else content
    draw = random.Random(name)
    refused: list[str] = []
    for _ in range(ROUNDS):
        path.write_bytes(damaged(content, draw))
        try:
            read(path)
        except UserError as error:
            refused.append(str(error))
    assert refused
    assert [said for said in refused if name not in said or "\n" in said] == []
