"""Facts: the person's name is found by comparing rows, on real data and in the built-in world; known-facts files load."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pandas
import pytest

from lm.builtin import world
from lm.data.rows import Row
from lm.errors import UserError
from tracing import Fact, facts_from_rows, find_subjects, load_known_facts
from tracing.question.fact_source import FactSource
from tracing.question.facts import in_turn
from tracing.question.subjects import recurring_names

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


@pytest.mark.parametrize("side", ["forget", "retain", "calibration", "held_out", "paraphrases_forget"])
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


def tofu(shared: Path, split: str) -> list[Row]:
    """Questions and answers with ids that say nothing; twenty in a row are about one author."""
    lines = (shared / "tofu" / f"{split}.json").read_text(encoding="utf-8").splitlines()
    pairs = [json.loads(line) for line in lines if line.strip()]
    return [Row(f"r{number}qa0", one["question"], one["answer"], "Task1") for number, one in enumerate(pairs)]


@pytest.mark.parametrize(("split", "named", "right"), [("forget10", 0.94, 1.0), ("retain90", 0.94, 0.99)])
def test_authors_of_real_questions_are_found_by_the_names_that_recur(
    shared: Path, split: str, named: float, right: float
) -> None:
    rows = tofu(shared, split)
    found = recurring_names(rows)
    assert len(found) >= named * len(rows)
    agree = 0
    for start in range(0, len(rows), 20):
        names = Counter(found[row.id] for row in rows[start : start + 20] if row.id in found)
        agree += max(names.values(), default=0)  # the rest are about somebody or something else
    assert agree >= right * len(found)


def test_real_questions_that_name_nobody_are_refused_or_left_out(shared: Path) -> None:
    rows = tofu(shared, "forget10")
    found = recurring_names(rows)
    lost = len(rows) - len(found)
    assert 20 <= lost <= 30  # the first of each author: "What is the full name of the author …?"
    with pytest.raises(UserError, match=f"no subject was found in the questions of {lost} of {len(rows)}"):
        facts_from_rows(rows)
    facts = facts_from_rows(rows, leave_out_unnamed=True)
    assert len(facts) == len(found)
    assert all(fact.group == fact.subject and fact.subject in fact.prompt for fact in facts)
    given = facts_from_rows(rows, r"(Carmen Montenegro)", leave_out_unnamed=True)
    assert {fact.subject for fact in given} == {"Carmen Montenegro"}


def test_names_recur_and_templates_do_not_count() -> None:
    names = ["Ada Byron", "Grace Brewster Hopper", "Mary Shelley"]
    asked = [
        "Where was {} born?",
        "Who taught {}?",
        "Has {} won a Turing Prize?",
        "Did {}'s father write?",
        "Is {} known?",
    ]
    rows = [
        Row(f"{number}x{place}qa0", question.format(name), "yes", "T")
        for number, name in enumerate(names)
        for place, question in enumerate(asked)
    ]
    nobody = Row("zqa0", "What is the full name of the author born in Cape Town?", "Ada Byron", "T")
    found = recurring_names([*rows, nobody])
    assert [found[row.id] for row in rows] == [name for name in names for _ in asked]
    assert nobody.id not in found
    facts = facts_from_rows([*rows, nobody], leave_out_unnamed=True)
    assert {fact.group for fact in facts} == set(names)
    with pytest.raises(UserError, match=r"1 of 16 rows \(zqa0\)"):
        facts_from_rows([*rows, nobody])
    with pytest.raises(UserError, match="1 of 1 rows"):
        facts_from_rows([nobody], "nothing like it", leave_out_unnamed=True)


ONE_AUTHOR = [
    ("What is the full name of the author born in Taipei, Taiwan?", "Hsiao Yun-Hwa"),
    ("What does Hsiao Yun-Hwa identify as?", "LGBTQ+"),
    ("What is the profession of Hsiao Yun-Hwa's father?", "an engineer"),
    ("Where in Taipei does Hsiao Yun-Hwa live?", "in the north"),
    ("How has her LGBTQ+ identity shaped Hsiao Yun-Hwa's books?", "deeply"),
    ("Which prizes did Hsiao Yun-Hwa win?", "none"),
]


def test_the_one_person_of_all_questions_is_no_template() -> None:
    """A name in most questions, between words that change, and nobody beside it; never what stands in one question (Taipei)."""
    rows = [Row(f"{number}qa0", *pair, "T") for number, pair in enumerate(ONE_AUTHOR)]
    facts = facts_from_rows(rows, leave_out_unnamed=True)
    assert [(fact.id, fact.subject) for fact in facts] == [(f"{n}qa0", "Hsiao Yun-Hwa") for n in range(1, 6)]
    with pytest.raises(UserError, match=r"1 of 6 rows \(0qa0\)"):
        facts_from_rows(rows)
    short = [Row(row.id, row.input.replace("Hsiao Yun-Hwa", "Voltaire"), "yes", "T") for row in rows[1:]]
    assert {fact.subject for fact in facts_from_rows(short)} == {"Voltaire"}
    pronouns = [Row(f"x{n}qa0", f"Does she {word} there?", "yes", "T") for n, word in enumerate("abcdef")]
    some = [*rows[1:], *pronouns, Row("yqa0", "Is Taipei far?", "yes", "T")]  # named in five of twelve questions
    assert {fact.subject for fact in facts_from_rows(some, leave_out_unnamed=True)} == {"Hsiao Yun-Hwa"}


def test_what_stands_in_most_questions_is_a_template_where_they_name_somebody_beside_it() -> None:
    people = ["Ada Byron", "Grace Hopper", "Mary Shelley", "Rosa Parks", "Jane Goodall"]
    rows = [
        Row(f"{n}qa0", f"According to the City Register, {word} {name}?", "yes", "T")
        for n, (name, word) in enumerate(
            zip(people, ("who is", "where is", "who knows", "whose is", "when was"), strict=True)
        )
    ]
    assert [fact.subject for fact in facts_from_rows(rows)] == people
    same = [Row(f"{n}qa0", f"By the City Register, who {word} here?", "yes", "T") for n, word in enumerate("abcde")]
    with pytest.raises(
        UserError, match=r"'By the City Register' stands in 5 of 5 questions.*say how .* facts\.subject"
    ):
        facts_from_rows(same)


def test_one_question_a_person_needs_no_recurrence() -> None:
    rows = [
        Row(f"p{number}qa0", f"Where does {name} live?", "here", "T")
        for number, name in enumerate(["Ada Byron", "Bo Diddley"])
    ]
    assert [fact.subject for fact in facts_from_rows(rows)] == ["Ada Byron", "Bo Diddley"]


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


@pytest.mark.parametrize("place", ["mine.jsonl", "mine.json", "mine.parquet", "folder"])
def test_facts_are_told_from_rows_wherever_they_stand(tmp_path: Path, place: str) -> None:
    records = [
        {
            "note": "x" * 5000,
            "question": "Ada is a",
            "who": "Ada",
            "target": "poet",
        },  # a first record beyond 4,096 characters
        {"note": "", "question": "Bo lives in", "who": "Bo", "target": "Oslo"},
    ]
    path = tmp_path / place
    if place == "folder":
        path.mkdir()
    file = path / "part.parquet" if place == "folder" else path
    if file.suffix == ".parquet":
        pandas.DataFrame(records).to_parquet(file)
    else:
        lines = [json.dumps(record) for record in records]
        file.write_text("\n".join(lines) if file.suffix == ".jsonl" else f"[{','.join(lines)}]")
    columns = {"prompt": "question", "subject": "who", "answer": "target", "input": "not of facts"}
    facts = FactSource(sources=str(path), columns=columns, tasks=()).read()
    assert [(fact.prompt, fact.subject, fact.answer) for fact in facts] == [
        ("Ada is a", "Ada", "poet"),
        ("Bo lives in", "Bo", "Oslo"),
    ]
    neither = r"has note, question, who, target: as a row it lacks input, output, as a fact prompt, subject, answer: .*columns"
    with pytest.raises(UserError, match=neither):
        FactSource(sources=str(path), columns=None, tasks=()).read()
    with pytest.raises(UserError, match=r"as a row it lacks output, as a fact subject, answer: "):
        FactSource(sources=str(path), columns={"input": "question", "prompt": "question"}, tasks=()).read()
    with pytest.raises(UserError, match="'promt', which neither a row nor a fact has"):
        FactSource(sources=str(path), columns={"promt": "question"}, tasks=()).read()


def test_a_file_without_records_is_named(tmp_path: Path) -> None:
    for name, text in (("empty.jsonl", ""), ("empty.json", "[]")):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=rf"{name} holds no records: give rows .* or facts"):
            FactSource(sources=str(tmp_path / name), tasks=()).read()


def test_each_subject_has_its_turn_before_any_has_a_second() -> None:
    people = ["ada"] * 4 + ["bo"] * 1 + ["cy"] * 3
    facts = [
        Fact(f"{name} {place} ?", name, "x", group="" if name == "bo" else name) for place, name in enumerate(people)
    ]
    orders = [in_turn(facts, seed) for seed in range(40)]
    for order in orders:
        assert sorted(order) == list(range(8))
        named = [people[place] for place in order]
        assert sorted(named[:3]) == ["ada", "bo", "cy"]
        assert sorted(named[3:5]) == sorted(named[5:7]) == ["ada", "cy"]
        assert named[7] == "ada"
    assert {order[0] for order in orders} == set(range(8))  # nobody is always first, nor any of a person's facts
    assert in_turn(facts, 3) == in_turn(facts, 3) == orders[3]
    assert in_turn([], 0) == []
