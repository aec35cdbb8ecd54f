"""A search end to end, on a few built-in rows: equal trials, what is kept and what is refused, and going on after a kill."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from dataclasses import asdict, replace
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest

from lm.config import dump_yaml, parse_config
from lm.errors import UserError
from lm.row_files import load_rows
from tests.unlearn.helpers import command, environment, run_here
from unlearn.config import UnlearnConfig
from unlearn.evaluation.config import EvaluateConfig
from unlearn.evaluation.stage import run_evaluate
from unlearn.search import Method, Range, SearchConfig, run_search
from unlearn.search.ledger import Ledger
from unlearn.search.plan import Plan
from unlearn.search.process import LOG, unlearn_and_score
from unlearn.search.result import SearchResult
from unlearn.search.scored import Measures, check_runs, read_scored
from unlearn.search.table import commands_of
from unlearn.stage import run_unlearn

MEASURES = Measures("forget_terms", "retain_terms")
RATE = {"trainer.learning_rate": Range(log_uniform=(5e-4, 5e-3))}
DIFFERENCE = Method(name="difference", settings={"objective": "GradientDifference"}, space=RATE)
NPO = Method(name="npo", settings={"objective": "NPO"}, space={**RATE, "objective.beta": Range(uniform=(0.05, 0.5))})
BROKEN = Method(name="broken", space={"trainer.learning_rate": Range(choice=(1e30,))})


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few questions of each side, and the two configs that a search starts from."""
    folder = tmp_path_factory.mktemp("search")
    for side in ("forget", "retain"):
        rows = [row for row in load_rows(f"builtin:{side}") if row.task == "Task2" and row.kind == "qa"][:8]
        lines = (json.dumps({key: asdict(row)[key] for key in ("id", "input", "output", "task")}) for row in rows)
        (folder / f"{side}.jsonl").write_text("".join(line + "\n" for line in lines))
    data = f"model: {{device: cpu}}\nforget: {folder}/forget.jsonl\nretain: {folder}/retain.jsonl\n"
    (folder / "unlearn.yaml").write_text(
        data + "scope: {layers: [0, 1, 2]}\ntrainer: {steps: 4, batch: 8, micro_batch: 8, save_every: 2}\n"
    )
    (folder / "evaluate.yaml").write_text(
        data + "members: null\nnonmembers: null\nutility: null\nmax_new_tokens: 32\nbatch_size: 64\n"
    )
    return folder


def asked(files: Path, out: Path, *methods: Method) -> SearchConfig:
    return SearchConfig(
        unlearn=str(files / "unlearn.yaml"),
        evaluate=str(files / "evaluate.yaml"),
        methods=methods,
        trials=2,
        seeds=(1, 2),
        budget=0.5,
        keeping="retain_terms",
        retain_model="builtin:retain_model",
        out=str(out),
    )


