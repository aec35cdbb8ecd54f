"""What a search is made of: ranges, proposals, the budget, the front, intervals, the journal; nothing is trained here."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lm.config import dump_yaml, parse_config
from lm.errors import UserError
from tests.unlearn.helpers import ROOT
from unlearn.search import Method, Range, SearchConfig, run_search, stage
from unlearn.search.choice import Estimate, best, floor, front, leading, value
from unlearn.search.ledger import JOURNAL, Ledger
from unlearn.search.picture import pareto
from unlearn.search.plan import Plan, words
from unlearn.search.result import MethodResult, SearchResult
from unlearn.search.scored import Finished, Measures, Scored, _origin
from unlearn.search.table import page

RATE = Range(log_uniform=(1e-4, 1e-2))
SPACE = {"trainer.learning_rate": RATE, "objective.beta": Range(uniform=(0.1, 0.9)), "x": Range(choice=(1, None, "a"))}


def scored(quality: float, utility: float, folder: str = "m/trial-00") -> Scored:
    return Scored(
        folder=folder,
        quality=quality,
        utility=utility,
        task_aggregate=quality / 2,
        seconds=2.0,
        tokens=1000,
        peak_bytes=5_000_000,
        made_from="m",
        scored_on="s",
        files={"manifest.json": "0"},
    )


def method(**changes: Any) -> Method:
    return replace(Method(name="m", settings={"objective": "NPO"}, space={"trainer.learning_rate": RATE}), **changes)


def config(**changes: Any) -> SearchConfig:
    shipped = parse_config(SearchConfig, ["--config", str(ROOT / "configs/search/builtin.yaml")])
    files = {name: str(ROOT / "configs" / name / "builtin.yaml") for name in ("unlearn", "evaluate")}
    return replace(shipped, **{**files, **changes})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "a range has nothing"),
        ({"uniform": (0, 1), "choice": (1,)}, "uniform and choice"),
        ({"uniform": (1, 1)}, "the lower first"),
        ({"uniform": (0, math.inf)}, "the lower first"),
        ({"log_uniform": (0, 1)}, "begins above 0"),
        ({"choice": ()}, "at least one value"),
        ({"choice": (1, 1)}, "none twice"),
    ],
)
def test_a_range_is_one_of_three_and_makes_sense(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Range(**given)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": "a/b"}, "names a folder"),
        ({"name": "base"}, "not base or retain_model"),
        ({"space": {}}, "empty space"),
        ({"settings": {"out": "x"}}, "has out"),
        ({"space": {"trainer.seed": Range(choice=(1, 2))}}, "a seed is not tuned"),
    ],
)
def test_a_method_is_refused_with_a_reason(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        method(**change)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"methods": ()}, "methods is empty"),
        ({"methods": (method(), method())}, "has m 2 times"),
        ({"trials": 0}, "trials is 0"),
        ({"seeds": (1, 1)}, "none twice"),
        ({"seeds": ()}, "at least one"),
        ({"budget": 1.0}, "from 0 to below 1"),
        ({"settings": {"resume": True}}, "has resume"),
    ],
)
def test_a_search_is_refused_with_a_reason(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        config(**change)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"methods": (method(space={"objective.betta": Range(uniform=(0.1, 1.0))}),)}, "did you mean"),
        ({"methods": (method(space={"objective.beta": Range(uniform=(-1.0, 1.0))}),)}, "m with objective.beta at -1.0"),
        ({"methods": (method(space={"trainer.schedule": Range(choice=("linear", "sideways"))}),)}, "sideways"),
        ({"methods": (method(settings={"objective": "Jiont"}),)}, "Joint"),
        ({"seeds": (1, 42)}, "is no repeat; give others"),
    ],
)
def test_every_end_of_every_range_is_tried_before_anything_runs(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Plan.of(config(**change))


def test_a_budget_of_what_is_not_measured_is_refused(tmp_path: Path) -> None:
    (tmp_path / "evaluate.yaml").write_text("utility: null\n")
    with pytest.raises(UserError, match="asks no utility questions"):
        Plan.of(config(evaluate=str(tmp_path / "evaluate.yaml")))
    Plan.of(config(evaluate=str(tmp_path / "evaluate.yaml"), keeping="retain_terms"))


def test_the_shipped_search_survives_its_own_yaml(tmp_path: Path) -> None:
    (tmp_path / "search.yaml").write_text(dump_yaml(config()))
    assert parse_config(SearchConfig, ["--config", str(tmp_path / "search.yaml")]) == config()


def test_a_run_is_the_base_config_with_the_method_and_the_values_on_top(tmp_path: Path) -> None:
    asked = config(settings={"trainer.steps": 7}, methods=(method(settings={"objective": "NPO", "trainer.batch": 4}),))
    run = Plan.of(asked).unlearning(asked.methods[0], {"objective.beta": 0.5, "trainer.clip": None}, tmp_path, 9)
    assert (type(run.objective).__name__, run.trainer.steps, run.trainer.batch) == ("NPO", 7, 4)
    assert (run.objective.beta, run.trainer.clip, run.trainer.seed) == (0.5, None, 9)  # type: ignore[attr-defined]
    assert run.scope.layers == (0, 1, 2), "from the base config"


def test_words_put_a_class_before_its_fields() -> None:
    found = words({"objective.beta": 1e-05, "objective": "NPO", "trainer.clip": None, "scope.layers": [0, 1]})
    assert found[:2] == ["--objective", "NPO"]
    assert found[2:] == ["--objective.beta", "1e-05", "--trainer.clip", "null", "--scope.layers", "[0, 1]"]


def test_within_the_budget_is_better_than_any_trial_outside_it() -> None:
    lowest = floor(0.8, 0.25)
    assert lowest == pytest.approx(0.6)
    assert value(scored(0.0, 0.6), lowest) == 0.0
    assert value(scored(0.4, 0.7), lowest) == 0.4
    assert value(scored(1.0, 0.3), lowest) == pytest.approx(-0.5)
    assert value(scored(1.0, 0.0), lowest) == -1.0


def test_the_best_trial_keeps_to_the_budget_and_is_the_first_of_equals() -> None:
    trials = [scored(0.9, 0.5), scored(0.5, 0.9), scored(0.5, 0.95), scored(0.2, 0.9)]
    finished = [Finished(failed="the loss became nan"), *(Finished(scored=one) for one in trials)]
    assert best(finished, 0.8) == 2
    assert best(finished, 0.5) == 1
    assert best(finished, 0.99) is None


def test_the_front_by_its_definition() -> None:
    grid = [(0.1 * x, 0.1 * y) for x, y in itertools.product(range(4), range(4)) if x * x + y * y <= 9]
    points = [*grid, grid[-1]]  # two equal ones
    found = front(points)
    for place, (x, y) in enumerate(points):
        beaten = any((a >= x and b > y) or (a > x and b >= y) for a, b in points)
        assert (place in found) is not beaten
    assert [points[place][0] for place in found] == sorted(points[place][0] for place in found)


def test_the_interval_by_hand() -> None:
    found = Estimate.of([1.0, 2.0, 3.0])  # s = 1, t(0.975, 2) = 4.302653
    assert (found.mean, found.low, found.high) == (2.0, 1.0, 3.0)
    assert found.half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert math.isnan(Estimate.of([1.0]).half)


def test_measures_by_hand() -> None:
    terms = [1.0, 0.5, None, 0.0, 0.5, None, 0.2, 0.4, None, 0.6, 0.8, None]
    scores = {"terms": terms, "task_aggregate": 0.1, "utility": 0.7}
    assert Measures("forget_terms", "utility").of(scores) == (0.5, 0.7)
    assert Measures("task_aggregate", "retain_terms").of(scores) == (0.1, 0.5)
    with pytest.raises(UserError, match="no row bears on a forget term"):
        Measures("forget_terms", "utility").of({**scores, "terms": [None] * 6 + [1.0] * 6})


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_ledger_opened_anew_for_every_trial_proposes_the_same(tmp_path: Path, sampler: Any) -> None:
    """Beyond the first three the estimators decide, from trials that were read back; one of them failed."""

    def trials(folder: Path, *, reopen: bool) -> list[Finished]:
        folder.mkdir()
        ledger = Ledger(folder)
        for number in range(7):
            ledger = Ledger(folder) if reopen else ledger
            params = ledger.propose("m", SPACE, sampler=sampler, startup=3, seed=5)
            assert params == ledger.propose("m", SPACE, sampler=sampler, startup=3, seed=5), "asking leaves no trace"
            rate = params["trainer.learning_rate"]
            assert isinstance(rate, float)
            done = (
                Finished(params=params, scored=scored(rate, 0.9))
                if number != 1
                else Finished(params=params, failed="nan")
            )
            ledger.add_trial("m", SPACE, done, None if done.scored is None else rate)
        return Ledger(folder).trials("m")

    one, two = trials(tmp_path / "one", reopen=False), trials(tmp_path / "two", reopen=True)
    assert one == two
    assert [trial.failed for trial in one] == [None, "nan", *[None] * 5]
    assert len({trial.params["trainer.learning_rate"] for trial in one}) == 7
    assert all(1e-4 <= trial.params["trainer.learning_rate"] <= 1e-2 for trial in one)  # type: ignore[operator]


def test_a_grid_tries_every_combination_once(tmp_path: Path) -> None:
    space = {"trainer.learning_rate": Range(choice=(1e-4, 1e-3)), "x": Range(choice=(1, 2, 3))}
    ledger, tried = Ledger(tmp_path), []
    for _ in range(6):
        params = ledger.propose("m", space, sampler="grid", startup=1, seed=0)
        ledger.add_trial("m", space, Finished(params=params, scored=scored(0.5, 0.9)), 0.5)
        tried.append(tuple(params.values()))
    assert tried == list(itertools.product((1e-4, 1e-3), (1, 2, 3)))
    grid = method(space=space)
    config(methods=(grid,), trials=6, sampler="grid")
    with pytest.raises(UserError, match="m has 6 combinations, but trials is 5"):
        config(methods=(grid,), trials=5, sampler="grid")
    with pytest.raises(UserError, match="of m is a range"):
        config(methods=(method(),), trials=1, sampler="grid")


def test_methods_share_the_first_draws_of_what_they_share(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    one = ledger.propose("one", {"trainer.learning_rate": RATE}, sampler="random", startup=3, seed=0)
    other = ledger.propose("other", SPACE, sampler="random", startup=3, seed=0)
    assert one["trainer.learning_rate"] == other["trainer.learning_rate"]
    assert one != ledger.propose("one", {"trainer.learning_rate": RATE}, sampler="random", startup=3, seed=1)


def test_half_a_line_at_the_end_of_the_journal_is_dropped(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.add_trial("m", {"x": RATE}, Finished(params={"x": 1e-3}, scored=scored(0.5, 0.9)), 0.5)
    whole = (tmp_path / JOURNAL).read_bytes()
    ledger.keep("m", "seed-1", Finished(scored=scored(0.4, 0.9)))
    longer = (tmp_path / JOURNAL).read_bytes()
    (tmp_path / JOURNAL).write_bytes(longer[: len(whole) + 20])
    again = Ledger(tmp_path)
    assert again.others("m") == {}
    again.keep("m", "seed-1", Finished(scored=scored(0.3, 0.9)))
    last = Ledger(tmp_path)
    assert [trial.scored for trial in last.trials("m")] == [scored(0.5, 0.9)]
    assert last.others("m") == {"seed-1": Finished(scored=scored(0.3, 0.9))}


def found(**repeats: list[Finished]) -> SearchResult:
    """A search of one trial a method, in which each method had these repeats."""
    trial = Finished(params={"trainer.learning_rate": 0.0012345}, scored=scored(0.8, 0.95))
    methods = [
        MethodResult(name, [trial], 0 if runs else None, dict(enumerate(runs, start=1)))
        for name, runs in repeats.items()
    ]
    return SearchResult(config(trials=1), scored(0.0, 1.0, "base"), scored(1.0, 1.0, "retain_model"), methods)


def test_only_methods_whose_repeats_all_stand_are_ranked_and_the_page_says_why() -> None:
    good = [Finished(scored=scored(0.7, 0.96)), Finished(scored=scored(0.5, 0.98))]
    result = found(
        good=good,
        better=[Finished(scored=scored(0.8, 0.96)), Finished(scored=scored(0.7, 0.95))],
        costly=[Finished(scored=scored(1.0, 0.90)), Finished(scored=scored(1.0, 0.96))],
        fragile=[Finished(scored=scored(1.0, 1.0)), Finished(failed="the loss became nan")],
        none=[],
    )
    assert [method.name for method in result.ranked] == ["better", "good"]
    text = page(result)
    rows = [line.split(" | ") for line in text.splitlines() if " of 2 | " in line]
    assert [row[0].removeprefix("| ") for row in rows] == ["1", "2", "–", "–"]
    assert rows[1][1:4] == ["good", "0.600 ± 1.271 (0.500 to 0.700)", "0.970 ± 0.127 (0.960 to 0.980)"]
    assert rows[1][4:7] == ["0.970 ± 0.127 (0.960 to 0.980)", "0.300 ± 0.635 (0.250 to 0.350)", "2 of 2"]
    assert rows[1][7:] == ["2.0", "1,000", "5", "learning_rate 0.00123 |"]
    assert rows[2][6] == "1 of 2"
    assert "fragile has no place: with seed 2 it failed (the loss became nan)." in text
    assert "at least 0.950" in text
    assert {name: entry["rank"] for name, entry in result.to_json()["methods"].items()} == {
        "good": 2,
        "better": 1,
        "costly": None,
        "fragile": None,
        "none": None,
    }


def test_a_method_without_a_trial_within_the_budget_has_no_row() -> None:
    outside = MethodResult("m", [Finished(scored=scored(1.0, 0.9)), Finished(failed="nan")], None, {})
    failed = MethodResult("n", [Finished(failed="nan")], None, {})
    text = page(SearchResult(config(), scored(0.0, 1.0, "base"), None, [outside, failed]))
    assert (
        "m has no row: none of its 2 trials is within the budget (1 failed); the nearest, m/trial-00, has utility 0.900."
        in text
    )
    assert "n has no row: all 1 trials failed." in text
    assert "No method has a row." in text


def test_the_leading_methods_are_those_of_the_best_trials_within_the_budget() -> None:
    def of(quality: float, utility: float) -> list[Finished]:
        return [Finished(scored=scored(quality, utility)), Finished(failed="nan")]

    methods = {"a": of(0.5, 1.0), "outside": of(0.9, 0.5), "b": of(0.7, 1.0), "c": of(0.7, 1.0), "d": of(0.6, 1.0)}
    assert leading(methods, 0.9, None) == ["b", "c", "d", "a"]
    assert leading(methods, 0.9, 2) == ["b", "c"]
    assert leading({"outside": of(0.9, 0.5)}, 0.9, 2) == []


def test_only_the_leading_methods_are_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    qualities = {"base": 0.0, "first": 0.3, "second": 0.8, "third": 0.5}
    monkeypatch.setattr(stage, "unlearn_and_score", lambda *_: None)
    monkeypatch.setattr(stage, "check_runs", lambda *_: None)
    monkeypatch.setattr(stage, "read_scored", lambda _, name, __: scored(qualities[name.split("/")[0]], 1.0, name))
    space = {"trainer.learning_rate": Range(log_uniform=(1e-4, 1e-3))}
    methods = tuple(Method(name=name, space=space) for name in list(qualities)[1:])
    asked = config(methods=methods, retain_model=None, trials=1, seeds=(1, 2), repeat=2, out=str(tmp_path / "run"))
    result = run_search(asked)
    assert [method.name for method in result.ranked] == ["second", "third"]
    assert [len(method.repeats) for method in result.methods] == [0, 2, 2]
    text = page(result)
    assert "first was not run again: its best trial is not among the first 2." in text
    assert "The best trial of the 2 methods that came out best was run again" in text


def test_a_search_begun_before_the_retain_model_had_its_name_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    monkeypatch.setattr(stage, "unlearn_and_score", lambda folder, *_: ran.append(folder.name))
    monkeypatch.setattr(stage, "check_runs", lambda *_: None)
    monkeypatch.setattr(stage, "read_scored", lambda _, name, __: scored(0.5, 1.0, name))
    space = {"trainer.learning_rate": Range(log_uniform=(1e-4, 1e-3))}
    asked = config(methods=(Method(name="one", space=space),), trials=1, seeds=(1,), out=str(tmp_path / "run"))
    first = run_search(asked)
    assert ran == ["base", "retain_model", "trial-00", "seed-1"]
    saved = tmp_path / "run" / "config.yaml"
    saved.write_text(saved.read_text().replace("retain_model: builtin:retain_model", "twin: builtin:retain_only"))
    journal = tmp_path / "run" / "study.journal"
    journal.write_text(journal.read_text().replace("retain_model", "twin"))
    manifest = tmp_path / "run" / "manifest.json"
    old = manifest.read_text().replace('"class_path": "Joint"', '"class_path": "unlearn.objectives.joint.Joint"')
    assert old != manifest.read_text()
    began = json.loads(old)
    del (
        began["evaluate"]["scores"],
        began["unlearn"]["trainer"]["estimate"],
    )  # settings that are younger than the search
    manifest.write_text(json.dumps(began))
    config_today = parse_config(SearchConfig, ["--config", str(saved), "--resume", "true"])
    assert config_today == replace(asked, resume=True)
    again = run_search(config_today)
    assert len(ran) == 4, "nothing was run again"
    assert again.retain_model is not None
    assert again.retain_model.folder == "twin"
    assert again.ranked[0].name == first.ranked[0].name == "one"


def test_a_search_whose_base_configs_changed_does_not_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "unlearn_and_score", lambda *_: None)
    monkeypatch.setattr(stage, "check_runs", lambda *_: None)
    monkeypatch.setattr(stage, "read_scored", lambda _, name, __: scored(0.5, 1.0, name))
    space = {"trainer.learning_rate": Range(log_uniform=(1e-4, 1e-3))}
    asked = config(methods=(Method(name="one", space=space),), trials=1, seeds=(1,), out=str(tmp_path / "run"))
    run_search(asked)
    manifest = tmp_path / "run" / "manifest.json"
    began = json.loads(manifest.read_text())
    began["evaluate"]["batch_size"] += 1
    manifest.write_text(json.dumps(began))
    with pytest.raises(UserError, match="evaluate changed since it began"):
        run_search(replace(asked, resume=True))


def test_the_picture_is_drawn_whatever_was_found() -> None:
    whole = found(one=[Finished(scored=scored(0.7, 0.96))], two=[Finished(scored=scored(0.5, 0.9))] * 2, none=[])
    nothing = SearchResult(
        config(), scored(0.0, 1.0, "base"), None, [MethodResult("m", [Finished(failed="nan")], None, {})]
    )
    for result in (whole, nothing):
        assert pareto(result).startswith(b"\x89PNG")
    assert pareto(whole) == pareto(whole)


def test_alternates_are_the_methods_own() -> None:
    """A method that learns alternates is compared with those that have none."""
    rows = {"forget": "a", "retain": "b"}
    plain, learns, other = (
        {"data": data, "weights": "w"} for data in (rows, {**rows, "alternates": "c"}, {**rows, "forget": "d"})
    )
    assert _origin(plain) == _origin(learns) != _origin(other)


def test_optuna_is_asked_for_by_the_search_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == "optuna" else find(name, *a))
    method = Method(name="one", space={"trainer.learning_rate": Range(log_uniform=(1e-4, 1e-3))})
    with pytest.raises(UserError, match=r"^optuna is not installed: pip install 'palimpsest-unlearning\[search\]'$"):
        run_search(SearchConfig(methods=(method,)))
    without = (
        "import sys; sys.modules['optuna'] = None; import unlearn.search, unlearn.search.table, unlearn.search.picture"
    )
    subprocess.run([sys.executable, "-c", without], check=True, cwd=ROOT)
