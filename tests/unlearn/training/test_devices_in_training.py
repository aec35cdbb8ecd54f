"""Two processes, with whole copies or with shards, make the run that one makes; and each goes on with the other's."""

from __future__ import annotations

import math
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lm.run_folder import RunFolder
from tests.unlearn.device_cases import CASES, FIVE, GO_ON, HELD, STOP, Job, work
from tests.unlearn.helpers import launch, reworded, small_config, unseen_rows
from unlearn.config import UnlearnConfig
from unlearn.objectives import Calibrated

Make = Callable[[str, Path], UnlearnConfig]


@pytest.fixture(scope="module")
def make(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """The config of a case, for a folder."""
    validation = reworded(tiny, tmp_path_factory.mktemp("reworded"))
    assert validation.forget is not None
    rows = Path(validation.forget).read_text().splitlines(keepends=True)
    Path(validation.forget).write_text("".join(rows[:-1]))  # eleven: the shares differ here too

    unseen = tmp_path_factory.mktemp("unseen") / "calibration.jsonl"
    unseen_rows(tiny, unseen)

    def made(case: str, out: Path) -> UnlearnConfig:
        settings: dict[str, Any] = {"trainer": FIVE, **CASES[case]}
        if settings["trainer"].evaluate_every:
            settings["validation"] = validation
        if isinstance(settings["objective"], Calibrated):
            settings["calibration"] = str(unseen)
        return small_config(tiny, out, **settings)

    return made


@pytest.fixture(scope="module")
def alone(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case, made by one process."""
    folder = tmp_path_factory.mktemp("alone")
    work([Job(make(case, folder / case)) for case in CASES])
    return folder


@pytest.fixture(scope="module", params=["cpu2_ddp", "cpu2_fsdp"])
def both(make: Make, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case, made by two processes: `whole`; stopped and gone on with: `again`, and, as one process left it, `taken`."""
    folder = tmp_path_factory.mktemp(request.param)
    jobs = [Job(make(case, folder / "whole" / case)) for case in CASES]
    for case in GO_ON:
        config = make(case, folder / "again" / case)
        jobs += [Job(config, stop=STOP, copy=True), Job(replace(config, resume=True))]
        config = make(case, folder / "taken" / case)
        work([Job(config, stop=STOP)])
        jobs.append(Job(replace(config, resume=True)))
    jobs += [Job(make(case, folder / "held" / case), held=True) for case in HELD]
    (folder / "held").mkdir()
    (folder / "jobs").write_bytes(pickle.dumps(jobs))
    done = launch(request.param, "tests/unlearn/device_cases.py", str(folder / "jobs"))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def log(run: Path) -> list[dict[str, float]]:
    return RunFolder(run).metrics()


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def assert_alike(got: Path, wanted: Path) -> None:
    """Every logged number, validation included, and every weight, to the rounding of float32."""
    lines = log(got), log(wanted)
    assert [line.keys() for line in lines[0]] == [line.keys() for line in lines[1]]
    for one, other in zip(*lines, strict=True):
        for name, value in other.items():
            assert math.isclose(one[name], value, rel_tol=5e-6, abs_tol=5e-6), (name, one, other)
    ours, theirs = weights(got), weights(wanted)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", CASES)
def test_two_processes_make_the_run_of_one(both: Path, alone: Path, case: str) -> None:
    assert RunFolder(both / "whole" / case).manifest["devices"]["processes"] == 2
    assert_alike(both / "whole" / case, alone / case)


def test_every_row_is_on_one_process_only(both: Path, alone: Path) -> None:
    """Forget and retain rows are divided alike: the processes' rows of a step differ, and together are the step's."""
    for case in ("dual", "npo, kept", "rmu", "dpo"):
        first, second = (pickle.loads((both / "whole" / f"{case}.{rank}.rows").read_bytes()) for rank in (0, 1))
        whole = pickle.loads((alone / f"{case}.0.rows").read_bytes())
        assert len(first) == len(second) == len(whole) == FIVE.steps
        for ours, theirs, all_of_it in zip(first, second, whole, strict=True):
            for forget in (True, False):
                here, there, both_sides = (
                    [row for side, rows in step if side == forget for row in rows] for step in (ours, theirs, all_of_it)
                )
                assert (len(here), len(there)) == (3, 2)
                assert sorted([*here, *there]) == sorted(both_sides)


@pytest.mark.parametrize("case", HELD)
def test_in_memory_each_process_has_the_result_of_one(both: Path, alone: Path, case: str) -> None:
    refused = both / "held" / f"{case}.0.refused"
    if refused.exists():
        assert "fsdp" in both.name
        assert "which FSDP shards: launch with DDP" in refused.read_text()
        return
    assert "ddp" in both.name
    first, second = (load_file(both / "held" / f"{case}.{rank}.safetensors") for rank in (0, 1))
    expected = weights(alone / case)
    assert first.keys() == second.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", GO_ON)
def test_gone_on_with_by_as_many_is_exact(both: Path, case: str) -> None:
    assert log(both / "again" / case) == log(both / "whole" / case)
    one, other = weights(both / "again" / case), weights(both / "whole" / case)
    assert all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.parametrize("case", GO_ON)
def test_one_process_goes_on_with_what_two_left_and_two_with_one(
    both: Path, alone: Path, make: Make, case: str
) -> None:
    assert_alike(both / "taken" / case, alone / case)
    again = both / "again" / case
    shutil.rmtree(again)
    again.with_name(f"{case}.copy").rename(again)
    assert [step for step, _ in RunFolder(again).checkpoints()] == [2]
    work([Job(replace(make(case, again), resume=True))])
    assert_alike(again, alone / case)
