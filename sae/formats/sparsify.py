"""EleutherAI's sparsify: `cfg.json` and `sae.safetensors` in one folder a hookpoint. TopK autoencoders only.

The encoder is (latents, width) and reads `x - b_dec`; the decoder is (latents, width) too. `num_latents: 0` means the width
times `expansion_factor`. GroupMax, transcoders and skip connections are refused. SAELens reads these files wrongly (it
transposes the decoder), so they are read here from their own definition.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lm.errors import UserError
from sae.formats.files import Facts, Tensors, write_config
from sae.formats.files import write as write_tensors
from sae.formats.weights import Weights

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"


def read(folder: Path, scale: float | None) -> Weights:
    """See the package."""
    config = Facts.read(folder / CONFIG)
    activation = config.text("activation", "topk")
    for key, value in (("activation", activation != "topk"), *((key, config.flag(key, False)) for key in _REFUSED)):
        if value:
            raise UserError(
                f"{config.where} holds a sparse coder with {key} = {config.values[key]}, which this project cannot represent: "
                f"it reads autoencoders with activation topk, not transcoders"
            )
    hidden = config.whole("d_in")
    latents = config.whole("num_latents", 0) or hidden * config.whole("expansion_factor", 32)
    tensors = Tensors(folder / WEIGHTS)
    numbers = Weights(
        w_enc=tensors.take("encoder.weight", latents, hidden),
        b_enc=tensors.take("encoder.bias", latents),
        w_dec=tensors.take("W_dec", latents, hidden),
        b_dec=tensors.take("b_dec", hidden),
        rule="token",
        k=config.whole("k", 32),
        metadata=config.table("metadata", {}).values,
    )
    tensors.finish("load and save it with sparsify")
    return numbers if scale is None else numbers.with_scale(scale)


def write(numbers: Weights, folder: Path, metadata: dict[str, Any]) -> None:
    """Token choice only: sparsify knows no thresholds. The metadata stand under a key that it ignores."""
    if numbers.rule != "token" or numbers.input_norm != "none":
        what = f"{numbers.rule} choice" if numbers.rule != "token" else numbers.input_norm
        raise UserError(
            f"sparsify holds TopK autoencoders of plain inputs and this one has {what}: write it as saelens"
        )
    features, hidden = numbers.w_enc.shape
    config = {
        "activation": "topk",
        "expansion_factor": max(1, features // hidden),
        "normalize_decoder": True,
        "num_latents": features,
        "k": numbers.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": hidden,
        "metadata": {**numbers.metadata, **metadata},
    }
    tensors = {
        "encoder.weight": numbers.w_enc,
        "encoder.bias": numbers.b_enc,
        "W_dec": numbers.w_dec,
        "b_dec": numbers.b_dec,
    }
    write_config(folder / CONFIG, config)
    write_tensors(folder, WEIGHTS, tensors)


_REFUSED = ("transcode", "skip_connection", "signed")
