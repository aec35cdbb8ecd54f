"""benchmarks/compare_methods.py: lists are read whole, worlds fill their roles, runs end in a table and go on where they were."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from benchmarks.compare_methods import Benchmark, main
from benchmarks.comparison.methods import Configs, MethodList, world_sources
from benchmarks.comparison.running import finished
from lm.config import parse_config
from lm.errors import UserError
from tests.conftest import tiny_rows
from tests.unlearn.helpers import ROOT
from unlearn.comparison.columns import COLUMNS
from unlearn.comparison.table import placed
from unlearn.objectives import NoForget
from unlearn.perturbation import Noise, TowardsCheckpoint

LISTS = sorted((ROOT / "benchmarks" / "lists").glob("*.yaml"))


@pytest.fixture
def world(tiny: Path, tmp_path: Path) -> Path:
    """The tiny model as a world: nobody has memorized anything in it."""
    folder = tmp_path / "world"
    (folder / "data").mkdir(parents=True)
    for name in ("memorized", "retain_model"):
        shutil.copytree(tiny / "model", folder / name)
    weights = folder / "retain_model" / "model.safetensors"
    save_file({key: value * 1.01 for key, value in load_file(weights).items()}, weights, metadata={"format": "pt"})
    for side in ("forget", "retain"):
        shutil.copy(tiny / f"{side}.jsonl", folder / "data" / f"{side}.jsonl")
    unseen = [{**row, "id": f"u{row['id']}"} for row in tiny_rows(["Mo Nilsen", "Ola Prim"], 50)]
    (folder / "data" / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in unseen))
    return folder


def listed(path: Path, **more: Any) -> str:
    """A list of two methods that run, for a moment, and one that cannot."""
    few = {
        "trainer.steps": 2,
        "trainer.batch": 4,
        "trainer.micro_batch": 4,
        "trainer.estimate": False,
        "scope.layers": [1],
    }
    values = {
        "unlearn": {"settings": few},
        "evaluate": {"settings": {"max_new_tokens": 4, "membership_task": "Task2"}},
        "attack": {
            "config": "quick",
            "settings": {"max_new_tokens": 4, "attack.steps": 2, "attack.every": 2, "attack.batch": 4},
        },
        "methods": [
            {"name": "joint", "settings": {"objective": "Joint"}},
            {
                "name": "heal",
                "settings": {"objective": "NoForget", "perturbation": "Noise", "scope.layers": "model"},
            },
            {"name": "too_deep", "settings": {"scope.layers": [7]}},
        ],
    }
    path.write_text(yaml.safe_dump(values | more))
    return str(path)


def configs(name: str, world: str, out: Path, **more: Any) -> Configs:
    return Configs.of(parse_config(MethodList, ["--config", name]), world, out, **more)


@pytest.mark.parametrize("path", LISTS, ids=lambda path: path.stem)
def test_every_method_of_every_list_is_a_config(path: Path, tmp_path: Path) -> None:
    roles = (
        "memorized retain_model forget retain retain_healed forget_reworded retain_reworded held_out calibration plan"
    )
    roles += " public mmlu general held_out_text"
    made = configs(str(path), "none", tmp_path, sources={name: f"x/{name}" for name in roles.split()})
    for method in made.methods.methods:
        every = made.made(method, 3)
        assert every.unlearning.trainer.seed == 3
        assert every.unlearning.model.path == "x/memorized"
        assert every.evaluation.model.path == f"{tmp_path}/{method.name}/seed-3/model"
        assert every.attack is not None
        assert every.attack.unseen == "x/held_out"


def test_the_page_explains_every_column_and_has_every_place() -> None:
    page = (ROOT / "docs" / "which_method.md").read_text()
    for column in COLUMNS:
        assert f"| {column.head} | {column.meaning} |" in page
    for place in ("builtin", "fresh_world", "smollm2_lume"):
        assert placed(page, place, "the table", name="page").count("\nthe table\n") == 1


@pytest.mark.parametrize("name", ["location", "location_smollm2"])
def test_the_places_of_a_location_list_differ_in_nothing_but_the_place(name: str) -> None:
    rows = ("forget", "retain", "retain_healed", "held_out", "general", "mmlu")
    made = configs(
        str(ROOT / "benchmarks" / "lists" / f"{name}.yaml"),
        "none",
        Path("x"),
        sources=dict.fromkeys(("memorized", "retain_model", "public", *rows), "x"),
    )
    runs = [made.made(method, 1).unlearning for method in made.methods.methods]
    assert {(repr(run.trainer), run.objective, run.retain, run.scope) for run in runs} == {
        (repr(runs[0].trainer), NoForget(), "x", runs[0].scope)
    }
    assert sum(isinstance(run.perturbation, Noise | TowardsCheckpoint) for run in runs) == len(runs) - 1
    assert len({repr(run.perturbation) for run in runs}) == len(runs)


def test_worlds_fill_their_roles(world: Path, tmp_path: Path) -> None:
    assert world_sources("builtin")["calibration"] == "builtin:calibration"
    roles = world_sources(str(world))
    assert roles["held_out"] == str(world / "data" / "held_out.jsonl")
    assert roles["memorized"] == str(world / "memorized")
    (tmp_path / "named").mkdir()
    (tmp_path / "named" / "sources.json").write_text('{"memorized": "builtin"}')
    assert world_sources(str(tmp_path / "named")) == {"memorized": "builtin"}
    with pytest.raises(UserError, match="holds no models and no data"):
        world_sources(str(tmp_path / "nowhere"))


def test_every_stage_is_told_of_the_world(world: Path, tmp_path: Path) -> None:
    made = configs(
        listed(tmp_path / "list.yaml"), str(world), tmp_path / "out", attack="grid", settings={"trainer.steps": 1}
    )
    joint = made.made(made.methods.methods[0], 5)
    assert (joint.unlearning.trainer.steps, joint.unlearning.forget) == (1, str(world / "data" / "forget.jsonl"))
    assert joint.evaluation.retain_scores == str(tmp_path / "out" / "retain_model" / "scores")
    assert joint.evaluation.untouched is not None
    assert (joint.evaluation.untouched.path, joint.evaluation.utility) == (str(world / "memorized"), None)
    assert joint.attack is not None
    assert joint.attack.retain_answers == str(tmp_path / "out" / "base" / "attack")
    assert joint.attack.attack.learning_rate == (0.0003, 0.0006)  # type: ignore[attr-defined]
    assert not made.needs_plan
    with pytest.raises(UserError, match=r"the method joint: .*trainer.stepz"):
        configs(listed(tmp_path / "list.yaml"), str(world), tmp_path, settings={"trainer.stepz": 1}).made(
            made.methods.methods[0], 1
        )
    broken = configs(listed(tmp_path / "b.yaml", unlearn={"settings": {"scope.plan": "{plam}"}}), str(world), tmp_path)
    with pytest.raises(UserError, match=r"names the role plam.*\(did you mean 'plan'\?\)"):
        broken.made(broken.methods.methods[0], 1)


def test_a_list_that_cannot_be_is_refused(tmp_path: Path) -> None:
    for methods, said in (
        ([], "has no methods"),
        ([{"name": "a"}, {"name": "a"}], "2 methods are called a"),
        ([{"name": "base"}], "a method is called 'base'"),
        ([{"name": "a/b"}], "a method is called 'a/b'"),
    ):
        with pytest.raises(UserError, match=said):
            parse_config(MethodList, ["--config", listed(tmp_path / "list.yaml", methods=methods)])


def test_from_a_list_to_a_table_and_on_from_there(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two methods and one that fails, on two processes; what is there is not made again."""
    out = tmp_path / "out"
    asked = {
        "list": listed(tmp_path / "list.yaml"),
        "world": str(world),
        "workers": 2,
        "out": str(out),
        "keep_models": False,
    }
    main(Benchmark(seeds=(1,), **asked))  # type: ignore[arg-type]
    table = json.loads((out / "table" / "comparison.json").read_text())
    rows = {row["name"]: row for row in table["rows"]}
    assert [*rows][:2] == ["before unlearning", "retain model"]
    assert (rows["joint"]["seeds"], rows["heal"]["seeds"]) == (["1"], ["1"])
    for name in ("joint", "heal"):
        assert None not in rows[name]["values"]["worst_gap"] + rows[name]["values"]["mia_auc_gap"]
        assert rows[name]["values"]["tokens"][0] > 0
    assert rows["before unlearning"]["values"]["residue_after"] != [None]
    assert [failed["seeds"] for failed in rows["too_deep"]["failed"]] == ["1"]
    assert "layer" in rows["too_deep"]["failed"][0]["why"]
    assert not list(out.glob("joint/*/model/*.safetensors"))
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/seed-*/**/*.json")}
    capsys.readouterr()
    main(Benchmark(seeds=(1,), only=("joint", "too_deep"), **asked))  # type: ignore[arg-type]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "too_deep, seed 1 failed before and is left so" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"seed-1 was made with other settings \(trainer was"):
        main(Benchmark(seeds=(1,), settings={"trainer.steps": 1}, only=("joint",), **asked))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="the list has no method jiont"):
        main(Benchmark(only=("jiont",), **asked))  # type: ignore[arg-type]


def test_what_has_not_ended_is_not_finished(world: Path, tmp_path: Path) -> None:
    made = configs(listed(tmp_path / "list.yaml"), str(world), tmp_path / "out")
    assert not finished(made.made(made.methods.methods[0], 1).unlearning)
    for bad in ({"workers": 0}, {"seeds": ()}, {"seeds": (1, 1)}):
        with pytest.raises(UserError):
            Benchmark(list="x", **bad)  # type: ignore[arg-type]
