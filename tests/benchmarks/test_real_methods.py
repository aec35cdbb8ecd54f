"""benchmarks/real_methods.py: every method of the table is compared, on the same weights, rows and steps."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.real_methods import Comparison, has_all, search, settings
from tests.unlearn.helpers import ROOT
from unlearn.search.plan import Plan


def test_every_method_of_the_comparison_is_a_config_on_the_same_terms(tmp_path: Path) -> None:
    methods = settings(5, tmp_path / "alternates.jsonl")
    config = search(Comparison(out=str(tmp_path)), methods, tmp_path / "model", tmp_path / "plan.json")
    plan = Plan.of(config)  # reads every config, at every rate
    runs = [plan.unlearning(one, {"trainer.learning_rate": 1e-3}, tmp_path / "run", 1) for one in config.methods]
    assert {(run.trainer.steps, run.trainer.batch, run.scope, run.forget, run.retain) for run in runs} == {
        (20, 24, runs[0].scope, str(tmp_path / "data/forget.jsonl"), str(tmp_path / "data/retain.jsonl"))
    }
    assert len({repr(run.objective) + repr(run.alternates) + run.trainer.pairing for run in runs}) == len(runs)


def test_no_objective_of_the_table_is_left_out() -> None:
    table = (ROOT / "docs/methods.md").read_text().split("## Objectives")[1].split("\n## ")[0]
    perturbed = {"NoForget", "LookUnseen"}  # these stand after a perturbation
    documented = set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) - {"objective", "Learn"} - perturbed
    assert documented
    assert documented <= {fixed["objective"] for fixed in settings(5, Path("x")).values()}


def test_a_row_without_an_alternate_is_noticed(tmp_path: Path) -> None:
    rows, alternates = tmp_path / "rows.jsonl", tmp_path / "alternates.jsonl"
    rows.write_text("".join(f'{{"id": "{name}", "input": "q", "output": "a", "task": "Task2"}}\n' for name in "ab"))
    assert not has_all(alternates, rows)
    alternates.write_text('{"id": "a", "alternates": ["x"]}\n')
    assert not has_all(alternates, rows)
    alternates.write_text('{"id": "a", "alternates": ["x"]}\n{"id": "b", "alternates": ["y"]}\n')
    assert has_all(alternates, rows)
