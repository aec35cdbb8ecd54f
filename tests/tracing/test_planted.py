"""The point of it all: facts that one layer's MLP was trained to hold are found in that layer."""

from __future__ import annotations

import pytest
import torch
from tiny_tracing import LAYERS, tiny

from lm.model import LanguageModel
from tracing import Fact, GaussianNoise, choose_layers, trace


def planted(layer: int, seed: int) -> tuple[LanguageModel, list[Fact]]:
    """A random model of which only one layer's MLP was trained, on twelve made-up facts whose subject ends the prompt."""
    model = tiny("olmo", seed=seed)
    facts = [Fact(f"where is now w{n}", f"w{n}", f"w{(5 * n + 3) % 12 + 14}", id=f"w{n}") for n in range(12)]
    prompts = torch.tensor([model.tokenizer.encode(fact.prompt) for fact in facts])
    answers = torch.tensor([model.tokenizer.encode(fact.answer)[0] for fact in facts])
    trained = []
    for name, parameter in model.model.named_parameters():
        parameter.requires_grad_(name.startswith(f"model.layers.{layer}.mlp."))
        trained += [parameter] if parameter.requires_grad else []
    optimizer = torch.optim.Adam(trained, lr=2e-2)
    for _ in range(150):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model.model(prompts).logits[:, -1], answers).backward()
        optimizer.step()
    return model, facts


@pytest.mark.parametrize("layer", range(LAYERS))
def test_facts_are_found_in_the_one_layer_that_was_trained_to_hold_them(layer: int) -> None:
    model, facts = planted(layer, seed=1)
    effects = trace(
        model,
        facts,
        corruption=GaussianNoise(samples=5),
        kinds=["mlp", "attn"],
        positions="subject_and_last",
        progress=False,
    )
    assert not effects.skipped
    assert effects.total.mean() > 0.3
    plan = choose_layers(effects, size=1)
    assert plan.layers == (layer,)
    assert plan.singled_out, plan.verdict
    assert choose_layers(effects, size=1, kind="both").layers == (layer,)
