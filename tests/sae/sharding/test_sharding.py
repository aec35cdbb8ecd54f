"""One, two and four gloo processes choose and train the same: selections exactly, weights to 1e-6, collectives counted."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from lm import UserError
from sae.sharding import Mesh, kth_largest

WORLDS = (1, 2, 4)
MESHES = ("2x1", "1x2", "4x1", "2x2", "1x4")
CHOICES = ("token", "multi", "mutual", "feature")


@pytest.fixture(scope="module")
def gave(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], dict[str, Any]]:
    """(processes, rank) -> what every case gave there (see `mesh_worker`)."""
    folder = tmp_path_factory.mktemp("mesh")
    worker = Path(__file__).with_name("mesh_worker.py")
    done = subprocess.run(
        [sys.executable, str(worker), str(folder)],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {
        (world, rank): torch.load(folder / f"{world}-{rank}.pt", weights_only=False)
        for world in WORLDS
        for rank in range(world)
    }


@pytest.mark.parametrize(
    "case", ["selections", "autograd", "rows", "trained", "collectives", "problems", "saved", "full_disk"]
)
def test_every_process_came_through(gave: dict[tuple[int, int], dict[str, Any]], case: str) -> None:
    """Selections (ties, all equal, none positive, bf16, subnormal), gradients and rows are compared on the spot."""
    for place, found in gave.items():
        assert case in found, (place, "an earlier case failed")
        assert not isinstance(found[case], str), (place, found[case])


@pytest.mark.parametrize("mesh", MESHES)
def test_selection_costs_what_is_said(gave: dict[tuple[int, int], dict[str, Any]], mesh: str) -> None:
    data, shards = map(int, mesh.split("x"))
    counts = gave[data * shards, 0]["selections"]
    assert counts[f"mutual {mesh} plain"] == {"mutual choice": 2}
    assert counts[f"mutual {mesh} bfloat16"] == {"mutual choice": 1, "ties": 1} or counts[
        f"mutual {mesh} bfloat16"
    ] == {"mutual choice": 1}
    assert counts[f"mutual {mesh} equal"] == {"mutual choice": 2, "ties": 1}
    assert counts[f"guess True {mesh} plain"] == {"mutual choice": 1}
    assert counts[f"guess False {mesh} plain"] == {"mutual choice": 2}
    assert counts[f"mutual {mesh} negative"] == {"mutual choice": 1}
    for sample in ("plain", "equal", "negative"):
        assert counts[f"feature {mesh} {sample}"] == ({"feature choice": 1} if data > 1 else {})
        assert counts[f"token {mesh} {sample}"] == ({"token choice": 1} if shards > 1 else {})


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("mesh", MESHES)
def test_training_equals_one_process(gave: dict[tuple[int, int], dict[str, Any]], mesh: str, name: str) -> None:
    data, shards = map(int, mesh.split("x"))
    weights, measures, fitted = gave[1, 0]["trained"]["1x1"][name]
    for rank in range(data * shards):
        found, theirs, law = gave[data * shards, rank]["trained"][mesh][name]
        for key, value in weights.items():
            torch.testing.assert_close(
                found[key], value, rtol=1e-6, atol=1e-6, equal_nan=True, msg=f"{mesh} {name} {key}"
            )
        assert theirs == pytest.approx(measures, rel=1e-5)
        assert (law is None) == (fitted is None)


def test_the_single_process_trains_what_is_tested(gave: dict[tuple[int, int], dict[str, Any]]) -> None:
    """The comparison above would be empty if nothing were idle, fitted or chosen by budgets."""
    counts = gave[1, 0]["collectives"]
    assert all(found == {"idle": found["idle"]} for found in counts.values())
    assert all(found["idle"] > 0 for found in counts.values())
    assert gave[1, 0]["trained"]["1x1"]["feature"][2] is not None


@pytest.mark.parametrize("mesh", MESHES)
def test_a_step_takes_so_many_collectives(gave: dict[tuple[int, int], dict[str, Any]], mesh: str) -> None:
    data, shards = map(int, mesh.split("x"))
    counts = gave[data * shards, 0]["collectives"]
    sharded = {"rows": 1, "reconstruction": 1, "pre-bias gradient": 1, "totals": 1} if shards > 1 else {}
    dealt = {"residual variance": 1, "gradients": 1} if data > 1 else {}
    selection = {
        "token": {"token choice": 1} if shards > 1 else {},
        "multi": {"token choice": 1} if shards > 1 else {},
        "mutual": {"mutual choice": 2} | ({"auxiliary choice": 1} if shards > 1 else {}),
        "feature": ({"feature choice": 2} if data > 1 else {})  # four times as many for Multi-TopK too
        | {"mutual choice": 2}  # demand is measured at this step
        | ({"auxiliary choice": 1} if shards > 1 else {}),
    }
    for name in CHOICES:
        found = {key: value for key, value in counts[f"{mesh} {name}"].items() if key != "idle"}
        if name == "mutual":  # one if the last batch's threshold was near enough
            assert found["mutual choice"] in (1, 2)
            found["mutual choice"] = 2
        assert found == {"ready": 1} | sharded | dealt | selection[name], name


def test_all_processes_say_what_is_wrong_with_one(gave: dict[tuple[int, int], dict[str, Any]]) -> None:
    for (world, _), found in gave.items():
        for key, said in found["problems"].items():
            assert ("hold NaN, infinity" if key.startswith("nan") else "ended after") in said, (world, key)
        assert len(found["problems"]) == 2 * {1: 1, 2: 2, 4: 3}[world]


def test_a_full_disk_of_one_ends_all_and_leaves_no_half_checkpoint(gave: dict[tuple[int, int], dict[str, Any]]) -> None:
    for found in gave.values():
        assert "the disk is full" in found["full_disk"]["said"]
        assert "step-" not in found["full_disk"]["left"]


def test_going_on_with_another_number_of_processes(gave: dict[tuple[int, int], dict[str, Any]]) -> None:
    unbroken = gave[1, 0]["trained"]["1x1"]
    for (world, _), found in gave.items():
        for name, weights in found["saved"].items():
            for key, value in weights.items():
                torch.testing.assert_close(
                    value, unbroken[name][0][key], rtol=1e-6, atol=1e-6, equal_nan=True, msg=f"{world} {name} {key}"
                )


def test_weights_are_bit_for_bit_the_same_however_many_processes_read_them(
    gave: dict[tuple[int, int], dict[str, Any]],
) -> None:
    first = gave[1, 0]["loaded"]
    assert len(first) > 1
    for (world, _), found in gave.items():
        for name, weights in found["loaded"].items():
            for key, value in weights.items():
                assert torch.equal(value, first[name][key]), (world, name, key)


def _pieces(numbers: torch.Tensor) -> Iterator[torch.Tensor]:
    return iter(numbers.split(1000))


def _kept(sums: list[torch.Tensor], counts: torch.Tensor) -> torch.Tensor:
    sums.append(counts)
    return counts


def test_kth_largest_counts_ties_and_takes_all_there_are() -> None:
    values = torch.tensor([3.0, -1.0, 2.0, 2.0, 2.0, 0.0, 0.5])
    found = kth_largest(lambda: iter(values.split(3)), 2)
    assert found is not None
    assert (float(found.value), found.ties, found.wanted) == (2.0, 3, 1)
    every = kth_largest(lambda: iter([values]), 100)
    assert every is not None
    assert float(every.value) == 0.5
    assert kth_largest(lambda: iter([-values.abs()]), 3) is None
    made = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    for scale, guess in ((1.0, 0.9), (1.0, 1.0), (1e-40, 1e-40), (1e30, 1e30), (1.0, 1e-45), (1.0, 3e37)):
        numbers, sums = made * scale, []
        exact = float(numbers.sort(descending=True).values[799])
        at = kth_largest(partial(_pieces, numbers), 800, partial(_kept, sums), guess=exact * guess / scale)
        assert at is not None
        assert (float(at.value), at.ties, at.wanted, len(sums)) == (exact, 1, 1, 1 if guess == scale else 2)
    with pytest.raises(UserError, match="NaN"):
        kth_largest(lambda: iter([torch.tensor([1.0, torch.nan])]), 1)
    with pytest.raises(UserError, match="float64"):
        kth_largest(lambda: iter([values.double()]), 1)


def test_a_mesh_that_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match="divides 1"):
        Mesh(features=2)
