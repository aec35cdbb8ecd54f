"""A page from run folders: what a folder is, which belong together, what is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from lm.config import parse_config
from lm.errors import UserError
from tests.unlearn.attacks.test_attack_parts import comparison
from tests.unlearn.attacks.test_audit import audit
from tests.unlearn.report_samples import Page, plan, traced
from unlearn.attacks import AttackResult, Relearning
from unlearn.evaluation.lume import TERMS
from unlearn.report.config import ReportConfig
from unlearn.report.records import Report
from unlearn.report.runs.collect import Naming, collect
from unlearn.report.stage import describe, run_report

ATTACK = {
    "unit": "steps",
    "trials": [
        {
            "name": "other_people",
            "verdict": "as much",
            "sentence": "other_people: it relearns as fast.",
            "levels": [0, 10],
            "curves": {name: {"all": [0.0, 0.2]} for name in ("unlearned", "retain_model")},
            "difference": {"mean": [0.0, 0.0], "low": [-0.1, None], "high": [0.1, None]},
        }
    ],
}
DEPTH = {"sentence": "Unlearning goes 0.50 deep.", "lost_by_layer": {"changed": [0.1, 0.2], "retain_model": [0.3, 0.4]}}

TRACE = {"model": {"path": "big"}, "corruption": {"class_path": "GaussianNoise"}}


def folder(path: Path, config: Mapping[str, Any], files: Mapping[str, Any], **manifest: Any) -> str:
    """A run folder as a stage leaves it."""
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(yaml.safe_dump({"out": str(path), **config}))
    (path / "manifest.json").write_text(json.dumps({"started": path.name, **manifest}))
    for name, value in files.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(value if isinstance(value, str) else json.dumps(value))
    return str(path)


def unlearned(path: Path, **scope: object) -> str:
    config = {"model": {"path": "big"}, "scope": scope, "objective": {"class_path": "Joint"}}
    log = '{"step": 1, "forget_ce": 1.0, "retain_ce": 0.1, "alpha": 1.0}\n'
    return folder(
        path,
        config,
        {"model/config.json": {}, "metrics.jsonl": log},
        train_seconds=60.0,
        layers=[1, 2],
        weights="start",
    )


def evaluated(path: Path, model: str, aggregate: float = 0.5, said: str = "1987", **other: Any) -> str:
    scores = {"model": model, "terms": [aggregate] * 11 + [None], "task_aggregate": aggregate, "mia_auc": 0.5}
    scores |= {"mia_score": 1.0, "utility": None, "final": None, "seconds": 5.0} | other.pop("scores", {})
    row = {"id": "f0qa0", "task": "Task2", "input": "When?", "expected_output": "1987", "model_output": said}
    files = {"scores.json": scores, "forget.jsonl": json.dumps(row) + "\n"}
    return folder(path, {"model": {"path": model}, "max_new_tokens": other.pop("most", 64)}, files, **other)


def attacked(path: Path, model: str, retain_model: str = "retained", result: object = ATTACK) -> str:
    config = {"model": {"path": model}, "retain_model": {"path": retain_model}, "attack": {"class_path": "Relearning"}}
    return folder(path, config, {"attack.json": result})


def of(*runs: str, **other: Any) -> tuple[Report, Page]:
    config = ReportConfig(runs=runs, out=str(Path(runs[0]).parent / "page.html"), **other)
    report = run_report(config)
    return report, Page(Path(config.out).read_text(encoding="utf-8"))


def test_one_evaluation_is_a_page(tmp_path: Path) -> None:
    report, page = of(evaluated(tmp_path / "run", "org/olmo"))
    (model,) = report.models
    assert (model.label, model.note, model.part, model.seconds) == ("olmo", "org/olmo", "other", 5.0)
    assert (model.task_aggregate, model.terms[0]) == (0.5, 0.5)
    assert report.answers[0].said == {model.key: "1987"}
    assert "Where is it stored?" in page.text
    assert "No retain model was scored" in page.text
    assert "“olmo” reaches a task aggregate of 0.500." in page.text


def test_runs_of_one_model_are_one_entry(tmp_path: Path) -> None:
    made = unlearned(tmp_path / "mine", plan="plan.json")
    runs = [
        made,
        evaluated(tmp_path / "evaluation", f"{made}/model"),
        attacked(tmp_path / "attack", f"{made}/model"),
        folder(
            tmp_path / "depth",
            {"model": {"path": f"{made}/model"}, "original": {"path": "big"}, "retain_model": {"path": "retained"}},
            {"depth.json": DEPTH},
        ),
        evaluated(tmp_path / "before", "big", 0.0),
        evaluated(tmp_path / "retain", "retained", 0.9),
    ]
    report, page = of(*runs, labels={runs[2]: "My method"})
    assert [(model.label, model.part) for model in report.models] == [
        ("My method", "planned"),
        ("Before unlearning", "reference"),
        ("Retain model", "retain_model"),
    ]
    assert (report.models[0].layers, report.models[0].seconds, len(report.models[0].log)) == ((1, 2), 65.0, 1)
    assert report.attacks[0].trials[0].retain_model == (0.0, 0.2)
    assert report.depths[0].unlearned == (0.1, 0.2)
    for heading in ("Does it come back?", "How deep did unlearning go?", "Training"):
        assert heading in page.text
    assert "55.6% of the 0.900 of the retain model" in page.text
    assert "gives back no more than the retain model (other people)." in page.text
    assert describe(ReportConfig(runs=tuple(runs)), report).endswith("\nwrote runs/report.html")


@pytest.mark.parametrize(
    ("scope", "part"),
    [
        ({"plan": "p"}, "planned"),
        ({"plan": "p", "use": "random"}, "control"),
        ({"plan": "p", "use": "inverse"}, "control"),
        ({"plan": "p", "use": "all"}, "all_layers"),
        ({"layers": [1]}, "other"),
    ],
)
def test_a_part_follows_from_the_layers_that_were_trained(tmp_path: Path, scope: dict[str, Any], part: str) -> None:
    assert collect([unlearned(tmp_path / "run", **scope)]).models[0].part == part


@pytest.mark.parametrize(
    ("perturbation", "part"),
    [
        ({"class_path": "Noise", "init_args": {}}, "wiped"),
        ("Reinitialize", "wiped"),
        ({"class_path": "NoPerturbation", "init_args": {}}, "planned"),
    ],
)
def test_a_part_follows_from_what_was_done_to_the_weights(tmp_path: Path, perturbation: Any, part: str) -> None:
    run = Path(unlearned(tmp_path / "run", plan="p"))
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"perturbation": perturbation}))
    assert collect([run]).models[0].part == part


def test_models_are_told_by_paths_and_else_by_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = unlearned(tmp_path / "mine")
    config = yaml.safe_load((tmp_path / "mine" / "config.yaml").read_text())
    (tmp_path / "mine" / "config.yaml").write_text(yaml.safe_dump(config | {"out": "runs/mine"}))
    spelled = evaluated(tmp_path / "spelled", "./runs/mine/model")  # as the stages were called, from another folder
    assert len(collect([made, spelled]).models) == 1
    monkeypatch.chdir(tmp_path)
    assert len(collect([made, evaluated(tmp_path / "here", "mine/model")]).models) == 1
    start = evaluated(tmp_path / "start", "copy/of/big", weights="start")
    assert [model.part for model in collect([made, start]).models] == ["other", "reference"]
    other = evaluated(tmp_path / "other", "elsewhere", weights="others")
    assert [model.part for model in collect([made, other]).models] == ["other", "other"]
    assert [model.part for model in collect([made, other], retain_model=other).models] == ["other", "retain_model"]


def test_a_folder_of_runs_is_all_of_them_in_the_order_they_began(tmp_path: Path) -> None:
    later, earlier = unlearned(tmp_path / "all" / "b"), unlearned(tmp_path / "all" / "deep" / "a")
    evaluated(Path(later) / "evaluation", f"{later}/model")
    report = collect([tmp_path / "all"])
    assert [model.label for model in report.models] == ["a", "b"]
    assert report.models[1].task_aggregate == 0.5
    assert str(Path(earlier)) == report.models[0].key


def test_a_run_in_a_folder_that_is_left_out_is_named_on_the_page(tmp_path: Path) -> None:
    whole = evaluated(tmp_path / "all" / "scores", "m")
    begun = folder(tmp_path / "all" / "deep" / "begun", {"model": {"path": "m"}}, {})
    inside = folder(Path(whole) / "attack", {"model": {"path": "m"}}, {})
    report, page = of(str(tmp_path / "all"))
    (sentence,) = [each for each in report.caveats if each.startswith("Left out")]
    assert sentence.endswith(f"part on this page: {begun}, {inside}.")
    assert sentence in page.text
    assert sentence in describe(ReportConfig(runs=(str(tmp_path / "all"),)), report).split("\n")
    report, _ = of(evaluated(tmp_path / "alone", "m"))
    assert not [each for each in report.caveats if each.startswith("Left out")]


def test_what_cannot_be_reported_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"the folder .*empty holds no run: give one that .* scores\.json \(evaluate\)"):
        collect([tmp_path / "empty"])
    with pytest.raises(UserError, match=r"nowhere does not exist: check the path"):
        collect([tmp_path / "nowhere"])
    with pytest.raises(UserError, match=r"the run in .*begun has not ended"):
        collect([folder(tmp_path / "begun", {"model": {"path": "m"}}, {})])
    first, second = evaluated(tmp_path / "first", "m"), evaluated(tmp_path / "second", "m")
    with pytest.raises(UserError, match=r"first and .*second both scored the model m: give one"):
        collect([first, second])
    with pytest.raises(UserError, match=r"labels names .*second, which is none of the runs"):
        collect([first], names={second: Naming(label="x")})
    with pytest.raises(UserError, match="runs is empty: name at least one run folder"):
        ReportConfig()
    damaged = folder(tmp_path / "damaged", {"model": {"path": "m"}}, {"scores.json": "{"})
    with pytest.raises(UserError, match=r"scores\.json is damaged"):
        collect([damaged])


def test_nothing_in_a_run_becomes_markup(tmp_path: Path) -> None:
    bad = "<script>alert('x')</script>\"'&"
    made = unlearned(tmp_path / "mine", layers=[1])
    _, page = of(
        evaluated(tmp_path / "run", f"{made}/model", said=bad, scores={"bad<b>": 0.5}),
        attacked(
            tmp_path / "attack", f"{made}/model", result=json.loads(json.dumps(ATTACK).replace("it relearns", bad[:25]))
        ),
        made,
        labels={made: bad},
    )
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script" not in text
    assert not {"script", "b<b"} & {tag for tag, _ in page.tags}
    assert page.text.count("<script>") >= 4


def test_a_grid_of_attacks_with_its_worst_and_its_residue(tmp_path: Path) -> None:
    curves = comparison((0, 0.2), (0, 0.1))
    grid = tuple(
        replace(
            curves, name=name, unlearned=curves.unlearned * rate, variant=f"rate {rate:g}", learning_rate=float(rate)
        )
        for name in ("other_people", "retain")
        for rate in (1, 2)
    )
    result = AttackResult(Relearning(learning_rate=(1.0, 2.0)), grid, (None, None, audit(), None))
    report, page = of(attacked(tmp_path / "attack", "m", result=result.to_json()))
    (shown,) = report.attacks
    assert [trial.name for trial in shown.trials][:2] == ["other_people, rate 1", "other_people, rate 2"]
    assert shown.worst == (1, 1)
    assert "At worst (other people given at rate 2, after 10 steps) the unlearned model scores +0.300" in page.text
    assert "Other people, rate 2" in page.text
    assert shown.audit is not None
    assert shown.audit.groups == (("forgotten", 3), ("retained", 1), ("never seen", 2))
    assert "a residue of +3.00" in page.text
    (model,) = report.models
    assert (model.relearned, model.residue_nats) == (pytest.approx(0.3), pytest.approx(3.0))
    for head, value in (("Relearned", "+0.300"), ("Residue", "3.00")):
        assert head in page.text
        assert value in page.text
    assert "Never seen (2)" in page.text


def test_an_attack_from_when_the_retain_model_was_called_never(tmp_path: Path) -> None:
    old = json.loads(json.dumps(ATTACK).replace("retain_model", "never"))
    run = folder(
        tmp_path / "attack", {"model": {"path": "m"}, "never": {"path": "builtin:retain_only"}}, {"attack.json": old}
    )
    report = collect([run, evaluated(tmp_path / "retain", "builtin:retain_model")])
    assert report.attacks[0].trials[0].retain_model == (0.0, 0.2)
    assert [model.part for model in report.models] == ["other", "retain_model"]


def test_settings_of_an_older_run_are_read_by_the_names_of_today(tmp_path: Path) -> None:
    config = {
        "model": {"path": "big"},
        "scope": {"layers": [1]},
        "objective": {"class_path": "unlearn.objectives.ascent.KLMinimisation"},
    }
    (model,) = collect([folder(tmp_path / "old", config, {"model/config.json": {}}, layers=[1])]).models
    assert model.note == "KLMinimization"


def test_models_that_were_asked_other_things_are_told_apart(tmp_path: Path) -> None:
    one = evaluated(tmp_path / "one", "a", data={"forget": "x"}, scores={"surprise": 0.25})
    other = evaluated(tmp_path / "other", "b", data={"forget": "y"}, most=8)
    report, page = of(one, other)
    assert "Not all models were asked the same rows" in page.text
    assert "The evaluations differ in max_new_tokens" in page.text
    assert report.models[0].others == {"surprise": 0.25}
    assert [cell["title"] for cell in page.all("th") if "does not know" in str(cell.get("title"))]
    assert len(TERMS) == len(report.models[0].terms)


def test_a_trace_and_the_trace_after(tmp_path: Path) -> None:
    """The trace before is found among the runs by its content, wherever the run after it read it."""
    before = folder(tmp_path / "trace", TRACE, {"plan.json": "{}"})
    plan().save(Path(before) / "plan.json")
    traced(0.4, 0.9).save(Path(before) / "effects.npz")
    digest = hashlib.sha256((Path(before) / "effects.npz").read_bytes()).hexdigest()
    config = {"model": {"path": "changed"}, "before": "gone/trace", "confidence": 0.9}
    after = folder(tmp_path / "retrace", config, {"difference.json": {}}, before=digest)
    traced(0.05, 0.2).save(Path(after) / "effects.npz")
    report, page = of(before, after, evaluated(tmp_path / "run", "changed"))
    assert [again.label for again in report.again] == ["Facts to keep"]
    assert report.again[0].found.confidence == 0.9
    assert set(report.tables) == {"mlp"}
    assert "The evidence singles out layers." in page.text
    alone, _ = of(before)
    assert [(model.label, model.part) for model in alone.models] == [("Before unlearning", "reference")]
    with pytest.raises(UserError, match="compares with the trace gone/trace, which is not there as it was"):
        collect([after])
    with pytest.raises(UserError, match="both traces"):
        collect([before, folder(tmp_path / "again", TRACE, {"plan.json": "{}"}), after])


@pytest.mark.parametrize("out", ["", "new", "made.of.dots"])
def test_a_folder_for_the_page_gets_it_as_report_html(tmp_path: Path, out: str) -> None:
    (tmp_path / "made.of.dots").mkdir()
    config = ReportConfig(runs=(evaluated(tmp_path / "run", "m"),), out=str(tmp_path / out))
    report = run_report(config)
    written = tmp_path / out / "report.html"
    assert Page(written.read_text(encoding="utf-8")).all("h1")
    assert describe(config, report).endswith(f"\nwrote {written}")
    assert run_report(config) == report, "a second call writes elsewhere or differs"


def test_the_command_reads_its_settings() -> None:
    config = parse_config(ReportConfig, ["--runs", '["a", "b"]', "--labels", '{"a": "A"}', "--retain_model", "c"])
    assert (config.runs, config.labels, config.retain_model) == (("a", "b"), {"a": "A"}, "c")
