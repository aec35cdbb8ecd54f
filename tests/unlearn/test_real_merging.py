"""benchmarks/real_merging.py: every stage is a command that its script accepts, on the terms of the other methods."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.real_merging import Merging, stages, table
from lm.config import parse_config
from lm.errors import UserError
from unlearn.config import UnlearnConfig
from unlearn.evaluation.config import EvaluateConfig
from unlearn.merging import MergeConfig, TaskArithmetic, Ties
from unlearn.objectives import Learn


def test_the_words_of_every_stage_are_those_of_a_config(tmp_path: Path) -> None:
    pair = ("search/UNDIAL/trial-00", "search/Joint/trial-01")
    for name in pair:
        (tmp_path / name / "model").mkdir(parents=True)
    asked = Merging(
        methods=str(tmp_path), steps=9, batch=16, rates=(1e-3,), weights=(-1.0,), pairs=(pair,), out="runs/x"
    )
    found = {stage.name: stage for stage in stages(asked)}
    assert list(found) == [
        "learn-0.001",
        *("negation-0.001-by-1", "negation-0.001-by-1-scores"),
        *("ties-1-of0.2", "ties-1-of0.2-scores", "ties-1-of0.8", "ties-1-of0.8-scores"),
    ]
    learnt = parse_config(UnlearnConfig, found["learn-0.001"].words)
    assert learnt.objective == Learn()
    assert not learnt.loss.uses_retain
    assert (learnt.trainer.steps, learnt.trainer.batch, learnt.trainer.learning_rate) == (9, 16, 1e-3)
    negated = parse_config(MergeConfig, found["negation-0.001-by-1"].words)
    assert negated.method == TaskArithmetic(weights=(-1.0,))
    assert negated.models == ("runs/x/learn-0.001/model",)
    joined = parse_config(MergeConfig, found["ties-1-of0.8"].words)
    assert joined.method == Ties(density=0.8)
    assert joined.models == tuple(str(tmp_path / name / "model") for name in pair)
    scored = parse_config(EvaluateConfig, found["ties-1-of0.8-scores"].words)
    assert scored.model.path == "runs/x/ties-1-of0.8/model"
    assert (scored.forget, scored.utility) == (learnt.forget, None)


def test_a_run_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="search/No/model is missing"):
        stages(Merging(methods=str(tmp_path), pairs=(("search/No", "search/No"),)))


def test_the_table_counts_as_the_search_does(tmp_path: Path) -> None:
    (tmp_path / "a-scores").mkdir()
    terms = [None, None, 0.25, 0.75, None, None, None, None, 1.0, 0.5, None, None]
    (tmp_path / "a-scores" / "scores.json").write_text(json.dumps({"terms": terms, "task_aggregate": 0.0}))
    assert table(tmp_path, ["a-scores"]).splitlines()[-1] == "| a | 0.500 | 0.750 |"
