"""Every part of a forward pass gives, bit for bit, what the whole pass gives there."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, ids, tiny
from torch import nn

from lm.anatomy import Site
from lm.forward.hooks import capture
from lm.forward.partial import backbone, forward_replaced, head_logits, starting_with, up_to
from lm.model import LanguageModel

IDS = ids(2, 7)
INPUTS = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


def calls(model: LanguageModel) -> list[int]:
    """A list that grows by the number of every block that runs."""
    seen: list[int] = []
    blocks = model.model.get_submodule(model.anatomy.blocks)
    assert isinstance(blocks, nn.ModuleList)
    for layer, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda *_, layer=layer: seen.append(layer))
    return seen


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_parts_equal_the_whole(family: str) -> None:
    model = tiny(family)
    with capture(model, [Site("resid", 0), Site("resid", 1), Site("resid", 2)]) as seen:
        logits = model.model(**INPUTS).logits
    found = backbone(model, **INPUTS)
    assert found.last_hidden_state is not None
    few = found.last_hidden_state.flatten(0, 1)[[3, 11, 5]]
    torch.testing.assert_close(head_logits(model, found, few), logits.flatten(0, 1)[[3, 11, 5]], rtol=1e-5, atol=1e-5)
    ran = calls(model)
    for layer in range(3):
        ran.clear()
        with up_to(model, layer):
            assert torch.equal(backbone(model, **INPUTS).last_hidden_state, seen[Site("resid", layer)])
        assert ran == list(range(layer + 1))
    ran.clear()
    with starting_with(model, 1, seen[Site("resid", 0)]):
        assert torch.equal(backbone(model, **INPUTS).last_hidden_state, found.last_hidden_state)
    assert ran == [1, 2]
    ran.clear()
    with up_to(model, 1), starting_with(model, 1, seen[Site("resid", 0)]):
        assert torch.equal(backbone(model, **INPUTS).last_hidden_state, seen[Site("resid", 1)])
    assert ran == [1]
    assert torch.equal(model.model(**INPUTS).logits, logits), "everything is where it was"


@torch.no_grad()
def test_the_heads_own_parameters_can_be_others_for_a_moment() -> None:
    model = tiny("olmo")
    found = backbone(model, **INPUTS)
    assert found.last_hidden_state is not None
    hidden = found.last_hidden_state[0]
    own = model.model.get_submodule(model.anatomy.head).weight
    other = torch.randn(own.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(head_logits(model, found, hidden, {"weight": other}), hidden @ other.T)
    assert model.model.get_submodule(model.anatomy.head).weight is own


def test_other_work_runs_between_the_models_hooks_and_errors_leave_nothing_behind() -> None:
    model = tiny("llama")
    order: list[str] = []
    model.model.register_forward_pre_hook(lambda *_: order.append("before"))
    model.model.register_forward_hook(lambda *_: order.append("after"))
    with forward_replaced(model.model, lambda **_: order.append("work")):
        model.model(input_ids=IDS)
    assert order == ["before", "work", "after"]
    with pytest.raises(ZeroDivisionError), up_to(model, 0), forward_replaced(model.model, lambda **_: 1 // 0):
        model.model(input_ids=IDS)
    assert model.model(**INPUTS).logits.shape[-1] == model.anatomy.vocabulary
