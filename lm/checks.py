"""Checks of a loaded model, each ending in one sentence: are its weights numbers, do its named parts add up, and are
positions turned as the family's are?

All are cheap beside loading. They say nothing about whether the model is any good.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from lm.anatomy import EMBEDDING, Site, module_at
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
            why = (
                "differ from the published architecture"
                if anatomy.known
                else "are not built as those of the known ones"
            )
            raise UserError(
                f"layer {layer} of this {anatomy.architecture} model is not resid_before + attn + mlp (off by "
                f"{float(off.max()):.2g}): its blocks {why}, so name their parts in KNOWN in lm/anatomy.py"
            )


@torch.no_grad()
def check_positions(model: LanguageModel) -> None:
    """Raise UserError if OLMo-3's layers with a sliding window have their positions rescaled (YaRN), as in some transformers.

    The published models rescale those of the layers with full attention alone: the others see 4,096 tokens, as in training.
    """
    config = model.model.config
    kinds = list(getattr(config, "layer_types", None) or ())
    if model.anatomy.architecture != "olmo3" or len(set(kinds)) < 2:
        return
    seen: dict[str, Tensor] = {}

    def keep(kind: str) -> Any:
        return lambda block, args, kwargs: seen.update({kind: kwargs["position_embeddings"][0]})

    handles = [
        module_at(model.model, model.anatomy.block_path(kinds.index(kind))).register_forward_pre_hook(
            keep(kind), with_kwargs=True
        )
        for kind in ("sliding_attention", "full_attention")
    ]
    try:
        model.model(input_ids=torch.arange(8, device=model.device)[None] % model.anatomy.vocabulary, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    angles = torch.arange(8)[:, None] * _frequencies(config)
    plain = torch.cat([angles, angles], dim=-1).cos()
    sliding, full = (seen[kind][0].float().cpu() for kind in ("sliding_attention", "full_attention"))
    if torch.equal(sliding, full) and not torch.allclose(sliding, plain, atol=1e-2):
        raise UserError(
            f"transformers {transformers.__version__} rescales positions (YaRN) in all layers of {model.name}, and OLMo-3 has "
            "that in the layers with full attention alone: pip install 'transformers>=5.13', or 4.57"
        )


def _frequencies(config: Any) -> Tensor:
    """(head width / 2,) angles a position, of rotary positions that are not rescaled."""
    told = getattr(config, "rope_parameters", None) or {}
    theta = (
        (told.get("sliding_attention") or told).get("rope_theta") or getattr(config, "rope_theta", None) or 500_000.0
    )
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    turned: Tensor = torch.arange(0, width, 2) / width
    return torch.pow(float(theta), -turned)
