"""One table from run folders: what is one method, what stands beside what, what failed, and the place in a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lm.config import parse_config
from lm.errors import UserError
from tests.unlearn.report.test_report_runs import folder
from unlearn.comparison import CompareConfig, Comparison, run_compare, write_failure
from unlearn.comparison.columns import COLUMNS
from unlearn.comparison.stage import describe
from unlearn.comparison.table import placed
from unlearn.config import UnlearnConfig

COLUMN = {column.name: column for column in COLUMNS}


def made(path: Path, *, seed: int = 1, rate: float = 1e-3, **manifest: Any) -> Path:
    """An unlearning run of the model `big`."""
    config = {
        "model": {"path": "big"},
        "scope": {"layers": [1]},
        "objective": {"class_path": "Joint"},
        "trainer": {"seed": seed, "learning_rate": rate},
    }
    cost = {"train_seconds": 60.0, "tokens": 300_000, "peak_memory_bytes": 2**30, "peak_gpu_bytes": 0} | manifest
    folder(path, config, {"model/config.json": {}}, **cost)
    return path


def scored(path: Path, model: object, **scores: Any) -> str:
    terms = scores.pop("terms", [0.9] * 12)
    whole = {"model": str(model), "terms": terms, "task_aggregate": None, "mia_auc": None, "mia_score": None}
    whole |= {"utility": None, "final": None, "seconds": 5.0} | scores
    data = {"documents": "d", "questions": "q"}
    return folder(path, {"model": {"path": str(model)}, "members": "m"}, {"scores.json": whole}, data=data)


def attacked(path: Path, model: object, gap: float, after: float | None = None, rates: object = (3e-4,)) -> str:
    config = {
        "model": {"path": str(model)},
        "retain_model": {"path": "retained"},
        "attack": {"class_path": "Relearning", "init_args": {"learning_rate": list(rates)}},  # type: ignore[call-overload]
    }
    worst = {"given": "other_people", "learning_rate": 3e-4, "steps": 40, "gap": gap, "low": None, "high": None}
    residue = None if after is None else {"before": {"mean": 0.5}, "after": {"mean": after}}
    return folder(path, config, {"attack.json": {"unit": "steps", "trials": [], "worst": worst, "residue": residue}})


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A method with two seeds, another with one, the base and the retain model, as a benchmark leaves them."""
    out = tmp_path / "runs"
    scored(out / "references" / "base", "big", utility=0.8, task_aggregate=0.0, mia_auc=1.0)
    scored(out / "references" / "retain", "retained", utility=0.8, task_aggregate=1.0, mia_auc=0.4, garbled=0.1)
    for seed, aggregate, gap in ((1, 0.9, 0.02), (2, 0.7, 0.06)):
        run = made(out / "wipe" / f"seed-{seed}", seed=seed, train_seconds=60.0 * seed)
        terms = [0.9] * 6 + [0.95, None, 1.0, None, 0.85 + seed / 100, None]
        scored(run / "scores", run / "model", task_aggregate=aggregate, utility=0.6, mia_auc=0.55, terms=terms)
        attacked(run / "attack", run / "model", gap, after=-0.1 * seed)
    run = made(out / "plain" / "seed-1", rate=1e-4)
    scored(run / "scores", run / "model", task_aggregate=0.5, mia_auc=0.9, mia_auc_gap=0.7, mia_ks_p=0.0002)
    return out


def compare(*runs: object, **other: Any) -> Comparison:
    first = Path(str(runs[0]))
    return run_compare(CompareConfig(runs=tuple(map(str, runs)), out=str(first.parent / "out"), **other))


def cells(result: Comparison, row: str) -> dict[str, str]:
    """A row of the table by its headings."""
    head, _, *lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in result.table.split("\n")]
    return dict(zip(head, next(line for line in lines if line[0] == row), strict=True))


