"""A run that stopped goes on exactly, or is refused where what a name stands for has changed."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lm.errors import UserError
from lm.run_folder import RunFolder
from tests.unlearn.helpers import SMALL, command, config_words, environment, reworded, run_script, small_config
from tracing.plan.layer_plan import LayerPlan
from unlearn.objectives import NPO, Joint, Objective
from unlearn.scope.scope import Scope
from unlearn.stage import run_unlearn
from unlearn.training import checkpoint


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in RunFolder(run).metrics() if "loss" in line]


@pytest.fixture(scope="module")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of forty steps that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    config = small_config(tiny, folder, trainer=replace(SMALL, steps=40))
    done = run_script("unlearn", *config_words(config, folder.parent))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_killed_and_resumed_equals_uninterrupted(whole: Path, tmp_path: Path, stop: int) -> None:
    words = ["--config", str(whole.parent / "config.yaml")]
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        command("unlearn", *words, "--out", str(killed)),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _wait_for_step(killed, stop, process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / "model").exists(), "the run was killed before its end"
    again = run_script("unlearn", *words, "--out", str(killed), "--resume", "true")
    assert again.returncode == 0, again.stderr
    one, two = weights(whole / "model"), weights(killed / "model")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert RunFolder(whole).metrics() == RunFolder(killed).metrics(), "the log of a resumed run has no seam"


def _wait_for_step(run: Path, step: int, process: subprocess.Popen[bytes]) -> None:
    """However long that takes on a busy machine; a run that ends before is found out by its model."""
    while process.poll() is None and len(losses(run) if run.exists() else []) < step:
        time.sleep(0.002)


@pytest.mark.parametrize("at", [2, 4, 6])
@pytest.mark.parametrize("objective", [Joint(), NPO()], ids=["joint", "npo"])
def test_going_on_from_every_checkpoint_is_exact(tiny: Path, tmp_path: Path, objective: Objective, at: int) -> None:
    """Every kept checkpoint in turn is made the newest one, and the rest of the run repeated."""
    trainer = replace(SMALL, steps=8, batch=4, evaluate_every=3, checkpoint="lowest_joint_loss")
    config = small_config(
        tiny, tmp_path / "whole", objective=objective, trainer=trainer, validation=reworded(tiny, tmp_path)
    )
    whole = weights(run_unlearn(config))
    part = replace(config, out=str(tmp_path / "part"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unlearn.training.loop._Loop._milestones", _stop_after(at))
        with pytest.raises(_Stop):
            run_unlearn(part)
    resumed = weights(run_unlearn(replace(part, resume=True)))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


class _Stop(Exception):
    pass


def _stop_after(step: int):  # type: ignore[no-untyped-def]
    from unlearn.training.loop import _Loop

    original = _Loop._milestones

    def milestones(loop: _Loop) -> None:
        original(loop)
        if loop.at.step == step:
            raise _Stop

    return milestones


def test_a_moment_is_read_to_where_its_weight_is(tmp_path: Path) -> None:
    """A fused AdamW counts its steps on the weights' device: with a count on the CPU no run goes on on a GPU."""
    moments = {"step::w": torch.tensor(3.0), "exp_avg::w": torch.ones(2)}
    save_file(moments, tmp_path / f"{checkpoint.MOMENTS}-00000-of-00001.safetensors")
    saved, weight = checkpoint._Saved(tmp_path, checkpoint.MOMENTS), torch.empty(2, device="meta")
    assert {name: saved.like(name, weight).device.type for name in saved.names} == dict.fromkeys(moments, "meta")


def test_what_a_name_stands_for_must_not_change_before_a_run_goes_on(tiny: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    LayerPlan(layers=(0,)).save(plan)
    config = small_config(tiny, tmp_path / "run", scope=Scope(plan=str(plan)))
    run_unlearn(config)
    run_unlearn(replace(config, resume=True))
    LayerPlan(layers=(2,)).save(plan)
    with pytest.raises(UserError, match="scope changed since it began"):
        run_unlearn(replace(config, resume=True))
    LayerPlan(layers=(0,)).save(plan)
    manifest = tmp_path / "run" / "manifest.json"
    manifest.write_text(manifest.read_text().replace(RunFolder(tmp_path / "run").manifest["weights"], "0" * 16))
    with pytest.raises(UserError, match="weights changed since it began"):
        run_unlearn(replace(config, resume=True))


def test_seconds_of_a_resumed_run_are_of_all_its_starts(tiny: Path, tmp_path: Path) -> None:
    config, usual = small_config(tiny, tmp_path / "run"), checkpoint.read_facts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unlearn.training.loop._Loop._milestones", _stop_after(4))
        with pytest.raises(_Stop):
            run_unlearn(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "read_facts", lambda folder: {**usual(folder), "seconds": 1000.0})
        run_unlearn(replace(config, resume=True))
    manifest = RunFolder(tmp_path / "run").manifest
    assert 1000 < manifest["train_seconds"] <= manifest["wall_seconds"]
