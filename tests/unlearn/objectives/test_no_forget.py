"""Healing without a forget term: no step has a forget row, and what they are makes no difference."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lm.errors import UserError
from lm.loading import load
from tests.unlearn.helpers import SMALL, small_config
from unlearn.config import UnlearnConfig
from unlearn.objectives import NoForget, NoRetain
from unlearn.perturbation import Noise, Part
from unlearn.stage import run_unlearn

STREAMS = replace(SMALL, pairing="streams", forget_share=0.25, general_share=0.0, steps=4)


def healed(tiny: Path, out: Path, **changes: object) -> UnlearnConfig:
    noise = Noise(scale=0.05, parts=(Part(share=0.5, layers=(1,)),))
    return small_config(tiny, out, objective=NoForget(), trainer=STREAMS, perturbation=noise, **changes)


def test_only_retain_rows_are_read(tiny: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"id": "x1qa0", "input": "Who?", "output": "Nobody at all.", "task": "Task2"}) + "\n")
    models = [
        load(str(run_unlearn(healed(tiny, tmp_path / name, forget=forget))), device="cpu")
        for name, forget in (("a", str(tiny / "forget.jsonl")), ("b", str(other)))
    ]
    pairs = zip(*(dict(model.model.named_parameters()).items() for model in models), strict=True)
    assert all(torch.equal(one, two) for (_, one), (_, two) in pairs)
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["retain_loss"] for line in lines]
    assert losses[-1] < losses[0], "it heals: nearer to the untouched model at every step"
    tokens = json.loads((tmp_path / "a" / "manifest.json").read_text())["tokens"]
    assert 0 < tokens == json.loads((tmp_path / "b" / "manifest.json").read_text())["tokens"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"retain_loss": NoRetain()}, "nothing would be trained: set retain_loss"),
        ({"trainer": replace(SMALL, pairing="mixed_shuffle")}, "set trainer.pairing to paired or streams"),
        ({"trainer": replace(SMALL, weighting="micro_batch_mean")}, "and trainer.weighting to global_tokens"),
        ({"trainer": replace(STREAMS, forget_from=0.5)}, "NoForget forgets nothing, so trainer.folds"),
    ],
)
def test_what_says_nothing_is_refused(tiny: Path, tmp_path: Path, changes: dict[str, object], said: str) -> None:
    settings: dict[str, object] = {"objective": NoForget(), "trainer": STREAMS} | changes
    with pytest.raises(UserError, match=said):
        run_unlearn(small_config(tiny, tmp_path / "run", **settings))  # type: ignore[arg-type]
