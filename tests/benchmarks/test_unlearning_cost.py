"""The cost benchmark on the built-in model: the plain way has this project's losses and updates, so the same is timed."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.unlearning import LUME, Benchmark, apart, rows, table, tokens
from benchmarks.unlearning_contenders import CONTENDERS, Finished, Work, prepared
from tests.unlearn.helpers import environment
from unlearn.training.batches import PairedBatches

TINY = Benchmark(model="builtin", layers=(0, 1), layer=2, longest=32, batch=8, micro_batch=2, rounds=1, rate=1e-3)
TASKS = ("joint", "npo", "rmu")


def work(folder: Path, objective: str) -> Work:
    folder.joinpath("rows.json").write_text(json.dumps(rows(TINY, "builtin")))
    return Work(
        name="ours",
        objective=objective,
        model="builtin",
        rows=str(folder / "rows.json"),
        layers=TINY.layers,
        layer=TINY.layer,
        batch=TINY.batch,
        micro_batch=TINY.micro_batch,
        narrow=32,
        steps=2,
        turn=1,
        rate=TINY.rate,
        autocast="no",
        device="cpu",
        threads=1,
    )


def trained(asked: Work) -> tuple[list[float], dict[str, Tensor]]:
    """The losses of two steps, and by how much the first moved each weight."""
    losses: list[float] = []
    moved: dict[str, Tensor] = {}
    model = prepared(asked)
    before = {name: p.detach().clone() for name, p in model.model.named_parameters()}

    def turn(now: nn.Module, some: list[float]) -> None:
        losses.extend(some)
        if not moved:
            moved.update({name: p.detach() - before[name] for name, p in now.named_parameters()})
        if len(losses) == asked.steps:
            raise Finished

    with pytest.raises(Finished):
        CONTENDERS[asked.name](asked, model, turn)
    return losses, moved


@pytest.mark.parametrize("objective", TASKS)
def test_the_plain_way_gives_the_same_losses_and_the_same_first_update(tmp_path: Path, objective: str) -> None:
    asked = work(tmp_path, objective)
    losses, moved = trained(asked)
    assert len(losses) == 2
    learns = {name for name, change in moved.items() if bool(change.any())}
    assert 0 < len(learns) <= len(moved)
    assert (len(learns) == len(moved)) == (objective == "npo"), "only the scope moved"
    for name in ("plain", "ours_narrow", *(["ours_live"] if objective == "npo" else [])):
        others, theirs = trained(replace(asked, name=name))
        assert others == pytest.approx(losses, rel=1e-5)
        assert losses[0] != pytest.approx(losses[1], rel=1e-3)
        assert {name for name, change in theirs.items() if bool(change.any())} == learns
        for (
            weight
        ) in learns:  # the first step of Adam is +-rate almost everywhere: a sign may turn where a gradient is 0
            same = torch.isclose(theirs[weight], moved[weight], rtol=1e-2, atol=1e-6).double().mean()
            assert float(same) > 0.995, weight


def test_rows_have_the_lengths_that_were_asked_for() -> None:
    longer = replace(TINY, longest=100)
    found = rows(longer, "builtin")
    assert [(len(ids), start) for ids, start in found["forget"][:3]] == [(100, 65), (22, 12), (100, 31)]
    assert [len(ids) for ids, _ in rows(replace(TINY, lengths="even"), "builtin")["retain"]] == [32] * 8
    assert all(len(pairs) == 24 for pairs in LUME.values())
    step = PairedBatches(forget=8, retain=8, batch=8, seed=42).step(1)
    expected = sum(len(found["forget"][i][0]) for i in step.forget) + sum(
        len(found["retain"][i][0]) for i in step.retain
    )
    assert tokens(longer, found) == [expected]


def test_it_runs_as_a_program(tmp_path: Path) -> None:
    import subprocess

    words = [
        "--model",
        "builtin",
        "--layer",
        "2",
        "--tasks",
        "[rmu]",
        "--longest",
        "24",
        "--batch",
        "4",
        "--micro_batch",
        "2",
    ]
    words += ["--rounds", "1", "--out", str(tmp_path)]
    command = [sys.executable, "-m", "benchmarks.unlearning", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "results.json").read_text())["found"]["rmu"]
    assert found.keys() == {"ours", "plain"}
    assert apart(found["plain"], found["ours"]) < 1e-5
    assert all(facts["peak"] > facts["held"] and facts["seconds"][0] > 0 for facts in found.values())
    assert (tmp_path / "table.md").read_text() in done.stdout
    assert "| rmu | plain |" in table(TINY, {"rmu": found}, [100])
