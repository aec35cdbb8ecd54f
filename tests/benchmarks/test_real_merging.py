"""benchmarks/real_merging.py: every stage is a command that its script accepts, on the terms of the other methods."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.real_merging import Merging, stages, table
from benchmarks.real_methods import Comparison, search, settings
from lm.config import dump_yaml, parse_config
from lm.errors import UserError
from lm.run_folder import write_atomic
from unlearn.config import UnlearnConfig
from unlearn.evaluation.config import EvaluateConfig
from unlearn.merging.config import MergeConfig
from unlearn.merging.merge import TaskArithmetic, Ties
from unlearn.objectives import Learn

PAIR = ("search/UNDIAL/trial-00", "search/Joint/trial-01")


@pytest.fixture
def methods(tmp_path: Path) -> Path:
    """What benchmarks/real_methods.py leaves there, with models in two runs."""
    out = tmp_path / "Methods"
    asked = Comparison(out=str(out), steps=9, batch=16, autocast="no", score_dtype="float32")
    config = search(asked, settings(5, out / "alternates.jsonl"), Path("runs/Base"), Path("runs/plan.json"))
    write_atomic(out / "search" / "config.yaml", dump_yaml(config))
    for name in PAIR:
        (out / name / "model").mkdir(parents=True)
    return out


def test_the_words_of_every_stage_are_those_of_a_config(methods: Path) -> None:
    asked = Merging(
        methods=str(methods), rates=(1e-3,), weights=(-1.0,), pairs=(PAIR,), densities=(0.2, 0.8), out="runs/x"
    )
    found = {stage.name: stage for stage in stages(asked)}
    assert list(found) == [
        "learn-0.001",
        *("negation-0.001-by-1", "negation-0.001-by-1-scores"),
        *("ties-1-of0.2", "ties-1-of0.2-scores", "ties-1-of0.8", "ties-1-of0.8-scores"),
    ]
    learned = parse_config(UnlearnConfig, found["learn-0.001"].words)
    assert learned.objective == Learn()
    assert not learned.loss.uses_retain
    assert (learned.model.path, learned.scope.plan, learned.trainer.autocast) == ("runs/Base", "runs/plan.json", "no")
    assert (learned.trainer.steps, learned.trainer.batch, learned.trainer.learning_rate) == (9, 16, 1e-3)
    negated = parse_config(MergeConfig, found["negation-0.001-by-1"].words)
    assert negated.method == TaskArithmetic(weights=(-1.0,))
    assert (negated.base, negated.models) == ("runs/Base", ("runs/x/learn-0.001/model",))
    joined = parse_config(MergeConfig, found["ties-1-of0.8"].words)
    assert joined.method == Ties(density=0.8)
    assert joined.models == tuple(str(methods / name / "model") for name in PAIR)
    scored = parse_config(EvaluateConfig, found["ties-1-of0.8-scores"].words)
    theirs = parse_config(EvaluateConfig, ["--config", str(methods / "evaluate.yaml")])
    assert scored == replace(theirs, model=replace(theirs.model, path="runs/x/ties-1-of0.8/model"))


def test_what_is_not_there_is_named(methods: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="search/No/model is missing"):
        stages(Merging(methods=str(methods), pairs=(("search/No", "search/No"),)))
    with pytest.raises(UserError, match=r"search/config.yaml is missing: run benchmarks/real_methods\.py first"):
        stages(Merging(methods=str(tmp_path / "none")))


def test_the_table_counts_as_the_search_does(tmp_path: Path) -> None:
    (tmp_path / "a-scores").mkdir()
    terms = [None, None, 0.25, 0.75, None, None, None, None, 1.0, 0.5, None, None]
    (tmp_path / "a-scores" / "scores.json").write_text(json.dumps({"terms": terms, "task_aggregate": 0.0}))
    assert table(tmp_path, ["a-scores"]).splitlines()[-1] == "| a | 0.500 | 0.750 |"