@pytest.fixture(scope="module")
def done(files: Path, tmp_path_factory: pytest.TempPathFactory) -> SearchResult:
    """Three methods, one of which fails whatever is tried. The runs' processes get one thread, as the scripts' here do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        return run_search(asked(files, tmp_path_factory.mktemp("done") / "run", DIFFERENCE, BROKEN, NPO))


def test_every_method_has_its_trials_and_one_that_fails_ends_nothing(done: SearchResult) -> None:
    difference, broken, npo = done.methods
    assert [len(method.trials) for method in done.methods] == [2, 2, 2]
    assert all("the loss became" in (trial.failed or "") for trial in broken.trials)
    assert all(trial.failed is None for method in (difference, npo) for trial in method.trials)
    assert (broken.best, broken.repeats) == (None, {})
    assert all(list(method.repeats) == [1, 2] for method in (difference, npo))
    assert done.base.quality == 0.0
    assert done.retain_model is not None
    assert done.retain_model.quality > 0.9
    rates = [[trial.params["trainer.learning_rate"] for trial in method.trials] for method in (difference, npo)]
    assert rates[0] == rates[1]


def test_what_is_written_holds_every_run_with_the_hashes_of_its_files(done: SearchResult) -> None:
    out = Path(done.config.out)
    found = json.loads((out / "search.json").read_text())
    assert found == json.loads(json.dumps(done.to_json()))
    runs = [found["base"], found["retain_model"]]
    for method in found["methods"].values():
        runs += [run["scored"] for run in (*method["trials"], *method["repeats"].values()) if run["scored"]]
    assert len(runs) == 2 + 4 + 4
    for run in runs:
        assert "scores/manifest.json" in run["files"]
        for name, digest in run["files"].items():
            assert hashlib.sha256((out / run["folder"] / name).read_bytes()).hexdigest() == digest
    trained = json.loads((out / "npo/seed-1/manifest.json").read_text())
    repeat = found["methods"]["npo"]["repeats"]["1"]["scored"]
    assert trained["seed"] == 1
    assert repeat["peak_bytes"] == trained["peak_memory_bytes"]
    assert repeat["seconds"] == trained["train_seconds"]
    assert repeat["tokens"] == trained["tokens"] > 0
    text = (out / "table.md").read_text()
    assert "broken has no row: all 2 trials failed." in text
    assert "| npo |" in text
    assert (out / "pareto.png").read_bytes().startswith(b"\x89PNG")


def test_only_the_best_trials_weights_are_kept(done: SearchResult) -> None:
    out = Path(done.config.out)
    kept = sorted(str(path.parent.parent.relative_to(out)) for path in out.glob("**/model.safetensors"))
    assert kept == sorted(
        f"{method.name}/trial-{method.best:02d}" for method in done.methods if method.best is not None
    )
    assert not list(out.glob("*/*/checkpoints/*"))


def test_a_finished_search_runs_nothing_again(done: SearchResult, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unlearn.search.stage.unlearn_and_score", lambda *a: pytest.fail("ran again"))
    assert run_search(replace(done.config, resume=True)).methods == done.methods
    with pytest.raises(UserError, match="already holds a run"):
        run_search(done.config)
    with pytest.raises(UserError, match="budget was"):
        run_search(replace(done.config, resume=True, budget=0.4))


def test_a_row_is_made_again_by_its_command(done: SearchResult, tmp_path: Path) -> None:
    """The printed words, with another new folder."""
    run = done.methods[0].scored_repeats[0]
    train, score = (line.replace("runs/again", str(tmp_path)).split()[2:] for line in commands_of(done.config, run))
    run_unlearn(parse_config(UnlearnConfig, train))
    found = run_evaluate(parse_config(EvaluateConfig, score)).to_json()
    assert MEASURES.of(found) == (run.quality, run.utility)
    folder = tmp_path / run.folder
    assert (folder / "metrics.jsonl").read_text() == (Path(done.config.out) / run.folder / "metrics.jsonl").read_text()


@pytest.mark.parametrize("name", ["manifest.json", "config.yaml", "scores/manifest.json", "scores/scores.json"])
def test_no_row_without_its_files_as_they_were(done: SearchResult, name: str) -> None:
    out = Path(done.config.out)
    path = out / "npo/seed-2" / name
    before, table = path.read_bytes(), (out / "table.md").read_bytes()
    (out / "table.md").unlink()
    try:
        path.write_bytes(before.replace(b"1", b"2", 1))
        with pytest.raises(UserError, match=f"npo/seed-2/{name} is not the file that was recorded"):
            run_search(replace(done.config, resume=True))
        path.unlink()
        with pytest.raises(UserError, match=f"npo/seed-2/{name} is missing"):
            run_search(replace(done.config, resume=True))
        assert not (out / "table.md").exists()
    finally:
        path.write_bytes(before)
        (out / "table.md").write_bytes(table)


def test_no_row_without_its_folder_or_with_numbers_of_its_own(done: SearchResult, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    shutil.copytree(done.config.out, out)
    check_runs(out, done.runs, MEASURES)
    run = done.methods[0].scored_repeats[0]
    with pytest.raises(UserError, match="the numbers recorded for"):
        check_runs(out, [replace(run, quality=0.99)], MEASURES)
    other = done.methods[2].scored_repeats[0]
    shutil.rmtree(out / other.folder)
    with pytest.raises(UserError, match="is missing"):
        check_runs(out, done.runs, MEASURES)


@pytest.mark.parametrize(("name", "side"), [("manifest.json", "forget"), ("scores/manifest.json", "retain")])
def test_runs_on_other_rows_are_not_compared(done: SearchResult, tmp_path: Path, name: str, side: str) -> None:
    """The rows' content changed behind their name between two runs."""
    out = tmp_path / "copy"
    shutil.copytree(done.config.out, out)
    first, second = done.methods[0].scored_repeats
    facts = json.loads((out / second.folder / name).read_text())
    (out / second.folder / name).write_text(json.dumps({**facts, "data": {**facts["data"], side: "0" * 64}}))
    with pytest.raises(UserError, match="other rows or weights"):
        check_runs(out, [done.base, first, read_scored(out, second.folder, MEASURES)], MEASURES)


