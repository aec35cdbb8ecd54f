"""A forward pass that stops at the deepest site: the same values, nothing called after it, nothing left behind."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, LAYERS, ids, tiny

from lm import EMBEDDING, Site, UserError, capture
from sae.activations import forward

MIDDLE = LAYERS // 2
CASES = [
    ([EMBEDDING], -1),
    ([Site("attn", MIDDLE)], MIDDLE),
    ([Site("mlp", MIDDLE), Site("attn", MIDDLE), Site("attn", 0)], MIDDLE),
    ([Site("resid", MIDDLE), EMBEDDING, Site("mlp", 0)], MIDDLE),
    ([Site("resid", LAYERS - 1)], LAYERS - 1),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_values_are_those_of_the_whole_forward_and_later_modules_are_not_called(family: str) -> None:
    model = tiny(family)
    tokens = ids()
    mask = torch.ones_like(tokens)
    called: list[str] = []
    names = [*(model.anatomy.block_path(layer) for layer in range(LAYERS)), model.anatomy.norm, model.anatomy.head]
    watchers = [
        model.model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: called.append(name))
        for name in names
    ]
    with torch.no_grad():
        before = model.model(tokens).logits
    first = names[-2:-1] * model.anatomy.names.norm_first
    for sites, deepest in CASES:
        with capture(model, sites) as whole, torch.no_grad():
            model.model(input_ids=tokens, attention_mask=mask, use_cache=False)
        called.clear()
        cut = forward(model, tokens, mask, sites)
        # Block 0 is entered, and left at once, for the embedding: a pre-hook of its own ends the pass.
        assert called == first + names[: max(deepest, 0) + 1]
        for site in sites:
            assert torch.equal(cut[site], whole[site]), (family, site)
            assert not cut[site].requires_grad
    for watcher in watchers:
        watcher.remove()
    with torch.no_grad():
        assert torch.equal(model.model(tokens).logits, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.model.modules())


def test_an_early_site_stops_inside_its_block() -> None:
    model = tiny("llama")
    called: list[str] = []
    model.model.get_submodule("model.layers.1.mlp").register_forward_hook(lambda *_: called.append("mlp"))
    forward(model, ids(), torch.ones_like(ids()), [Site("attn", 1)])
    assert not called
    forward(model, ids(), torch.ones_like(ids()), [Site("attn", 1)], cut=False)
    assert called


def test_training_mode_is_left_as_it_was_and_other_errors_pass() -> None:
    model = tiny("gpt2")
    model.model.train()
    forward(model, ids(), torch.ones_like(ids()), [Site("mlp", 1)])
    assert model.model.training

    def fail(*_: object) -> None:
        raise RuntimeError("broken")

    handle = model.model.get_submodule("transformer.h.0").register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="broken"):
        forward(model, ids(), torch.ones_like(ids()), [Site("mlp", 1)])
    handle.remove()
    assert not any(m._forward_hooks for m in model.model.modules())


def test_a_layer_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UserError, match="layer 9"):
        forward(tiny("llama"), ids(), torch.ones_like(ids()), [Site("mlp", 9)])
