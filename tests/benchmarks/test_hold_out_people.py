"""benchmarks/comparison/hold_out_people.py: whole documents stand apart, and their scores are told from the others'."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.comparison.hold_out_people import HoldOut, deal, groups_of, main, table
from benchmarks.comparison.methods import Configs, MethodList, world_sources
from lm.config import parse_config
from lm.data.rows import Row
from lm.errors import UserError
from lm.row_files import load_rows
from tests.unlearn.helpers import ROOT


def rows(task: str, people: int) -> list[Row]:
    return [Row(f"{task}{n}{kind}", "q", "a", task) for n in range(people) for kind in ("sc1", "qa0", "qa1")]


def test_a_share_of_the_documents_of_each_task_stands_apart() -> None:
    given = [*rows("Task1", 8), *rows("Task2", 2)]
    healed, unhealed = deal(given, 0.25, seed=0)
    assert sorted([*healed, *unhealed], key=given.index) == given
    assert not {row.document for row in healed} & {row.document for row in unhealed}
    assert [len({row.document for row in unhealed if row.task == task}) for task in ("Task1", "Task2")] == [2, 1]
    assert deal(given, 0.25, seed=0) == (healed, unhealed)
    assert deal(given, 0.25, seed=1) != (healed, unhealed)
    with pytest.raises(UserError, match="Task3 has one retain document"):
        deal(rows("Task3", 1), 0.25, seed=0)
    with pytest.raises(UserError, match="share is 1"):
        HoldOut(share=1)


def test_the_world_has_both_and_all_else(tmp_path: Path) -> None:
    main(HoldOut(out=str(tmp_path)))
    sources = world_sources(str(tmp_path))
    assert (Path(sources["memorized"]) / "model.safetensors").is_file()
    assert not [
        name for name, source in sources.items() if source.startswith("builtin")
    ]  # which stages do not mix with files
    listed = parse_config(MethodList, ["--config", str(ROOT / "benchmarks" / "lists" / "location.yaml")])
    configs = Configs.of(listed, str(tmp_path), tmp_path / "out")
    assert configs.made(listed.methods[0], 1).unlearning.retain == sources["retain_healed"]
    both = [*load_rows(sources["retain_healed"]), *load_rows(sources["retain_unhealed"])]
    assert {row.id for row in both} == {row.id for row in load_rows("builtin:retain")}


def said(path: Path, answers: dict[str, str]) -> None:
    lines = [
        {"id": row, "task": "Task2", "input": "q", "expected_output": "a b", "model_output": said}
        for row, said in answers.items()
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_groups_are_scored_apart(tmp_path: Path) -> None:
    for seed, answer in ((1, "a"), (2, "a b")):
        scores = tmp_path / "wipe" / f"seed-{seed}" / "scores"
        said(scores / "forget.jsonl", {"f0qa0": "a b", "f0qa1": "x", "f1qa0": "x", "f1qa1": "x"})
        said(scores / "retain.jsonl", {"r0qa0": "a b", "r0sc1": "a", "r1sc1": answer})
        (scores / "scores.json").write_text("{}")
    found = groups_of(tmp_path, [Row("r1sc1", "q", "a b", "Task2")])
    assert found == {"wipe": {"forgotten": [0.25, 0.25], "healed": [0.75, 0.75], "unhealed": [0.5, 1.0]}}
    assert (
        table(found).split("\n")[2]
        == "| wipe | 2 | 0.250 (0.250 to 0.250) | 0.750 (0.750 to 0.750) | 0.750 (0.500 to 1.000) |"
    )
    with pytest.raises(UserError, match="did not ask all rows that stand apart"):
        groups_of(tmp_path, [Row("r9sc1", "q", "a b", "Task2")])
    with pytest.raises(UserError, match="holds no finished evaluation"):
        groups_of(tmp_path / "nowhere", [])
