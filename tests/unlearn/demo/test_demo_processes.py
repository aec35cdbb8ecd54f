"""The demo's models on several processes: the numbers of one, a log for each, errors in a sentence."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from lm.errors import UserError
from lm.model import ModelSpec
from tests.unlearn.demo.test_demo import short
from tracing.question.fact_source import FactSource
from tracing.stages.trace.config import TraceConfig
from unlearn.demo import stage
from unlearn.demo.config import DemoConfig
from unlearn.demo.tasks import LOG, Task, run_tasks
from unlearn.processes import NOT_BEGUN, cores


def write(file: Path, needs: Path | None = None) -> None:
    file.write_text("" if needs is None else needs.read_text() + "after it")
    print(f"wrote {file.name}")


def refuse(why: str) -> None:
    raise UserError(why)


def test_tasks_go_on_without_what_failed_and_say_so_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def task(key: str, work: object, *arguments: object, after: tuple[str, ...] = ()) -> Task:
        return Task(key, key.capitalize(), tmp_path / key, work, arguments, after)  # type: ignore[arg-type]

    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    tasks = [
        task("broken", refuse, "steps is -1: give more"),
        task("left", write, one, after=("broken",)),
        task("first", write, one),
        task("second", write, two, one, after=("first",)),
    ]
    ends: list[int] = []
    with pytest.raises(UserError) as told:
        run_tasks(tasks, workers=2, ended=lambda: ends.append(1))
    assert str(told.value).startswith("Broken: steps is -1: give more; what is done is kept")
    assert len(ends) == 4
    assert two.read_text() == "after it"
    assert re.fullmatch(r"wrote two\.txt\ntook \d+\.\d s of the processor\n", (tmp_path / "second" / LOG).read_text())
    said = capsys.readouterr().out
    assert f"== Left: {NOT_BEGUN}\n" in said
    assert f"== First: begins ({tmp_path / 'first' / LOG})" in said
    assert "== First: done after " in said
    with pytest.raises(UserError, match=r"^steps is -1: give more$"):
        run_tasks(tasks, workers=1, ended=lambda: None)


def test_as_many_workers_as_cores_but_one_on_a_gpu_or_under_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    assert stage._workers(DemoConfig(), 100) == cores()
    assert stage._workers(DemoConfig(), 1) == 1
    assert stage._workers(DemoConfig(workers=7), 100) == 7
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    assert stage._workers(DemoConfig(), 100) == 1
    with pytest.raises(UserError, match="workers is 7, and the demo was launched on 2 processes"):
        stage._workers(DemoConfig(workers=7), 100)
    with pytest.raises(UserError, match="workers is 0"):
        DemoConfig(workers=0)


@pytest.mark.parametrize(
    "own",
    [
        {"trace": TraceConfig(model=ModelSpec(path="runs/own"))},
        {"trace": TraceConfig(facts=FactSource(sources=("builtin:forget", "own.jsonl")))},
        {"trace": TraceConfig(facts=FactSource(sources="own.jsonl"))},
        {"retain_model": "runs/own"},
    ],
)
def test_a_model_or_facts_of_one_s_own_are_not_taken_for_the_built_in_ones(own: dict[str, Any]) -> None:
    with pytest.raises(
        UserError, match=r"is \S*own\S*, and the demo unlearns and scores the built-in rows.* use palimpsest trace"
    ):
        DemoConfig(**own)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As in the processes: another number of threads may round otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_two_workers_give_the_numbers_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trace, the retain model, the method and the method that heals: whatever reads what another has left."""
    chosen = {"trace", "retain_only", "joint_planned", "wipe_heal"}
    monkeypatch.setattr(stage, "_tasks", lambda *a, _all=stage._tasks: [t for t in _all(*a) if t.key in chosen])
    monkeypatch.setattr(stage, "write_report", lambda *a: None)
    monkeypatch.setattr(stage, "demo_report", lambda *a, **k: None)
    found = {}
    for workers in (1, 2):
        config = replace(short(tmp_path / f"{workers}" / "run"), workers=workers, attack=None)
        stage.run_demo(config)
        found[workers] = json.loads((Path(config.out) / "results.json").read_text())
        for record in found[workers]["models"].values():
            del record["seconds"]
    assert found[1] == found[2]
    assert len(found[1]["models"]) == 3
    logs = sorted(str(path.parent.relative_to(tmp_path / "2" / "run")) for path in tmp_path.rglob(LOG))
    assert logs == ["joint_planned", "scores/retain_only", "trace", "wipe_heal"]
