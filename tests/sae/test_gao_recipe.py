"""The recipe's pieces: the median against scipy's minimizer, the normalizer, the decoder's norm under steps."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.optimize import minimize

from lm import UserError
from sae import (
    geometric_median,
    input_variance,
    reconstruction_loss,
    unit_rows,
    without_parallel,
)


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_geometric_median_minimizes_the_sum_of_distances() -> None:
    points = noise(0, 40, 3).exp()
    median = geometric_median(points)
    found = minimize(lambda at: float((points - torch.tensor(at)).norm(dim=1).sum()), points.mean(0).numpy(), tol=1e-12)
    torch.testing.assert_close(median, torch.tensor(found.x), rtol=1e-4, atol=1e-4)
    outlier = torch.cat([points, torch.full((1, 3), 1e6)])
    assert float((geometric_median(outlier) - median).norm()) < 0.2


def test_the_geometric_median_leaves_a_data_point_that_is_not_it_and_stays_on_one_that_is() -> None:
    """The mean of the first set is a data point (0, 0), where a plain Weiszfeld iteration divides by zero."""
    lopsided = torch.tensor([[0.0, 0.0], [-3.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    torch.testing.assert_close(geometric_median(lopsided), torch.tensor([1.0, 0.0]).double(), atol=1e-4, rtol=0)
    heavy = torch.tensor([[0.0, 0.0]] * 3 + [[-3.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    assert torch.equal(geometric_median(heavy), torch.zeros(2).double())
    middle = torch.tensor([[0.0], [-1.0], [1.0]])
    torch.testing.assert_close(geometric_median(middle), torch.zeros(1).double())
    for same in (torch.ones(4, 2), torch.ones(1, 2)):
        assert torch.equal(geometric_median(same), torch.ones(2).double())


def test_the_normalizer_makes_predicting_the_mean_cost_one() -> None:
    x = noise(0, 50, 4) * 3 + 7
    variance = input_variance(x)
    assert float(reconstruction_loss(x, x.mean(0).expand_as(x), variance=variance)) == pytest.approx(1)
    assert float(reconstruction_loss(x, x, variance=variance)) == 0
    assert reconstruction_loss(x.bfloat16(), x.bfloat16(), variance=1.0).dtype == torch.float32
    for bad in (torch.ones(3, 2), torch.ones(0, 2), torch.tensor([[math.inf], [0.0]])):
        with pytest.raises(UserError, match="variance"):
            input_variance(bad)


def test_unit_rows_and_projected_gradients() -> None:
    w, gradient = noise(0, 6, 4), noise(1, 6, 4)
    w[2] = 0
    unit = unit_rows(w)
    torch.testing.assert_close(unit.norm(dim=1), torch.tensor([1, 1, 0, 1, 1, 1]).double())
    torch.testing.assert_close(unit * w.norm(dim=1, keepdim=True), w)
    for rows in (w, unit):
        left = without_parallel(gradient, rows)
        torch.testing.assert_close((left * rows).sum(1), torch.zeros(6).double())
        part = gradient - left
        torch.testing.assert_close(part.norm(dim=1) * rows.norm(dim=1), (part * rows).sum(1).abs())
    assert torch.equal(without_parallel(gradient, w)[2], gradient[2])
