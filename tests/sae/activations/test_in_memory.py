"""Tensors as a stream: each token once an epoch, the same batches for any number of processes, and from a state on."""

from __future__ import annotations

import pytest
import torch

from lm import Site, UserError
from sae.activations import ActivationsInMemory

SITE, OTHER = Site("resid", 0), Site("mlp", 1)


@pytest.mark.parametrize("world", [2, 3])
def test_tensors_are_served_once_an_epoch_and_alike_to_any_number_of_processes(world: int) -> None:
    values = torch.randn(25, 8, generator=torch.Generator().manual_seed(0))
    whole = ActivationsInMemory({SITE: values}, batch_tokens=10)
    parts = [ActivationsInMemory({SITE: values}, batch_tokens=10, rank=rank, world=world) for rank in range(world)]
    served = []
    for _ in range(5):
        batch = next(whole).values
        for rank, part in enumerate(parts):
            assert torch.equal(next(part).values, batch[rank::world])
        served.append(batch)
    first, second = torch.cat(served).split(25)
    for epoch in (first, second):
        assert torch.equal(epoch.sort(0).values, values.sort(0).values)
    assert not torch.equal(first, second)
    state, rest = whole.state_dict(), next(whole).values
    again = ActivationsInMemory({SITE: values}, batch_tokens=10)
    again.load_state_dict(state)
    assert torch.equal(next(again).values, rest)
    with pytest.raises(UserError, match="batch_tokens"):
        ActivationsInMemory({SITE: values}, batch_tokens=5).load_state_dict(state)


def test_tensors_that_do_not_fit_are_refused() -> None:
    for wrong in (
        {},
        {SITE: torch.zeros(3)},
        {SITE: torch.zeros(0, 4)},
        {SITE: torch.zeros(3, 4), OTHER: torch.zeros(2, 4)},
    ):
        with pytest.raises(UserError, match=r"give \(tokens, hidden\), of one shape"):
            ActivationsInMemory(wrong, batch_tokens=2)
    with pytest.raises(UserError, match="for process 2 of 2 cannot be"):
        ActivationsInMemory({SITE: torch.zeros(3, 4)}, batch_tokens=2, rank=2, world=2)
