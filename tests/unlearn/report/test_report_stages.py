"""Which stage a folder is of, with folders as the stages write them: those that a report shows, those that it leaves out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from families import tiny

from lm.errors import UserError
from lm.run_folder import RunFolder
from palimpsest.stages import STAGES
from sae.activations.cache.manifest import FORMAT
from tests.unlearn.report_samples import plan
from unlearn.alternates.config import AlternatesConfig
from unlearn.merging.config import MergeConfig
from unlearn.merging.stage import run_merge
from unlearn.report.config import ReportConfig
from unlearn.report.runs.folders import find_runs, left_out
from unlearn.report.runs.stages import RESULTS, not_shown, shown_stage
from unlearn.report.stage import describe, run_report
from unlearn.search.config import Method, Range

SHOWN = ("trace", "unlearn", "evaluate", "attack", "retrace", "depth")
HIDDEN = ("localize", "merge", "search", "alternates", "train-sae")
NO_RUN_FOLDER = ("compare", "demo", "report", "harvest", "semeval")
GIVEN: dict[str, dict[str, Any]] = {
    "merge": {"base": "builtin", "models": ("builtin",)},
    "search": {"methods": (Method(name="npo", space={"trainer.learning_rate": Range(log_uniform=(1e-5, 1e-3))}),)},
    "report": {"runs": ("runs",)},
    "semeval": {"input_model_path": "m", "output_path": "o", "forget_dir": "f", "retain_dir": "r"},
}


def begun(stage: str, path: Path) -> Path:
    """A run folder as the stage begins it: its own config, saved as every stage saves it."""
    cls = next(known.config_class() for known in STAGES if known.name == stage)
    return RunFolder.create(path, cls(**GIVEN.get(stage, {}))).path


def ended(path: Path, file: str) -> Path:
    (path / file).parent.mkdir(exist_ok=True)
    if file == "plan.json":
        plan().save(path / file)
    else:
        (path / file).write_text("{}")
    return path


def merged(path: Path) -> Path:
    """What `merge` really writes."""
    model = tiny("olmo")
    model.model.save_pretrained(path / "base")
    model.tokenizer.save_pretrained(path / "base")
    run_merge(MergeConfig(base=str(path / "base"), models=(str(path / "base"),), out=str(path / "merge")))
    return path / "merge"


def evaluation(path: Path, model: Path) -> Path:
    run = begun("evaluate", path)
    text = (run / "config.yaml").read_text(encoding="utf-8")
    (run / "config.yaml").write_text(text.replace("path: builtin\n", f"path: {model}\n", 1), encoding="utf-8")
    scores = {
        "terms": [0.5] * 12,
        "task_aggregate": 0.5,
        "mia_auc": 0.5,
        "mia_score": 1.0,
        "utility": None,
        "final": None,
    }
    (run / "scores.json").write_text(json.dumps({**scores, "seconds": 1.0}))
    return run


def test_every_stage_is_one_of_these() -> None:
    assert sorted((*SHOWN, *HIDDEN, *NO_RUN_FOLDER)) == sorted(stage.name for stage in STAGES)


@pytest.mark.parametrize("stage", SHOWN)
def test_a_stage_that_is_shown_is_told_by_what_it_writes(stage: str, tmp_path: Path) -> None:
    run = begun(stage, tmp_path / "run")
    assert (shown_stage(run), not_shown(run)) == (None, None)
    assert left_out([tmp_path]) == [run]
    ended(run, next(file for kind, file in RESULTS.items() if kind == stage))
    assert (shown_stage(run), not_shown(run)) == (stage, None)
    assert left_out([tmp_path]) == []


@pytest.mark.parametrize("stage", HIDDEN)
@pytest.mark.parametrize("file", [*RESULTS.values(), None])
def test_a_stage_that_is_not_shown_is_left_out_and_named(stage: str, file: str | None, tmp_path: Path) -> None:
    """Whatever it writes: a plan by localize, a model by merge."""
    run = begun(stage, tmp_path / "all" / "run")
    if file is not None:
        ended(run, file)
    assert (shown_stage(run), not_shown(run)) == (None, stage)
    with pytest.raises(UserError, match=rf"the run in .*run is of {stage}, a stage that no report shows: leave it out"):
        find_runs([run])
    with pytest.raises(UserError, match=r"the folder .*all holds no run that .* only .*run: give one"):
        find_runs([tmp_path / "all"])
    other = evaluation(tmp_path / "all" / "scores", tmp_path)
    assert [found.folder for found in find_runs([tmp_path / "all"])] == [other]
    assert left_out([tmp_path / "all"]) == [run]


def test_a_trace_beside_a_localization_is_the_only_trace(tmp_path: Path) -> None:
    trace = ended(begun("trace", tmp_path / "all" / "trace"), "plan.json")
    localize = ended(begun("localize", tmp_path / "all" / "localize"), "plan.json")
    config = ReportConfig(runs=(str(tmp_path / "all"),), out=str(tmp_path / "page.html"))
    report = run_report(config)
    assert report.plan == plan()
    assert report.commands[0].startswith(f"palimpsest trace --config {trace}/config.yaml")
    assert [command.split()[1] for command in report.commands] == ["trace", "report"]
    assert report.left_out == (str(localize),)
    assert f"no part on this page: {localize}." in describe(config, report)


@pytest.mark.parametrize("inside", [False, True])
def test_a_merged_model_has_its_row_through_its_evaluation(inside: bool, tmp_path: Path) -> None:
    run = merged(tmp_path / "all")
    scores = evaluation(run / "scores" if inside else tmp_path / "all" / "scores", run / "model")
    for folders in ([str(tmp_path / "all")], [str(run)] if inside else [str(scores)]):
        report = run_report(ReportConfig(runs=tuple(folders), out=str(tmp_path / "page.html")))
        assert [(model.label, model.task_aggregate) for model in report.models] == [("merge", 0.5)]
        assert report.left_out == (() if folders == [str(scores)] else (str(run),))
    if not inside:
        with pytest.raises(
            UserError, match=r"is of merge, .* leave it out, and give an evaluation of its model instead"
        ):
            find_runs([run])


def test_a_cache_and_a_submission_are_named_though_they_are_no_run_folders(tmp_path: Path) -> None:
    cache = tmp_path / "all" / "cache"
    cache.mkdir(parents=True)
    (cache / "manifest.json").write_text(json.dumps({"format": FORMAT, "finished": True}))
    submission = begun("unlearn", tmp_path / "all" / "submission" / "run").parent
    ended(submission, "config.json")
    assert (not_shown(cache), not_shown(submission)) == ("harvest", "semeval")
    evaluation(tmp_path / "all" / "scores", submission)
    assert left_out([tmp_path / "all"]) == [cache, submission, submission / "run"]
    for folder, stage in ((cache, "harvest"), (submission, "semeval")):
        with pytest.raises(UserError, match=f"is of {stage}, a stage that no report shows"):
            find_runs([folder])


def test_a_folder_of_another_kind_is_no_unlearned_model(tmp_path: Path) -> None:
    path = RunFolder.create(tmp_path / "run", AlternatesConfig()).path
    (path / "config.yaml").write_text("learning_rate: 0.1\n")
    ended(path, "model/config.json")
    with pytest.raises(UserError, match="has not ended, or is of no stage that a report shows"):
        find_runs([path])
    (path / "config.yaml").write_text("model: [")
    with pytest.raises(UserError, match=r"config\.yaml is damaged, it is no YAML: leave that run out"):
        find_runs([path])