def test_a_row_a_method_with_numbers_by_hand(runs: Path) -> None:
    result = compare(runs)
    assert [(row.name, row.part) for row in result.rows] == [
        ("before unlearning", "base"),
        ("retain model", "retain_model"),
        ("plain", "method"),
        ("wipe", "method"),
    ]
    assert cells(result, "wipe") == {
        "method": "wipe",
        "seeds": "2",
        "task aggregate": "0.800 (0.700 to 0.900)",
        "lowest retain term": "0.865 (0.860 to 0.870)",
        "MIA AUC": "0.550 (0.550 to 0.550)",
        "from the retain model's": "0.150 (0.150 to 0.150)",  # |0.55 - 0.4|
        "KS p": "",
        "utility": "0.600 (0.600 to 0.600)",
        "of the base's": "0.750 (0.750 to 0.750)",  # 0.6 / 0.8
        "worst relearning gap": "0.040 (0.020 to 0.060)",
        "residue before": "0.50 (0.50 to 0.50)",
        "residue after": "-0.15 (-0.20 to -0.10)",
        "garbled": "",
        "seconds": "90 (60 to 120)",
        "memory, GiB": "1.00 (1.00 to 1.00)",
        "tokens": "300,000 (300,000 to 300,000)",
        "where": "other people, rate 0.0003, 40 steps",
    }
    plain = cells(result, "plain")
    assert (plain["from the retain model's"], plain["KS p"], plain["utility"]) == ("0.700", "<0.001", "")
    assert (plain["worst relearning gap"], plain["where"], plain["seeds"]) == ("", "", "1")
    base = cells(result, "before unlearning")
    assert (base["of the base's"], base["from the retain model's"], base["seeds"], base["seconds"]) == (
        "1.000",
        "0.600",
        "",
        "",
    )
    assert cells(result, "retain model")["garbled"] == "0.100"
    assert "Not measured in any of these runs: TPR at 5 % FPR, perplexity, final." in result.markdown


def test_what_is_written_can_be_read_back(runs: Path) -> None:
    result = compare(runs)
    out = runs.parent / "out"
    written = json.loads((out / "comparison.json").read_text())
    wipe = written["rows"][3]
    assert (wipe["values"]["task_aggregate"], wipe["seeds"]) == ([0.9, 0.7], ["1", "2"])
    assert written["rows"][2]["values"]["worst_gap"] == [None]
    assert wipe["commands"][0].startswith("palimpsest unlearn --config")
    assert (out / "comparison.md").read_text() == result.markdown
    assert result.markdown.startswith("    palimpsest compare ")
    (runs / "benchmark.json").write_text('{"command": "python -m benchmarks.compare_methods --list x"}')
    assert compare(runs).markdown.startswith(
        "    python -m benchmarks.compare_methods --list x\n    palimpsest compare "
    )
    assert "wrote" in describe(CompareConfig(runs=(str(runs),)), result)


def test_a_seed_that_failed_is_in_its_row_and_a_method_that_only_failed_has_one(runs: Path) -> None:
    seed = {"model.path": "big", "scope.layers": "[1]", "trainer.learning_rate": "0.001", "trainer.seed": "3"}
    words = [word for name, value in seed.items() for word in (f"--{name}", value)]
    config = parse_config(UnlearnConfig, [*words, "--out", "elsewhere"])
    write_failure(runs / "wipe" / "seed-3", "the loss is NaN | at step 3:\nlower the rate", config)
    other = parse_config(UnlearnConfig, [*words, "--objective", "NPO"])
    write_failure(runs / "npo" / "seed-3", "out of memory", other)
    folder(
        runs / "begun" / "seed-1",
        {"model": {"path": "big"}, "objective": {"class_path": "RMU", "init_args": {"layer": 1}}},
        {},
    )
    result = compare(runs)
    wipe = cells(result, "wipe")
    assert (wipe["seeds"], wipe["task aggregate"]) == ("2 of 3", "0.800 (0.700 to 0.900)")
    assert wipe["failed"] == r"seed 3: the loss is NaN \| at step 3: lower the rate"
    npo = cells(result, "npo")
    assert (npo["seeds"], npo["task aggregate"], npo["failed"]) == ("0 of 1", "", "seed 3: out of memory")
    assert "has not ended: palimpsest unlearn --config" in cells(result, "begun")["failed"]
    alone = compare(runs / "npo", runs / "plain")
    assert cells(alone, "npo")["failed"] == "seed 3: out of memory"


def test_an_attack_that_broke_off_is_said_beside_what_was_scored(runs: Path) -> None:
    run = runs / "plain" / "seed-1"
    folder(run / "attack", {"model": {"path": str(run / "model")}, "attack": {"class_path": "Relearning"}}, {})
    plain = cells(compare(runs), "plain")
    assert plain["task aggregate"] == "0.500"
    assert "its attack in" in plain["failed"]


def test_attacks_that_differ_are_said_to(runs: Path) -> None:
    run = runs / "plain" / "seed-1"
    attacked(run / "attack", run / "model", 0.3, rates=(3e-4, 6e-4))
    assert "The attacks differ in attack: their gaps and residues do not compare one to one." in compare(runs).caveats


