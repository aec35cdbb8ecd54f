"""Facts: the person's name is found by comparing rows, on real data and in the built-in world; known-facts files load."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from lm.builtin import world
from lm.errors import UserError
from lm.rows import Row
from tracing import Fact, facts_from_rows, find_subjects, load_known_facts

NAME = re.compile(r"What is the (?:birth date|home address) of (.*)\?$|What is (.*)'s (?:Social|phone|email)")


def lume(shared: Path, split: str, task: str) -> list[Row]:
    lines = (shared / "lume" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in (Row(**json.loads(line)) for line in lines) if row.task == task]


@pytest.mark.parametrize("split", ["forget_train", "forget_validation", "retain_train", "retain_validation"])
def test_every_person_of_the_real_data_is_found(shared: Path, split: str) -> None:
    rows = lume(shared, split, "Task2")
    facts = facts_from_rows(rows)
    assert len(facts) == sum(row.kind == "qa" for row in rows)
    for fact in facts:
        match = NAME.match(fact.prompt)
        assert match is not None
        assert fact.subject == (match[1] or match[2])
    only_questions = facts_from_rows([row for row in rows if row.kind == "qa"])
    assert only_questions == facts
    one_person = facts_from_rows([row for row in rows if row.document == rows[0].document])
    assert one_person == [fact for fact in facts if fact.group == rows[0].document]


@pytest.mark.parametrize("task", ["Task1", "Task3"])
def test_other_tasks_give_a_name_from_the_question_or_say_which_rows_have_none(shared: Path, task: str) -> None:
    rows = lume(shared, "forget_train", task)
    found = find_subjects(rows)
    questions = [row for row in rows if row.kind == "qa"]
    assert len(found) > 0.8 * len(questions)
    for row in questions:
        subject = found.get(row.document)
        assert subject is None or (subject in row.input and subject[0] == subject[0].upper())
        assert subject is None or row.output not in subject
    if len(found) < len(questions):
        with pytest.raises(UserError, match=f"{len(questions) - len(found)} of {len(questions)} rows"):
            facts_from_rows(rows)


@pytest.mark.parametrize("side", ["forget", "retain", "held_out", "paraphrases_forget"])
def test_every_person_of_the_built_in_world_is_found(side: str) -> None:
    built = world.build()
    rows = [row for row in getattr(built, side) if row.task == "Task2"]
    names = {person.document: person.name for person in built.people}
    facts = facts_from_rows(rows)
    assert len(facts) == sum(row.kind == "qa" for row in rows) > 0
    for fact in facts:
        assert fact.subject == names[fact.group.removesuffix("r")]


def test_the_id_names_the_row_and_the_group_the_person() -> None:
    rows = [
        Row("a1sc1", "Mary O'Brien de Vries was born", "in May.", "Task2"),
        Row("a1qa0", "What is Mary O'Brien de Vries's phone number?", "555", "Task2"),
        Row("a1qa1", "When was Mary O'Brien de Vries born?", "in May", "Task2"),
    ]
    facts = facts_from_rows(rows)
    assert [fact.id for fact in facts] == ["a1qa0", "a1qa1"]
    assert {fact.subject for fact in facts} == {"Mary O'Brien de Vries"}
    assert {fact.group for fact in facts} == {"a1"}


def test_the_template_s_capitals_are_no_names() -> None:
    rows = []
    for number, name in enumerate(["Ada Byron", "Grace Hopper", "Mary Shelley"]):
        rows.append(Row(f"{number}qa0", f"What is the Social Security Number of {name}?", "1", "Task2"))
        rows.append(Row(f"{number}qa1", f"Has {name} got a Social Security Number?", "yes", "Task2"))
    assert sorted(find_subjects(rows).values()) == ["Ada Byron", "Grace Hopper", "Mary Shelley"]


def test_a_subject_may_be_given_by_expression_or_function() -> None:
    rows = [Row("a1qa0", "who is ada byron today?", "a poet", "Task2")]
    for given in (r"who is (.*) today", r"(?P<subject>ada byron)", re.compile("ada byron"), lambda row: "ada byron"):
        assert facts_from_rows(rows, given)[0].subject == "ada byron"
    with pytest.raises(UserError, match="a1qa0"):
        facts_from_rows(rows)  # nothing capital in it
    with pytest.raises(UserError, match="not a regular expression"):
        facts_from_rows(rows, "(")
    with pytest.raises(UserError, match="not in its prompt"):
        facts_from_rows(rows, lambda row: "Charles")


def test_rows_without_questions_are_refused() -> None:
    with pytest.raises(UserError, match="question-answering rows"):
        facts_from_rows([Row("a1sc1", "Ada was", "here", "Task2")])


@pytest.mark.parametrize("wrong", [{"prompt": " "}, {"subject": ""}, {"answer": "\n"}, {"subject": "Grace"}])
def test_an_impossible_fact_is_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(UserError):
        Fact(**{"prompt": "Who is Ada?", "subject": "Ada", "answer": "a poet", **wrong})


def test_known_facts_files(shared: Path) -> None:
    facts = load_known_facts(shared / "known_facts" / "known_facts.json")
    assert len(facts) == 800
    assert facts[0] == Fact(
        "Vinson Massif is located in the continent of", "Vinson Massif", "Antarctica", id="0", group="Vinson Massif"
    )


def test_a_small_known_facts_file(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    path.write_text(json.dumps([{"prompt": "Ada is a", "subject": "Ada", "attribute": " poet"}]))
    (fact,) = load_known_facts(path)
    assert (fact.subject, fact.answer) == ("Ada", "poet")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "line 1 is not JSON"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"[]", "holds no facts"),
        (b'{"prompt": "x"}', 'line 1 has no column "subject"'),
        (b'[{"prompt": "Ada is", "subject": "Ada"}]', 'item 1 has no column "answer"'),
        (b"[3]", "item 1 is 3, not an object"),
    ],
)
def test_a_broken_known_facts_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "facts.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_known_facts(path)
    with pytest.raises(UserError, match="does not exist"):
        load_known_facts(tmp_path / "absent.json")


def test_facts_of_one_s_own_in_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    lines = [
        {"prompt": "Żółw lives in", "subject": "Żółw", "answer": " Gdańsk", "foil": "Łódź", "id": 7},
        {"prompt": "Ada is a", "subject": "Ada", "attribute": "poet", "group": "poets", "foil": None},
    ]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    first, second = load_known_facts(path)
    assert first == Fact("Żółw lives in", "Żółw", "Gdańsk", id="7", group="Żółw", foil="Łódź")
    assert (second.answer, second.group, second.foil) == ("poet", "poets", "")
    assert load_known_facts(tmp_path) == [first, second]
