"""The learning rate of every step, by hand and as transformers' schedulers have it."""

from __future__ import annotations

import pytest
import torch
from transformers import get_scheduler

from unlearn.training.config import TrainerConfig
from unlearn.training.schedule import Schedule, learning_rate


def rates(steps: range, of: int, schedule: Schedule, warmup: int = 0) -> list[float]:
    return [learning_rate(step, of, peak=2.0, schedule=schedule, warmup=warmup) for step in steps]


def test_by_hand() -> None:
    assert rates(range(4), 4, "linear") == [2.0, 1.5, 1.0, 0.5]
    assert rates(range(4), 4, "constant", 2) == [0.0, 1.0, 2.0, 2.0]
    assert rates(range(2, 3), 4, "cosine") == pytest.approx([1.0])
    assert TrainerConfig(learning_rate=2.0, schedule="linear").rate(1, 4) == 1.5


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_as_transformers_has_it(schedule: Schedule, warmup: int) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    theirs = get_scheduler(schedule, optimizer, num_warmup_steps=warmup, num_training_steps=10)
    expected = []
    for _ in range(10):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    assert rates(range(10), 10, schedule, warmup) == pytest.approx(expected)
