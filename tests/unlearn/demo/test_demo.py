"""The main job end to end on the built-in model, and the promises made about it. The whole demo is a slow test."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from lm.config import parse_config
from lm.errors import UserError
from tests.unlearn.helpers import ROOT
from tracing import Effects
from unlearn.demo.config import DemoConfig
from unlearn.demo.entries import Entry, entries
from unlearn.demo.results import check_results, table
from unlearn.demo.stage import describe, run_demo
from unlearn.objectives import KLMinimization, LookUnseen
from unlearn.report.config import ReportConfig
from unlearn.report.stage import run_report

MODELS = ["base", "retain_only", "joint_planned", "joint_random", "joint_all", "gradient_difference", "wipe_heal"]
NUMBERS = {
    "terms",
    "task_aggregate",
    "mia_auc",
    "mia_score",
    "utility",
    "final",
    "seconds",
    "relearned",
    "residue_nats",
}


def shipped() -> DemoConfig:
    return parse_config(DemoConfig, ["--config", str(ROOT / "configs" / "demo.yaml"), "--trace.model.device", "cpu"])


def short(out: Path) -> DemoConfig:
    """Every stage, with few facts and two steps, in this process; its two recipes beside `out`."""
    recipes = {}
    for name, words in {
        "unlearn/wipe_heal": {
            "trainer": {"steps": 2, "warmup": 0, "batch": 8},
            "general_most": 50,
            "perturbation": {"init_args": {"parts": [{"share": 0.02}]}},  # so little that it answers and ends
        },
        "attack/quick": {"attack": {"init_args": {"steps": 1, "every": 1}}, "max_new_tokens": 8},
    }.items():
        values = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
        for key, value in words.items():
            values[key] = merged(values[key], value) if isinstance(value, dict) else value
        file = out.parent / f"{name.partition('/')[2]}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump(values))
        recipes[name] = str(file)
    config = shipped()
    return replace(
        config,
        trace=replace(config.trace, facts=replace(config.trace.facts, max_facts=3), kinds=("mlp",)),
        trainer=replace(config.trainer, steps=2),
        wipe_heal=recipes["unlearn/wipe_heal"],
        attack=recipes["attack/quick"],
        workers=1,
        out=str(out),
    )


def merged(values: dict[str, Any], words: dict[str, Any]) -> dict[str, Any]:
    return values | {
        key: merged(values[key], value) if isinstance(value, dict) else value for key, value in words.items()
    }


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "run"
    run_demo(short(out))
    return out


def test_results_hold_every_model_and_number(quick: Path) -> None:
    assert describe(short(quick), quick / "report.html").startswith("wrote")
    found = json.loads((quick / "results.json").read_text())["models"]
    assert sorted(found) == sorted(MODELS)
    assert found["base"]["task_aggregate"] == 0.0
    assert found["retain_only"]["task_aggregate"] >= 0.9
    for key in MODELS:
        assert found[key].keys() >= NUMBERS
        assert 0 <= found[key]["garbled"] <= 1
        if key not in ("joint_planned", "wipe_heal"):
            assert (found[key]["relearned"], found[key]["residue_nats"]) == (None, None)
            continue
        result = json.loads((quick / "attacks" / key / "attack.json").read_text())
        gaps = [
            own - its
            for trial in result["trials"]
            for own, its in zip(
                *(trial["curves"][name]["all"][1:] for name in ("unlearned", "retain_model")), strict=True
            )
        ]
        assert found[key]["relearned"] == pytest.approx(max(gaps), abs=1e-12)
        left = max(trial["audit"]["residue"]["after"]["mean"] for trial in result["trials"])
        assert found[key]["residue_nats"] == left
    assert found["joint_planned"]["mia_auc_gap"] == pytest.approx(
        abs(found["joint_planned"]["mia_auc"] - found["retain_only"]["mia_auc"]), abs=1e-12
    )
    lines = table(found).splitlines()
    assert lines[0].split()[-4:] == ["relearned", "residue", "garbled", "seconds"]
    assert lines[1].split()[6:8] == ["-", "-"]


def test_the_recipes_are_the_demos_own(tmp_path: Path) -> None:
    config = short(tmp_path / "run")
    recipe = Path(str(config.wipe_heal))
    values = yaml.safe_load(recipe.read_text())
    swapped = {"model": {"path": "elsewhere"}, "forget": "builtin:retain", "retain": "builtin:forget"}
    recipe.write_text(yaml.safe_dump(values | swapped))
    plan = tmp_path / "plan.json"
    *_, wiped = entries(config, plan)
    assert isinstance(wiped, Entry)
    assert wiped.unlearning is not None
    assert (wiped.unlearning.model, wiped.unlearning.forget) == (config.trace.model, "builtin:forget")
    assert wiped.unlearning.objective == LookUnseen(**values["objective"]["init_args"])
    assert not wiped.planned
    part = {"share": 0.9, "plan": "of another run.json"}
    recipe.write_text(
        yaml.safe_dump(values | {"perturbation": {"class_path": "Noise", "init_args": {"parts": [part]}}})
    )
    *_, wiped = entries(config, plan)
    assert wiped.unlearning is not None
    assert (wiped.planned, wiped.unlearning.perturbation.parts[0].plan) == (True, str(plan))
    assert [entry.key for entry in entries(replace(config, wipe_heal=None), plan)] == MODELS[:-1]


def test_the_page_is_whole_and_self_contained(quick: Path) -> None:
    page = (quick / "report.html").read_text()
    for label in (
        "What is left where it was stored?",
        "Facts to forget",
        "Joint, planned layers",
        "Joint, random layers",
        "Gradient difference",
        "Wipe, heal, look unseen",
        "Does it come back?",
        "Attacked by relearning, “Joint, planned layers” gives back",
        "Attacked by relearning, “Wipe, heal, look unseen” gives back",
        "At worst relearning brings back, beyond what the retain model says under the same attack,",
        "Residue",
        "Retain model",
    ):
        assert label in page
    assert f"palimpsest demo --config {quick}/demo.yaml --out runs/again" in page
    assert "scripts/" not in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page


def test_any_report_reads_the_demo_as_run_folders(quick: Path, tmp_path: Path) -> None:
    report = run_report(ReportConfig(runs=(str(quick),), out=str(tmp_path / "page.html")))
    parts = {model.label: model.part for model in report.models}
    assert parts["Before unlearning"] == "reference"
    assert parts["Retain model"] == "retain_model"
    assert (parts["joint_planned"], parts["joint_random"], parts["joint_all"]) == ("planned", "control", "all_layers")
    assert parts["wipe_heal"] == "wiped"
    found = json.loads((quick / "results.json").read_text())["models"]
    joint = next(model for model in report.models if model.label == "joint_planned")
    assert joint.task_aggregate == found["joint_planned"]["task_aggregate"]
    assert joint.seconds == pytest.approx(found["joint_planned"]["seconds"], abs=1e-3)
    assert [again.label for again in report.again] == ["Facts to forget", "Facts to keep"]
    assert "commit" in report.facts


def test_the_same_facts_are_traced_again_in_the_unlearned_model(quick: Path) -> None:
    before, after = (Effects.load(quick / name / "effects.npz") for name in ("trace", "retrace"))
    assert after.facts == before.facts
    assert after.sigma == before.sigma
    assert after.provenance["before"] == before.provenance["weights"]
    written = json.loads((quick / "retrace" / "difference.json").read_text())
    assert written["clean"]["change"] == pytest.approx(float((after.clean - before.clean).mean()))
    assert written["clean"]["change"] != 0


def test_a_second_call_runs_nothing_again(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unlearn.unlearning.train", lambda *a, **k: pytest.fail("trained again"))
    monkeypatch.setattr("tracing.engine.wavefront.Wavefront.trace", lambda *a, **k: pytest.fail("traced again"))
    monkeypatch.setattr("unlearn.evaluation.measure.generate", lambda *a, **k: pytest.fail("generated again"))
    before = json.loads((quick / "results.json").read_text())["models"]
    run_demo(short(quick))
    assert json.loads((quick / "results.json").read_text())["models"] == before


def test_a_baseline_of_another_name_is_refused() -> None:
    with pytest.raises(UserError, match="difference is KLMinimization"):
        replace(shipped(), difference=KLMinimization())


def test_another_trace_in_the_same_folder_is_refused(quick: Path) -> None:
    config = short(quick)
    with pytest.raises(UserError, match="window was 1 and is now 3"):
        run_demo(replace(config, trace=replace(config.trace, window=3)))


def test_results_that_lack_a_number_are_refused(quick: Path, tmp_path: Path) -> None:
    found = json.loads((quick / "results.json").read_text())
    del found["models"]["joint_all"]["utility"]
    (tmp_path / "results.json").write_text(json.dumps(found))
    compared = entries(short(quick), quick / "trace" / "plan.json")
    with pytest.raises(UserError, match="joint_all"):
        check_results(tmp_path, compared, attacked=True)


@pytest.mark.slow
def test_the_method_keeps_its_promises_over_three_seeds(tmp_path: Path) -> None:
    """Aggregate at least 0.90 and 0.97 of the retain model's, utility at least 0.95 of the base's, no worse than the baseline."""
    from statistics import fmean

    from unlearn.demo.results import record_of
    from unlearn.demo.steps import find_layers, run_entry

    config = shipped()
    find_layers(config, tmp_path / "trace")
    found: dict[str, list[dict[str, float]]] = {}
    for entry in entries(config, tmp_path / "trace" / "plan.json"):
        if entry.key in ("joint_random", "joint_all", "wipe_heal"):
            continue
        for seed in (1, 2, 3) if entry.path is None else (1,):
            run_entry(config, entry.with_seed(seed), tmp_path / f"seed{seed}")
            found.setdefault(entry.key, []).append(record_of(entry, tmp_path / f"seed{seed}"))
    mean = {
        key: {n: fmean(run[n] for run in runs) for n in ("task_aggregate", "utility")} for key, runs in found.items()
    }
    joint = mean["joint_planned"]
    assert joint["task_aggregate"] >= 0.90
    assert joint["task_aggregate"] >= 0.97 * mean["retain_only"]["task_aggregate"]
    assert joint["task_aggregate"] >= mean["gradient_difference"]["task_aggregate"]
    assert joint["utility"] >= 0.95 * mean["base"]["utility"]
