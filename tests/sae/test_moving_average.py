"""The average of the weights against its formula."""

from __future__ import annotations

import pytest
import torch

from lm import UserError
from sae import MovingAverage


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_weight_average_is_corrected_for_its_start() -> None:
    weights = [noise(seed, 3) for seed in range(4)]
    average = MovingAverage.start({"w": weights[0]}, decay=0.9)
    with pytest.raises(UserError, match="empty"):
        average.value()
    total = torch.zeros(3).double()
    for step, w in enumerate(weights, start=1):
        average = average.update({"w": w})
        total = 0.9 * total + 0.1 * w
        torch.testing.assert_close(average.value()["w"], total / (1 - 0.9**step))
    constant = MovingAverage.start({"w": weights[0]}).update({"w": weights[0]})
    torch.testing.assert_close(constant.value()["w"], weights[0])
    with pytest.raises(UserError, match="start it anew"):
        average.update({"v": weights[0]})
    with pytest.raises(UserError, match="decay"):
        MovingAverage.start({}, decay=1.0)
