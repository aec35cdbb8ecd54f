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
from lm.row_files import BUILTIN_ROWS, check_disjoint, data_hash

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module", params=[0, 1, 17])
def world(request: pytest.FixtureRequest) -> World:
    return build(request.param)


def sides(world: World) -> dict[str, tuple[Row, ...]]:
    return {side: world.parts[side] for side in worlds.SIDES}


def test_counts_are_those_of_the_schema(world: World) -> None:
    for name, rows in sides(world).items():
        counted = Counter((row.task, row.kind) for row in rows)
        for task, documents in DOCUMENTS.items():
            assert counted[task, "sc"] == documents[name]  # type: ignore[index]
            assert counted[task, "qa"] == documents[name] * (5 if task == "Task2" else 1)  # type: ignore[index]
    assert DOCUMENTS["Task3"]["held_out"] == DOCUMENTS["Task3"]["forget"]
    assert 100 <= len(world.utility) <= 150


def test_ids_are_unique_and_end_in_one_digit(world: World) -> None:
    ids = [row.id for rows in world.parts.values() for row in rows]
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
    for row in (*world.forget, *world.retain, *world.unseen):
        named = [name for name in name_of.values() if name in f"{row.input} {row.output}"]
        assert named == [name_of[row.document]]


def test_no_answer_stands_in_its_prompt_and_no_answer_uses_the_name(world: World) -> None:
    name_of = {person.document: person.name for person in world.people}
    for row in (*world.forget, *world.retain, *world.unseen):
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


def test_the_unseen_documents_are_the_calibration_ones_and_the_held_out_ones_in_whole_blocks_of_four(
    world: World,
) -> None:
    side_of = {person.document: person.side for person in world.people}
    blocks: dict[str, dict[str, list[int]]] = {"Task1": {}, "Task2": {}, "Task3": {}}
    for task, found in blocks.items():
        documents = [row for row in world.unseen if row.task == task and row.kind == "sc"]
        assert [row.document for row in documents] == sorted(row.document for row in documents)
        for first in range(0, len(documents), 4):
            block = documents[first : first + 4]
            (side,) = {side_of[row.document] for row in block}
            found.setdefault(side, []).append(first // 4)
            assert all(row in world.parts[side] for row in block)
            # The n-th of every block is written like the n-th of the first one: without its own words it is the same.
            assert [row.input.split()[-1] for row in block] == [row.input.split()[-1] for row in documents[:4]]
    assert blocks == {
        "Task1": {"held_out": [0], "calibration": [1]},
        "Task2": {"held_out": [0], "calibration": [1]},
        "Task3": {"held_out": [0, 2, 4, 6, 7], "calibration": [1, 3, 5]},
    }
    assert len(world.unseen) == len(world.calibration) + len(world.held_out)
    check_disjoint(world.calibration, world.held_out)


@pytest.mark.parametrize(
    ("seed", "forget", "retain", "unseen", "forget_again", "retain_again"),
    [
        (0, "790a6f47288a2353", "ea88d0164065428b", "c90cd55efd6676c5", "f330d2eccc82e5de", "36eb5cd08100d3f6"),
        (1, "d90b48eac618f246", "5071ee9e11588cf6", "6081280d2517ab53", "313e9a54be8b8ea1", "062eb642898eee18"),
        (17, "48b8227c15ee5798", "6be78d5e70af3c7c", "4f2dc5496121d043", "cfb0108c87972440", "a4faeb067c0522f0"),
    ],
)
def test_the_rows_are_those_that_the_shipped_models_and_the_figures_in_the_docs_know(
    seed: int, forget: str, retain: str, unseen: str, forget_again: str, retain_again: str
) -> None:
    """Digests of before some of the unseen people became calibration."""
    world = build(seed)
    assert [
        data_hash(rows)[:16]
        for rows in (
            *(world.forget, world.retain, world.unseen),
            *(world.paraphrases_forget, world.paraphrases_retain),
        )
    ] == [forget, retain, unseen, forget_again, retain_again]


def test_reworded_rows_ask_the_same_people_in_the_wordings_that_the_models_see(world: World) -> None:
    for side, rows in (("forget", world.forget), ("retain", world.retain)):
        reworded = world.parts[f"{side}_reworded"]
        questions = [row for row in rows if row.kind == "qa"]
        assert len(reworded) == 4 * len(questions)
        for place, row in enumerate(questions):
            four = reworded[4 * place : 4 * place + 4]
            assert [other.id for other in four] == [f"{row.document}w{n}{row.id[-3:]}" for n in (1, 2, 3, 4)]
            assert tuple(other.input for other in four) == world.rewordings[row.id]
            assert {(other.output, other.task, other.kind) for other in four} == {(row.output, row.task, "qa")}
        check_disjoint(rows, reworded)
        assert not {row.document for row in rows} & {row.document for row in reworded}
        asked = {row.input for part in ("forget", "retain", f"{side}_paraphrase") for row in world.parts[part]}
        assert not asked & {row.input for row in reworded}
    assert build(0).parts["forget_reworded"][0].id == "story001w1qa0"


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
    assert set(files) == {*(f"{part}.jsonl" for part in BUILTIN_ROWS), "utility.jsonl"}
    assert tuple(world.parts) == BUILTIN_ROWS
    read = [Row(**json.loads(line)) for line in files["forget.jsonl"].read_text(encoding="utf-8").splitlines()]
    assert tuple(read) == world.forget
    assert "\\u" not in files["retain.jsonl"].read_text(encoding="utf-8")