def test_a_base_and_a_retain_model_that_runs_learned(tmp_path: Path) -> None:
    """As benchmarks/real_model.py makes them: by unlearning runs with the objective Learn."""
    learn = {"objective": {"class_path": "Learn"}, "model": {"path": "public"}, "scope": {"layers": "model"}}
    for name in ("base", "retain_only"):
        folder(tmp_path / "all" / name, learn | {"forget": name}, {"model/config.json": {}})
        scored(tmp_path / "all" / f"{name}-scores", tmp_path / "all" / name / "model", utility=0.3, mia_auc=0.5)
    config = {"model": {"path": str(tmp_path / "all" / "base" / "model")}, "objective": {"class_path": "Joint"}}
    folder(tmp_path / "all" / "joint", config, {"model/config.json": {}})
    scored(tmp_path / "all" / "joint-scores", tmp_path / "all" / "joint" / "model", utility=0.15, mia_auc=0.9)
    result = compare(tmp_path / "all", retain_model=str(tmp_path / "all" / "retain_only-scores"))
    assert [row.part for row in result.rows] == ["base", "retain_model", "method"]
    joint = cells(result, "joint")
    assert (joint["of the base's"], joint["from the retain model's"]) == ("0.500", "0.400")


def test_what_contradicts_itself_is_refused(runs: Path, tmp_path: Path) -> None:
    made(tmp_path / "again", seed=1)
    with pytest.raises(UserError, match=r"are the same method with the same seed: give one of them"):
        compare(runs, tmp_path / "again")
    with pytest.raises(UserError, match=r"labels names .*none of the runs"):
        compare(runs, labels={str(tmp_path / "nowhere"): "x"})
    with pytest.raises(UserError, match="nowhere does not exist"):
        compare(tmp_path / "nowhere")
    with pytest.raises(UserError, match="runs is empty"):
        CompareConfig()
    with pytest.raises(UserError, match=r"there is no column 'utilty' \(did you mean 'utility'\?\)"):
        CompareConfig(runs=("x",), columns=("utilty",))
    with pytest.raises(UserError, match="also names utility, which is a column already"):
        CompareConfig(runs=("x",), also=("utility",))
    (runs / "wipe" / "seed-1" / "failed.json").write_text("{}")
    with pytest.raises(UserError, match=r"failed\.json is damaged"):
        compare(runs)


def test_labels_columns_and_further_scores(runs: Path) -> None:
    scored(runs / "other", "elsewhere", forget_quality=0.25, utility=0.5)
    label = {str(runs / "wipe" / "seed-2"): "Wipe and heal"}
    result = compare(runs, labels=label, columns=("final", "forget_quality"), also=("forget_quality",))
    assert list(cells(result, "Wipe and heal")) == ["method", "seeds", "final", "forget quality"]
    assert cells(result, "elsewhere")["forget quality"] == "0.250"


def test_rows_of_one_name_are_told_apart(runs: Path, tmp_path: Path) -> None:
    run = made(tmp_path / "more" / "wipe" / "seed-1", rate=0.5)
    names = [row.name for row in compare(runs, tmp_path / "more").rows]
    assert names[2:] == ["plain", f"wipe ({runs}/wipe/seed-1)", f"wipe ({run})"]


def test_the_table_goes_into_its_place_of_a_page_and_nothing_else_changes(runs: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    before = "# Which\n\n<!-- table: a -->\nold\n<!-- end of table: a -->\nprose |\n<!-- table: b -->\n<!-- end of table: b -->"
    page.write_text(before)
    result = compare(runs, page=str(page), place="a")
    text = page.read_text()
    assert text.startswith(f"# Which\n\n<!-- table: a -->\n\n    palimpsest compare {runs}")
    assert text.endswith("\n\n<!-- end of table: a -->\nprose |\n<!-- table: b -->\n<!-- end of table: b -->")
    assert "old" not in text
    assert result.table in text
    compare(runs, page=str(page), place="a")
    assert page.read_text() == text
    with pytest.raises(UserError, match=r"page\.md has 0 lines <!-- table: c -->"):
        compare(runs, page=str(page), place="c")
    with pytest.raises(UserError, match="is not there: make it, with the marker lines"):
        compare(runs, page=str(tmp_path / "none.md"))
    with pytest.raises(UserError, match="put them in order"):
        placed("<!-- end of table: x -->\n<!-- table: x -->", "x", "t", name="p")


def test_numbers_as_they_are_written() -> None:
    text = COLUMN["task_aggregate"].text
    assert (text([]), text([None]), text([0.5]), text([-0.0001])) == ("", "", "0.500", "0.000")
    assert text([1.0, None, 0.5]) == "0.750 (0.500 to 1.000), 2 seeds"
    assert COLUMN["mia_ks_p"].text([0.0001, 0.5]) == "0.250 (<0.001 to 0.500)"
    assert (
        CompareConfig(runs=("a b",), also=("x",), place="c").command
        == "palimpsest compare 'a b' --also '[\"x\"]' --place c"
    )