def test_killed_and_resumed_equals_unbroken(files: Path, done: SearchResult, tmp_path: Path) -> None:
    """Killed in the middle of a trial; its process goes with the one that drove it."""
    out = tmp_path / "run"
    config = replace(asked(files, out, DIFFERENCE), retain_model=None, seeds=(1,))
    (tmp_path / "search.yaml").write_text(dump_yaml(config))
    words = ["--config", str(tmp_path / "search.yaml")]
    process = subprocess.Popen(
        command("search", *words), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    running = out / "difference" / "trial-01"
    _wait_for(lambda: (running / "config.yaml").exists() or process.poll() is not None)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(Ledger(out).trials("difference")) == 1, "the search was killed in its second trial"
    resumed, method = run_search(replace(config, resume=True)).methods[0], done.methods[0]
    assert resumed.best == method.best
    unbroken = (*method.trials, method.repeats[1])
    for one, two in zip((*resumed.trials, resumed.repeats[1]), unbroken, strict=True):
        assert one.scored is not None
        assert two.scored is not None
        assert one.params == two.params
        assert (one.scored.quality, one.scored.utility) == (two.scored.quality, two.scored.utility)
        assert (out / one.scored.folder / "metrics.jsonl").read_text() == (
            Path(done.config.out) / two.scored.folder / "metrics.jsonl"
        ).read_text()


def _wait_for(condition: Any) -> None:
    """However long that takes on a busy machine: each condition also holds once what it waits for has ended."""
    while not condition():
        time.sleep(0.005)


def test_a_killed_run_is_a_failed_trial(files: Path, tmp_path: Path) -> None:
    plan = Plan.of(asked(files, tmp_path, replace(DIFFERENCE, settings={"trainer.steps": 100_000})))
    folder = tmp_path / "run"
    unlearning = plan.unlearning(plan.config.methods[0], {"trainer.learning_rate": 1e-3}, folder, None)
    said: list[str | None] = []
    thread = threading.Thread(target=lambda: said.append(unlearn_and_score(folder, unlearning, plan.scoring(folder))))
    thread.start()
    _wait_for(lambda: (folder / "metrics.jsonl").exists() or not thread.is_alive())
    (child,) = active_children()
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    thread.join()
    assert said == ["its process was ended by SIGKILL, maybe for want of memory"]


def test_what_would_fail_every_run_ends_the_search_and_a_defect_is_no_failed_trial(files: Path, tmp_path: Path) -> None:
    plan = Plan.of(asked(files, tmp_path, DIFFERENCE))
    folder = tmp_path / "run"
    unlearning = plan.unlearning(plan.config.methods[0], {"trainer.learning_rate": 1e-3}, folder, None)
    folder.mkdir()
    (folder / "checkpoints").write_text("in the way")
    with pytest.raises(UserError, match="cannot write"):
        unlearn_and_score(folder, unlearning, plan.scoring(folder))
    with pytest.raises(RuntimeError, match="broke off"):
        unlearn_and_score(folder, None, 7)  # type: ignore[arg-type]
    assert "Traceback" in (folder / LOG).read_text()


def test_several_processes_and_a_base_model_without_utility_are_refused(
    files: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = asked(files, tmp_path / "run", DIFFERENCE)
    with pytest.raises(UserError, match="there is nothing to keep"):
        run_search(replace(config, settings={"model.path": str(tiny / "model")}))
    (tmp_path / "search.yaml").write_text(dump_yaml(replace(config, out=str(tmp_path / "other"))))
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, said = run_here("search", "--config", str(tmp_path / "search.yaml"))
    assert (status, said[:50]) == (2, "error: the search was launched on 2 processes, but")
    assert not (tmp_path / "other").exists()
