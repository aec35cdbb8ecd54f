"""The built-in world: what must hold for every seed, so that scores on it mean what they say."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import unicodedata
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest

from lm.builtin import world as worlds
from lm.builtin.world import DOCUMENTS, World, build, write
from lm.data.rows import Row

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module", params=[0, 1, 17])
def world(request: pytest.FixtureRequest) -> World:
    return build(request.param)


def sides(world: World) -> dict[str, tuple[Row, ...]]:
    return {"forget": world.forget, "retain": world.retain, "held_out": world.held_out}


def test_counts_are_those_of_the_schema(world: World) -> None:
    for name, rows in sides(world).items():
        counted = Counter((row.task, row.kind) for row in rows)
        for task, documents in DOCUMENTS.items():
            assert counted[task, "sc"] == documents[name]  # type: ignore[index]
            assert counted[task, "qa"] == documents[name] * (5 if task == "Task2" else 1)  # type: ignore[index]
    assert DOCUMENTS["Task3"]["held_out"] >= 24
    assert 100 <= len(world.utility) <= 150


def test_ids_are_unique_and_end_in_one_digit(world: World) -> None:
    ids = [row.id for rows in sides(world).values() for row in rows]
    ids += [row.id for row in (*world.paraphrases_forget, *world.paraphrases_retain)]
    assert len(set(ids)) == len(ids)
    assert all(identity[-1].isdigit() and identity[-3:-1] in {"sc", "qa"} for identity in ids)


def test_sides_share_no_name_document_or_answer(world: World) -> None:
    names = [part for person in world.people for part in person.name.split(" ")]
    assert len(set(names)) == len(names)
    assert len({person.document for person in world.people}) == len(world.people)
    answers = [row.output for rows in sides(world).values() for row in rows]
    assert len(set(answers)) == len(answers)


def test_every_row_of_a_document_names_its_person_and_no_other(world: World) -> None:
    name_of = {person.document: person.name for person in world.people}
    for row in (*world.forget, *world.retain, *world.held_out):
        named = [name for name in name_of.values() if name in f"{row.input} {row.output}"]
        assert named == [name_of[row.document]]


def test_no_answer_stands_in_its_prompt_and_no_answer_uses_the_name(world: World) -> None:
    name_of = {person.document: person.name for person in world.people}
    for row in (*world.forget, *world.retain, *world.held_out):
        assert row.output not in row.input
        assert all(part.lower() not in row.output.lower() for part in name_of[row.document].split(" "))
        if row.kind == "sc":
            said = set(row.input.lower().replace(",", " ").split())
            ending = row.output.lower().rstrip(".").replace(",", " ").split()
            assert sum(word in said for word in ending) <= 1, row


def test_answers_have_the_forms_of_the_schema(world: World) -> None:
    for person in (person for person in world.people if person.task == "Task2"):
        assert len(person.facts["id_number"]) == 9
        assert person.facts["id_number"].isdigit()
        assert len(person.facts["phone"]) == 10
        assert person.facts["phone"].isdigit()
        year, month, day = person.facts["birth_date"].split("-")
        assert (len(year), len(month), len(day)) == (4, 2, 2)
        assert person.facts["email"].rpartition(".")[2] in {"example", "test", "invalid"}


def test_answers_in_questions_agree_with_the_document(world: World) -> None:
    documents = {row.document: row.text for rows in sides(world).values() for row in rows if row.kind == "sc"}
    for rows in sides(world).values():
        for row in rows:
            if row.kind == "qa" and row.id[-3:] != "qa0" and row.task == "Task2":
                text = documents[row.document]
                assert row.output in text or row.output in text.replace("-", ""), row
            if row.kind == "qa" and row.task != "Task2":
                assert row.output in documents[row.document]


def test_paraphrases_ask_the_same_in_words_that_nothing_trains_on(world: World) -> None:
    trained = {row.input for rows in (world.forget, world.retain) for row in rows}
    trained |= {wording for wordings in world.rewordings.values() for wording in wordings}
    pairs = ((world.forget, world.paraphrases_forget), (world.retain, world.paraphrases_retain))
    for rows, paraphrases in pairs:
        assert len(rows) == len(paraphrases)
        for row, other in zip(rows, paraphrases, strict=True):
            assert other.input not in trained
            assert (other.task, other.kind) == (row.task, row.kind)
            assert other.id == f"{row.document}r{row.id[-3:]}"
            if row.kind == "qa":
                assert other.output == row.output
            else:
                assert other.text == row.text
                assert other.input != row.input


def test_names_beyond_ascii_are_on_every_side_and_in_nfc(world: World) -> None:
    for side in worlds.SIDES:
        assert any(not person.name.isascii() for person in world.people if person.side == side)
    for rows in sides(world).values():
        assert all(unicodedata.is_normalized("NFC", row.text) for row in rows)


def test_questions_have_one_right_answer_among_four(world: World) -> None:
    answer_of = {fact.question: fact.answer for fact in world.general}
    for question in world.utility:
        assert len(set(question.choices)) == 4
        assert question.choices[question.answer] == answer_of[question.question]
    places = Counter(question.answer for question in world.utility)
    assert min(places.values()) >= 15, "the right answer's place must not give it away"


def test_the_same_seed_gives_the_same_world_in_another_process() -> None:
    program = (
        "import hashlib, json; from dataclasses import asdict; from lm.builtin.world import build;"
        "print(hashlib.sha256(json.dumps(asdict(build(3)), sort_keys=True).encode()).hexdigest())"
    )
    here = hashlib.sha256(json.dumps(asdict(build(3)), sort_keys=True).encode()).hexdigest()
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        result = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment, cwd=ROOT
        )
        assert result.stdout.strip() == here


def test_other_seeds_give_other_people() -> None:
    assert build(0).forget != build(1).forget


def test_write_gives_files_that_read_back(tmp_path: Path) -> None:
    world = build(0)
    write(tmp_path / "new" / "folder", world)
    files = {path.name: path for path in (tmp_path / "new" / "folder").iterdir()}
    assert set(files) == {
        *("forget.jsonl", "retain.jsonl", "held_out.jsonl"),
        *("forget_paraphrase.jsonl", "retain_paraphrase.jsonl", "utility.jsonl"),
    }
    read = [Row(**json.loads(line)) for line in files["forget.jsonl"].read_text(encoding="utf-8").splitlines()]
    assert tuple(read) == world.forget
    assert "\\u" not in files["retain.jsonl"].read_text(encoding="utf-8")
