"""Reading rows, documents and questions: what is accepted, and the one sentence that refuses the rest."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pyarrow
import pyarrow.parquet
import pytest

from lm import row_files
from lm.data.rows import Row
from lm.errors import UserError

GOOD = [
    {"id": '"u-1"sc1', "input": "Once", "output": "upon a time.", "task": "Task1", "split": "forget"},
    {"id": '"u-1"qa0', "input": "When?", "output": "Once.", "task": "Task1", "split": "forget"},
    {"id": "77sc1", "input": "Ada", "output": "counts\u2028sheep.", "task": "Task2", "split": "forget"},
]


def lines(path: Path, records: list[dict[str, object]]) -> Path:
    path.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in records), encoding="utf-8")
    return path


def refuse(path: Path, *words: str) -> None:
    """Loading says all of `words`, in one line, and names the file."""
    with pytest.raises(UserError) as caught:
        row_files.load_rows(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    for word in words:
        assert word in message


def test_jsonl_and_parquet_give_the_same_rows(tmp_path: Path) -> None:
    jsonl = row_files.load_rows(lines(tmp_path / "a.jsonl", GOOD))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(GOOD), tmp_path / "a.parquet")
    assert jsonl == row_files.load_rows(tmp_path / "a.parquet")
    assert [row.kind for row in jsonl] == ["sc", "qa", "sc"]
    assert [row.document for row in jsonl] == ["u-1", "u-1", "77"]
    assert jsonl[2].output == "counts\u2028sheep."


def test_a_folder_with_both_formats_is_read_once(tmp_path: Path) -> None:
    lines(tmp_path / "part_b.jsonl", GOOD[2:])
    lines(tmp_path / "part_a.jsonl", GOOD[:2])
    (tmp_path / ".part_c.jsonl").write_text("rubbish")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(GOOD), tmp_path / "a.parquet")
    assert [row.id for row in row_files.load_rows(tmp_path)] == [str(record["id"]) for record in GOOD]
    for file in tmp_path.glob("*.jsonl"):
        file.unlink()
    assert len(row_files.load_rows(tmp_path)) == 3


def test_a_byte_order_mark_blank_lines_and_an_array_are_fine(tmp_path: Path) -> None:
    text = "\r\n\n".join(json.dumps(record) for record in GOOD) + "\n\n"
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    (tmp_path / "array.json").write_text(json.dumps(GOOD, indent=1))
    assert row_files.load_rows(tmp_path / "bom.jsonl") == row_files.load_rows(tmp_path / "array.json")


def test_other_column_names_and_generated_ids(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "mine.jsonl", [{"question": "Who?", "answer": "Me."}, {"question": "Who?", "answer": "You."}]
    )
    rows = row_files.load_rows(path, columns={"input": "question", "output": "answer"}, task="Task2")
    assert [(row.input, row.output, row.task, row.kind) for row in rows] == [
        ("Who?", "Me.", "Task2", "qa"),
        ("Who?", "You.", "Task2", "qa"),
    ]
    assert len({row.id for row in rows}) == 2
    again = row_files.load_rows(path, columns={"input": "question", "output": "answer"}, kind="sc")
    assert again[0].kind == "sc"
    with pytest.raises(UserError, match=r'line 1 has no column "input".*question, answer.*name the right one'):
        row_files.load_rows(path)
    with pytest.raises(UserError, match=r"maps .ouput..*did you mean 'output'"):
        row_files.load_rows(path, columns={"ouput": "answer"})


def test_a_missing_file_is_refused_with_the_likeliest_name(tmp_path: Path) -> None:
    lines(tmp_path / "forget.jsonl", GOOD)
    refuse(tmp_path / "forgte.jsonl", "does not exist", "did you mean 'forget.jsonl'")
    refuse(tmp_path / "nowhere" / "x.jsonl", "does not exist")


def test_a_folder_without_data_and_a_strange_file_are_refused(tmp_path: Path) -> None:
    refuse(tmp_path, "holds none of .jsonl, .parquet")
    (tmp_path / "rows.csv").write_text("id,input\n")
    refuse(tmp_path / "rows.csv", ".jsonl, .json, .parquet")


def test_wrong_columns(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [{"id": "1qa0", "input": "x", "ouput": "y", "task": "Task1"}])
    refuse(path, "line 1", 'no column "output"', "did you mean 'ouput'")


def test_an_empty_split(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n\n")
    refuse(tmp_path / "a.jsonl", "no rows")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(GOOD).slice(0, 0), tmp_path / "a.parquet")
    refuse(tmp_path / "a.parquet", "no rows")


def test_duplicate_ids_also_when_only_the_quotes_differ(tmp_path: Path) -> None:
    twin = dict(GOOD[0], id="u-1sc1")
    refuse(lines(tmp_path / "a.jsonl", [*GOOD, twin]), "line 4", "u-1sc1", "line 1")
    two = tmp_path / "two"
    two.mkdir()
    lines(two / "a.jsonl", GOOD)
    lines(two / "b.jsonl", GOOD[:1])
    with pytest.raises(UserError, match=r"b\.jsonl line 1.*already.*a\.jsonl line 1"):
        row_files.load_rows(two)


def test_the_same_id_on_both_sides() -> None:
    forget = (Row('"u"sc1', "a", "b", "Task1"), Row("vsc1", "a", "b", "Task1"))
    row_files.check_disjoint(forget, (Row("uqa0", "a", "b", "Task1"),))
    with pytest.raises(UserError, match=r'"u"sc1 is in both'):
        row_files.check_disjoint(forget, (Row("usc1", "c", "d", "Task1"),))
    with pytest.raises(UserError, match="and 1 more"):
        row_files.check_disjoint(forget, forget)


def test_not_utf8_and_not_json_name_the_line(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", GOOD)
    path.write_bytes(path.read_bytes() + b'\n{"id": "caf\xe9"}')
    refuse(path, "line 4", "not UTF-8", "0xe9")
    path.write_text(json.dumps(GOOD[0]) + "\n" + json.dumps(GOOD[1])[:-3])
    refuse(path, "line 2", "not JSON")
    path.write_text(json.dumps(GOOD[0]) + '\n"just text"')
    refuse(path, "line 2", "not an object")
    path.write_text("[\n1,\n]")
    refuse(path, "line 3", "not JSON")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 but not really")
    refuse(tmp_path / "b.parquet", "not a readable Parquet file")


@pytest.mark.parametrize("value", ["NaN", "null", "3", '["x"]', '"  "', '"\\ud800"'])
def test_a_value_that_is_not_text(tmp_path: Path, value: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"id": "1qa0", "input": "x", "output": {value}, "task": "Task1"}}')
    refuse(path, "line 1", '"output"')


def test_a_null_in_parquet(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([*GOOD, dict(GOOD[0], id=None)]), tmp_path / "a.parquet")
    refuse(tmp_path / "a.parquet", "row 4", '"id" is None')


def test_an_unreadable_file_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = lines(tmp_path / "a.jsonl", GOOD)

    def denied(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", denied)
    refuse(path, "Permission denied")


def test_the_hash_depends_on_text_and_order_not_on_the_format(tmp_path: Path) -> None:
    rows = row_files.load_rows(lines(tmp_path / "a.jsonl", GOOD))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(GOOD), tmp_path / "a.parquet")
    assert row_files.data_hash(rows) == row_files.data_hash(row_files.load_rows(tmp_path / "a.parquet"))
    assert row_files.data_hash(rows) != row_files.data_hash(rows[::-1])
    assert row_files.data_hash(rows[:1]) != row_files.data_hash(
        (Row(rows[0].id, rows[0].input + "x", rows[0].output, "Task1"),)
    )


def test_documents_from_rows_and_from_membership_files(tmp_path: Path) -> None:
    path = lines(tmp_path / "rows.jsonl", GOOD)
    assert row_files.load_documents(path) == ("Once upon a time.", "Ada counts\u2028sheep.")
    assert row_files.load_documents(path, task="Task2") == ("Ada counts\u2028sheep.",)
    member = lines(tmp_path / "member.jsonl", [{"id": "9", "document": "All of it.", "metadata": {"a": 1}}])
    assert row_files.load_documents(member) == ("All of it.",)
    with pytest.raises(UserError, match="no sentence-completion row of Task3"):
        row_files.load_documents(path, task="Task3")


def test_whole_documents_calibrate_as_completions(tmp_path: Path) -> None:
    texts = ["Ada Brill\n\nAda Brill (born 1815) counts.", "Cher\n\nCher sings.", " Bo  Karsk"]
    made: list[dict[str, object]] = [{"document": text, "id": f"{place}"} for place, text in enumerate(texts)]
    rows = row_files.load_calibration(lines(tmp_path / "d.jsonl", made))
    assert [row.text for row in rows] == texts
    assert [row.input for row in rows] == ["Ada", "Cher\n\nCher", " Bo"]
    assert [(row.id, row.document, row.kind, row.task) for row in rows] == [
        ("0sc1", "0", "sc", "Task3"),
        ("1sc1", "1", "sc", "Task3"),
        ("2sc1", "2", "sc", "Task3"),
    ]
    named: list[dict[str, object]] = [{"document": texts[0], "id": "77sc1", "task": "Task2"}, {"document": texts[1]}]
    own, unnamed = row_files.load_calibration(lines(tmp_path / "n.jsonl", named), task="Task1")
    assert (own.id, own.task, unnamed.task, unnamed.kind) == ("77sc1", "Task2", "Task1", "sc")
    for bad, words in (
        ({"document": "Cher"}, "line 1.*a single word"),
        ({"document": " Cher "}, "line 1.*a single word"),
        ({"document": " "}, "line 1.*is blank"),
        ({"document": 3}, "line 1.*not text"),
    ):
        with pytest.raises(UserError, match=words):
            row_files.load_calibration(lines(tmp_path / "bad.jsonl", [dict(bad)]))
    with pytest.raises(UserError, match=r"line 2: id 0sc1 is already that of .*line 1"):
        row_files.load_calibration(lines(tmp_path / "bad.jsonl", [made[0], {**made[1], "id": "0sc1"}]))
    with pytest.raises(UserError, match="holds no rows"):
        row_files.load_calibration(lines(tmp_path / "bad.jsonl", []))


def test_what_was_calibrated_on_can_be_left_out_of_what_is_scored(tmp_path: Path) -> None:
    made: list[dict[str, object]] = [{"document": f"Ada {place}"} for place in range(4)]
    everything = lines(tmp_path / "all.jsonl", made)
    used = row_files.load_calibration(lines(tmp_path / "some.jsonl", made[1:3]))
    assert row_files.load_documents(everything, without=used) == ("Ada 0", "Ada 3")
    assert len(row_files.load_documents(everything)) == 4
    with pytest.raises(UserError, match="no document but those to be left out"):
        row_files.load_documents(tmp_path / "some.jsonl", without=used)
    people = row_files.load_rows("builtin:held_out")
    left = row_files.load_documents("builtin:held_out", without=people[: len(people) // 2])
    assert left == row_files.load_documents("builtin:held_out")[-len(left) :]


def test_rows_calibrate_as_they_are_and_halves_share_no_document(tmp_path: Path) -> None:
    ids = ["asc1", "aqa0", "bsc1", "csc1", "bqa0", "cqa0", "dqa0"]
    path = lines(tmp_path / "r.jsonl", [{"id": name, "input": name, "output": "x", "task": "Task2"} for name in ids])
    assert row_files.load_calibration(path) == row_files.load_rows(path)
    halves = [[row.id for row in row_files.load_calibration(path, half=half)] for half in get_args(row_files.Half)]
    assert halves == [["asc1", "aqa0", "csc1", "cqa0"], ["bsc1", "bqa0", "dqa0"]]
    for wrong, words in (
        ({"half": "third"}, "half is 'third': write first or second"),
        ({"together": 0}, "together is 0"),
        ({"together": 2}, "the ids of .* say which rows are of one document"),
    ):
        with pytest.raises(UserError, match=words):
            row_files.load_calibration(path, **wrong)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="has no second half"):
        row_files.load_calibration(lines(tmp_path / "one.jsonl", GOOD[2:]), half="second")


def test_rows_without_ids_are_halved_by_person_where_it_is_said_how_many_each_has(tmp_path: Path) -> None:
    asked: list[dict[str, object]] = [{"question": f"{place}?", "answer": "x"} for place in range(7)]
    path, columns = lines(tmp_path / "q.jsonl", asked), {"input": "question", "output": "answer"}

    def half(name: row_files.Half, together: int) -> str:
        rows = row_files.load_calibration(path, columns=columns, half=name, together=together)
        assert {(row.task, row.kind) for row in rows} == {("Task1", "qa")}
        return "".join(row.input[0] for row in rows)

    assert [half("first", 1), half("second", 1)] == ["0246", "135"]
    assert [half("first", 3), half("second", 3)] == ["0126", "345"]


def test_the_builtin_world_calibrates() -> None:
    rows = row_files.load_rows("builtin:calibration")
    assert row_files.load_calibration("builtin:calibration") == rows
    halves = [row_files.load_calibration("builtin:calibration", half=half) for half in get_args(row_files.Half)]
    assert sorted((*halves[0], *halves[1]), key=rows.index) == list(rows)
    assert not {row.document for row in halves[0]} & {row.document for row in halves[1]}


def test_questions(tmp_path: Path) -> None:
    good = {"subject": "sums", "question": "1+1?", "choices": ["1", "2"], "answer": 1}
    (question,) = row_files.load_questions(lines(tmp_path / "q.jsonl", [good]))
    assert (question.question, question.choices, question.answer, question.subject) == ("1+1?", ("1", "2"), 1, "sums")
    for wrong, words in [
        ({"answer": 2}, "0 to 1"),
        ({"answer": True}, "0-based"),
        ({"answer": "B"}, "0-based"),
        ({"choices": ["1"]}, "at least two"),
        ({"choices": ["1", None]}, "every choice as text"),
        ({"question": ""}, "blank"),
    ]:
        with pytest.raises(UserError, match=words):
            row_files.load_questions(lines(tmp_path / "bad.jsonl", [{**good, **wrong}]))


def test_an_unknown_part_of_the_builtin_world() -> None:
    with pytest.raises(UserError, match="did you mean 'forget'"):
        row_files.load_rows("builtin:forgot")
    with pytest.raises(UserError, match="builtin:utility"):
        row_files.load_questions("builtin:forget")


def test_the_builtin_world_is_a_source() -> None:
    sides = [row_files.load_rows(f"builtin:{side}") for side in ("forget", "retain", "calibration", "held_out")]
    for one, other in itertools.combinations(sides, 2):
        row_files.check_disjoint(one, other)
    forget, retain = sides[:2]
    assert {row.task for row in forget} == {"Task1", "Task2", "Task3"} == {row.task for row in retain}
    for side, rows in (("forget", forget), ("retain", retain)):
        again = row_files.load_rows(f"builtin:{side}_paraphrase")
        assert [(row.task, row.kind) for row in again] == [(row.task, row.kind) for row in rows]
        row_files.check_disjoint(again, rows)
        row_files.check_disjoint(row_files.load_rows(f"builtin:{side}_reworded"), (*rows, *again))
    members, others = (row_files.load_documents(f"builtin:{side}", task="Task3") for side in ("forget", "held_out"))
    assert len(members) == len(others) == 20
    assert len(row_files.load_documents("builtin:calibration", task="Task3")) == 12
    assert not set(members) & set(others)
    assert len(row_files.load_questions("builtin:utility")) >= 50


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("forget_train", {"Task1": (83, 83), "Task2": (107, 535), "Task3": (152, 152)}),
        ("forget_validation", {"Task1": (24, 24), "Task2": (23, 115), "Task3": (34, 34)}),
        ("retain_train", {"Task1": (103, 103), "Task2": (102, 510), "Task3": (159, 159)}),
        ("retain_validation", {"Task1": (27, 27), "Task2": (25, 125), "Task3": (37, 37)}),
    ],
)
def test_the_public_lume_splits(shared: Path, name: str, counts: dict[str, tuple[int, int]]) -> None:
    rows = row_files.load_rows(shared / "lume" / f"{name}.jsonl")
    for task, (completions, questions) in counts.items():
        kinds = [row.kind for row in rows if row.task == task]
        assert (kinds.count("sc"), kinds.count("qa"), len(kinds)) == (completions, questions, completions + questions)
        assert len({row.document for row in rows if row.task == task}) == completions
    assert all('"' not in row.document for row in rows)


def test_the_public_lume_splits_are_disjoint(shared: Path) -> None:
    forget, retain = (row_files.load_rows(shared / "lume" / f"{side}_train.jsonl") for side in ("forget", "retain"))
    row_files.check_disjoint(forget, retain)
    with pytest.raises(UserError, match="in both"):
        row_files.check_disjoint(forget, (*retain, forget[7]))


def test_the_mmlu_file(shared: Path) -> None:
    questions = row_files.load_questions(shared / "mmlu" / "test.jsonl")
    assert len(questions) == 14_042
    assert len({question.subject for question in questions}) == 57


def test_tofu_with_mapped_columns(shared: Path) -> None:
    rows = row_files.load_rows(shared / "tofu" / "forget10.json", columns={"input": "question", "output": "answer"})
    assert len(rows) == 400


def test_the_membership_files_of_the_challenge_calibrate(shared: Path) -> None:
    folder = shared / "lume" / "mia"
    rows = row_files.load_calibration(folder / "validation_nonmember.jsonl")
    assert len(rows) == 34
    assert {(row.kind, row.task) for row in rows} == {("sc", "Task3")}
    assert tuple(row.text for row in rows) == row_files.load_documents(folder / "validation_nonmember.jsonl")
    used = {row.text for row in rows}
    members = row_files.load_documents(folder / "member.jsonl", without=rows)
    others = row_files.load_documents(folder / "nonmember.jsonl", without=rows)
    assert used < set(
        row_files.load_documents(folder / "nonmember.jsonl")
    )  # so the official list cannot be scored whole
    assert (len(members), len(others)) == (150, 150 - 34)
    assert not used & {*members, *others}


def test_half_of_the_authors_whom_no_model_of_tofu_saw_calibrate(shared: Path) -> None:
    first, second = (
        row_files.load_calibration(
            shared / "tofu" / "holdout10.json",
            columns={"input": "question", "output": "answer"},
            half=half,
            together=20,
        )
        for half in get_args(row_files.Half)
    )
    assert len(first) == len(second) == 200
    assert "Siriporn Nakharin" in first[0].input
    assert not {row.id for row in first} & {row.id for row in second}
    told = " ".join(row.text for row in second)
    assert "Siriporn Nakharin" not in told


def test_a_row_whose_id_was_made_up_is_called_by_its_text(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "Who is Ada of the long, long name?", "answer": "x"}))
    rows = row_files.load_rows(str(tmp_path / "rows.jsonl"), columns={"input": "question", "output": "answer"})
    assert row_files.row_name(rows[0]) == "'Who is Ada of the long, long name?'"
    assert row_files.row_name(replace(rows[0], id="a1qa0")) == "a1qa0"
    with pytest.raises(UserError, match=r"^row 'Who is Ada of the long, long name\?' is in both"):
        row_files.check_disjoint(rows, rows)


def test_a_path_may_begin_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"id": "a1qa0", "input": "q", "output": "a", "task": "Task2"}))
    assert len(row_files.load_rows("~/rows.jsonl")) == 1
