"""A run folder in which something is damaged: it goes on from what is whole, to the same numbers, or is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lm.errors import UserError
from lm.run_folder import RunFolder
from tests.unlearn.helpers import SMALL, reworded, small_config
from unlearn.config import UnlearnConfig
from unlearn.stage import run_unlearn

Damage = Callable[[Path], None]
Stopped = tuple[UnlearnConfig, Path, dict[str, torch.Tensor]]
NEWEST = "checkpoints/step-000006"
OPTIMIZER = "optimizer-00000-of-00001.safetensors"
WEIGHTS = "weights-00000-of-00001.safetensors"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-2] ^= 64
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def remove(path: Path) -> None:
    path.unlink()


def other(path: Path) -> None:
    path.write_text(json.dumps({"other": 1}))


@pytest.fixture(scope="module")
def stopped(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Stopped:
    """A run that ended before its export, with checkpoints at steps 2, 4 and 6, and what comes of one that nothing disturbed."""
    folder = tmp_path_factory.mktemp("stopped")
    config = small_config(tiny, Path("run"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # a copy then has the same config
        expected = load_file(run_unlearn(replace(config, out="whole")) / "model.safetensors")
        patch.setattr(
            "unlearn.stage.export.save", lambda *_, **__: (_ for _ in ()).throw(UserError("the disk is full"))
        )
        with pytest.raises(UserError, match="disk is full"):
            run_unlearn(config)
    assert [step for step, _ in RunFolder(folder / "run").checkpoints()] == [2, 4, 6]
    return config, folder / "run", expected


@pytest.mark.parametrize("how", [flip, cut, empty, remove])
@pytest.mark.parametrize("name", [WEIGHTS, OPTIMIZER, "state.json"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_used(
    stopped: Stopped,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    how: Damage,
) -> None:
    config, run, expected = stopped
    shutil.copytree(run, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    how(tmp_path / "run" / NEWEST / name)
    result = run_unlearn(replace(config, resume=True))
    said = capsys.readouterr().err
    assert "step-000006 is damaged" in said
    assert name in said
    assert "going on from" in said
    assert "step-000004" in said
    found = load_file(result / "model.safetensors")
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize("how", [cut, empty, remove, other])
@pytest.mark.parametrize("name", [OPTIMIZER, "state.json"])
def test_checkpoints_from_before_there_were_digests_are_looked_at_too(
    stopped: Stopped, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, how: Damage
) -> None:
    """A missing file of moments was taken for moments of zero."""
    config, run, expected = stopped
    shutil.copytree(run, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    for sums in (tmp_path / "run").glob("checkpoints/*/SHA256SUMS"):
        sums.unlink()
    how(tmp_path / "run" / NEWEST / name)
    found = load_file(run_unlearn(replace(config, resume=True)) / "model.safetensors")
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize("how", [cut, empty, remove, other])
@pytest.mark.parametrize("name", ["manifest.json", "config.yaml", "metrics.jsonl"])
def test_damaged_records_end_in_a_sentence_or_do_no_harm(
    stopped: Stopped, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, how: Damage
) -> None:
    config, run, expected = stopped
    shutil.copytree(run, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    how(tmp_path / "run" / name)
    again = replace(config, resume=True)
    if name == "metrics.jsonl":
        found = load_file(run_unlearn(again) / "model.safetensors")
        assert all(torch.equal(found[key], value) for key, value in expected.items())
        return
    with pytest.raises(UserError):
        run_unlearn(again)
    assert (tmp_path / "run" / NEWEST / WEIGHTS).exists(), "nothing is lost by a refusal"


def test_no_whole_checkpoint_is_a_sentence_and_a_copied_one_is_left_alone(
    stopped: Stopped, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run, _ = stopped
    shutil.copytree(run, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run / NEWEST, tmp_path / "run" / f"{NEWEST}-keep")
    for folder in (tmp_path / "run" / "checkpoints").iterdir():
        flip(folder / WEIGHTS)
    with pytest.raises(UserError, match="no checkpoint is whole"):
        run_unlearn(replace(config, resume=True))
    for _, folder in RunFolder(tmp_path / "run").checkpoints():
        shutil.rmtree(folder)
    result = run_unlearn(replace(config, resume=True))
    assert result.exists()
    assert (tmp_path / "run" / f"{NEWEST}-keep").exists()


def test_a_damaged_export_is_not_called_finished(tiny: Path, tmp_path: Path) -> None:
    config = small_config(tiny, tmp_path / "run", trainer=replace(SMALL, steps=2))
    result = run_unlearn(config)
    assert run_unlearn(replace(config, resume=True)) == result
    flip(result / "model.safetensors")
    with pytest.raises(UserError, match=r"model is damaged \(model\.safetensors is not as it was written\)"):
        run_unlearn(replace(config, resume=True))


def test_damaged_best_weights_are_not_exported(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = replace(SMALL, evaluate_every=2, checkpoint="lowest_joint_loss")
    config = small_config(tiny, tmp_path / "run", trainer=trainer, validation=reworded(tiny, tmp_path))
    from unlearn.training.loop import _Loop

    usual = _Loop._milestones

    def then_flip(loop: _Loop) -> None:
        usual(loop)
        if loop.at.step == loop.steps:
            flip(loop.run.path / "best" / WEIGHTS)

    monkeypatch.setattr(_Loop, "_milestones", then_flip)
    with pytest.raises(UserError, match="best is damaged"):
        run_unlearn(config)


def test_a_refused_run_leaves_no_folder(tiny: Path, tmp_path: Path) -> None:
    config = small_config(tiny, tmp_path / "run", trainer=replace(SMALL, batch=1))
    with pytest.raises(UserError):
        run_unlearn(config)
    assert not (tmp_path / "run").exists()
