"""Checks of a loaded model, each ending in one sentence: are its weights numbers, and do its named parts add up?

Both are cheap beside loading. They say nothing about whether the model is any good.
"""

from __future__ import annotations

import torch
from torch import nn

from lm.anatomy import EMBEDDING, Site
from lm.errors import UserError
from lm.forward.hooks import capture
from lm.model import LanguageModel


def check_weights(model: nn.Module, name: str) -> None:
    """Raise UserError naming the first parameter that is not loaded (on the meta device) or not finite."""
    for parameter, weight in model.named_parameters():
        if weight.is_meta:
            raise UserError(f"{name}: the weight {parameter} was not loaded: load the model whole, without offloading")
        # A sum is finite only if every element is, unless it overflows: then look again, element by element.
        if not torch.isfinite(weight.detach().sum(dtype=torch.float32)) and not torch.isfinite(weight.detach()).all():
            raise UserError(f"{name}: the weight {parameter} holds NaN or infinite values: use an undamaged checkpoint")


@torch.no_grad()
def check_anatomy(model: LanguageModel, *, tokens: int = 8, seed: int = 0) -> None:
    """Check `resid_after = resid_before + attn + mlp` in every layer on one random prompt.

    The tolerance is rounding: four times the machine epsilon of the activations' type, relative to the sum of the
    magnitudes of the three terms, element by element. Raises UserError naming the first layer where it fails.
    """
    anatomy = model.anatomy
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(anatomy.vocabulary, (1, tokens), generator=generator).to(model.device)
    training = model.model.training
    model.model.train(False)
    try:
        with capture(model, [EMBEDDING, *anatomy.sites()]) as seen:
            model.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    finally:
        model.model.train(training)
    for layer in range(anatomy.layers):
        sites = (Site("resid", layer - 1), Site("attn", layer), Site("mlp", layer))
        terms = torch.stack([seen[site].float() for site in sites])
        after = seen[Site("resid", layer)]
        if not bool(torch.isfinite(after).all()):
            raise UserError(
                f"layer {layer} overflows in {str(after.dtype).removeprefix('torch.')} on a random prompt: load the model "
                "with dtype bfloat16 or float32"
            )
        off = (after.float() - terms.sum(0)).abs()
        allowed = 4 * torch.finfo(after.dtype).eps * terms.abs().sum(0) + torch.finfo(after.dtype).tiny
        if not bool((off <= allowed).all()):
            raise UserError(
                f"layer {layer} of this {anatomy.architecture} model is not resid_before + attn + mlp (off by "
                f"{float(off.max()):.2g}): its blocks differ from the published architecture, so name their parts in "
                "KNOWN in lm/anatomy.py"
            )
