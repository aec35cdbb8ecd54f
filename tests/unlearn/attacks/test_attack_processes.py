"""Attacks in several processes, and with the retain model's answers of an earlier attack: the same numbers, errors told."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lm.errors import UserError
from lm.loading import load
from lm.model import ModelSpec
from tests.unlearn.attacks.test_attack import FEW, people
from tests.unlearn.helpers import config_words, run_script
from unlearn.attacks import AttackConfig, Relearning, run_attack
from unlearn.attacks.base import Attacked, AttackSettings, Trial
from unlearn.attacks.parallel import LOG

TWO = replace(FEW, given=("other_people", "retain"))


@pytest.fixture(scope="module")
def world(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> AttackConfig:
    """An attack on the tiny model beside another of its shape."""
    folder = tmp_path_factory.mktemp("attack")
    for name, first, count in (("forget", 10, 6), ("retain", 40, 6), ("unseen", 70, 4)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in people(first, count)))
    return AttackConfig(
        model=ModelSpec(path=str(tiny / "model"), device="cpu"),
        retain_model=scaled(tiny, folder / "retain_model", 0.9),
        forget=str(folder / "forget.jsonl"),
        retain=str(folder / "retain.jsonl"),
        unseen=str(folder / "unseen.jsonl"),
        attack=TWO,
        seeds=(0,),
        max_new_tokens=4,
    )


def scaled(tiny: Path, folder: Path, factor: float) -> ModelSpec:
    model = load(str(tiny / "model"), device="cpu")
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter.mul_(factor)
    model.model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return ModelSpec(path=str(folder), device="cpu")


@pytest.fixture(scope="module")
def alone(world: AttackConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of that attack, done in one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    run_attack(replace(world, out=str(out)))
    return out


def result(out: Path) -> Any:
    return json.loads((out / "attack.json").read_text())


def test_two_workers_give_the_numbers_of_one(world: AttackConfig, alone: Path, tmp_path: Path) -> None:
    config = replace(world, workers=2, out=str(tmp_path / "run"))
    run_attack(config)
    assert result(tmp_path / "run") == result(alone)
    logs = sorted(str(path.parent.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob(LOG))
    assert logs == [
        f"{name}/seed-0/{model}" for name in ("other_people", "retain") for model in ("retain_model", "unlearned")
    ]
    for path in (tmp_path / "run").rglob(LOG):
        path.unlink()
    run_attack(replace(config, resume=True, workers=3))
    assert not list((tmp_path / "run").rglob(LOG)), "what is done is read, in this process"


class Broken(Relearning):
    """Fails on the retain rows: in a sentence, or by a signal."""

    def run(self, trial: Trial, subject: Attacked, settings: AttackSettings, folder: Path) -> Any:
        if trial.name == "retain" and folder.name == "unlearned":
            raise UserError("the loss is nan: give a lower rate")
        if trial.name == "retain":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().run(trial, subject, settings, folder)


def test_a_trial_that_fails_is_told_and_the_others_are_kept(world: AttackConfig, alone: Path, tmp_path: Path) -> None:
    broken = Broken(**{name: getattr(TWO, name) for name in vars(TWO)})
    config = replace(world, attack=broken, workers=2, out=str(tmp_path / "run"))
    with pytest.raises(UserError) as told:
        run_attack(config)
    assert str(told.value).startswith(
        "2 of 4 trials failed, the first retain/seed-0/unlearned: the loss is nan: give a lower rate; "
    )
    for model in ("unlearned", "retain_model"):
        assert TWO.finished(tmp_path / f"run/other_people/seed-0/{model}")
    assert "error: the loss is nan" in (tmp_path / "run/retain/seed-0/unlearned" / LOG).read_text()


def test_workers_and_a_launch_are_one_too_many(world: AttackConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="workers is 0"):
        replace(world, workers=0)
    words = config_words(replace(world, workers=2, out=str(tmp_path / "run")), tmp_path)
    done = run_script("attack", *words, launch="cpu2_ddp")
    assert done.returncode == 2
    assert "error: workers is 2, and the attack was launched on 2 processes" in done.stderr
    assert not (tmp_path / "run").exists()


def test_the_retain_model_is_asked_once_for_many_attacks(
    world: AttackConfig, alone: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = replace(world, model=scaled(tiny, tmp_path / "model", 1.1), out=str(tmp_path / "whole"))
    run_attack(other)
    attacked: list[str] = []
    usual = Relearning._train

    def noted(self: Relearning, trial: Trial, subject: Attacked, settings: AttackSettings, folder: Path) -> None:
        attacked.append(folder.name)
        usual(self, trial, subject, settings, folder)

    monkeypatch.setattr(Relearning, "_train", noted)
    half = replace(other, retain_answers=str(alone), out=str(tmp_path / "half"))
    run_attack(half)
    assert attacked == ["unlearned", "unlearned"]
    assert result(tmp_path / "half") == result(tmp_path / "whole")
    run_attack(replace(half, resume=True))
    assert attacked == ["unlearned", "unlearned"]


def test_one_trial_of_an_earlier_attack_is_enough(
    world: AttackConfig, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attack = replace(TWO, given=("retain",))
    run_attack(replace(world, attack=attack, retain_answers=str(alone), out=str(tmp_path / "run")))
    (one,) = result(tmp_path / "run")["trials"]
    assert one == next(each for each in result(alone)["trials"] if each["name"] == "retain")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"retain_model": None}, "where the hash of the retain model's weights is"),
        ({"unseen": None}, "where the hash of the unseen rows is"),
        ({"max_new_tokens": 5}, "where max_new_tokens is 4 and not 5 as here"),
        ({"attack": replace(TWO, steps=6)}, "where attack is"),
        ({"attack": replace(TWO, learning_rate=(1e-2, 2e-2))}, "has no trial other_people/rate-0.01/seed-0"),
        ({"attack": replace(TWO, share=0.5)}, "where the hash of the rows of the trial other_people/seed-0 is"),
        ({"seeds": (0, 1)}, "has no trial other_people/seed-1"),
        ({"retain_answers": "nowhere"}, "there is no finished attack"),
    ],
)
def test_answers_to_anything_else_are_refused(
    world: AttackConfig, alone: Path, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    if "retain_model" in change:
        change = {"retain_model": world.model}
    config = replace(world, **{"retain_answers": str(alone), "out": str(tmp_path / "run"), **change})
    with pytest.raises(UserError, match=said):
        run_attack(config)
    assert not (tmp_path / "run").exists()
