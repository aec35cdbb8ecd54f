"""Residual contributions: for every family, what the sites hold must add up to the stream."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, ids, tiny

from lm import EMBEDDING, LanguageModel, Site, capture, check_anatomy


def identity_error(model: LanguageModel) -> torch.Tensor:
    """The largest |after - (before + attn + mlp)| of each layer, relative to the largest |after|."""
    with capture(model, [EMBEDDING, *model.anatomy.sites()]) as seen, torch.no_grad():
        model.model(ids())
    errors = []
    for layer in range(model.anatomy.layers):
        after = seen[Site("resid", layer)]
        total = seen[Site("resid", layer - 1)] + seen[Site("attn", layer)] + seen[Site("mlp", layer)]
        errors.append((after - total).abs().max() / after.abs().max())
    return torch.stack(errors)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stream_is_the_sum_of_its_contributions(family: str) -> None:
    model = tiny(family)
    assert identity_error(model).max() < 5e-7
    check_anatomy(model)
