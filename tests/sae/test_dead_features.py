"""Firings are counted in tokens: against a plain loop, whatever the batches."""

from __future__ import annotations

import math

import pytest
import torch

from lm import UserError
from sae import Firings, SparseCode


def test_firings_are_counted_in_tokens_and_do_not_depend_on_the_batch_split() -> None:
    noise = torch.randn(24, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    dense = noise.relu() * torch.tensor([1.0, 1, 0, 1e-3, 1]).double()
    dense[6:, 4] = 0
    whole = Firings.start(5).update(SparseCode.from_dense(dense), window=10)
    split = Firings.start(5)
    for part in dense.split(6):
        split = split.update(SparseCode.from_dense(part), window=10)
    assert split.tokens == whole.tokens == 24
    assert split.silent[[0, 1, 2, 4]].tolist() == [0, 0, 24, 18]
    assert split.dead(window=17).tolist()[2:5:2] == [True, True]
    assert split.dead(window=18).tolist()[2:5:2] == [True, False]
    assert not Firings.start(5).dead(window=0).any()
    expected = (dense > 1e-3).double().mean(0)
    torch.testing.assert_close(whole.density(), expected)
    long = Firings.start(5)
    for part in dense.split(6):
        long = long.update(SparseCode.from_dense(part), window=10**9)
    torch.testing.assert_close(long.density(), expected)


def test_density_forgets_what_lies_far_beyond_its_window() -> None:
    firings = Firings.start(1).add(torch.tensor([100]), 100, window=100)
    assert float(firings.density()) == 1
    later = firings.add(torch.tensor([0]), 100, window=100)
    assert float(later.density()) == pytest.approx(math.exp(-1) / (1 + math.exp(-1)))
    assert float(later.add(torch.tensor([0]), 2000, window=100).density()) < 1e-8
    assert torch.equal(firings.add(torch.tensor([0]), 0, window=100).density(), firings.density())
    with pytest.raises(UserError, match="start the counts anew"):
        firings.add(torch.zeros(2), 1, window=100)
