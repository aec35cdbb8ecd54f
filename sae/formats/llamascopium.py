"""OpenMOSS' llamascopium (Language-Model-SAEs): `config.json` and `sae_weights.safetensors` with `W_E`, `b_E`, `W_D`, `b_D`.

Its encoder reads x itself, and by default its activation looks at `z |W_D,i|`; both are folded. `dataset-wise` files hold
the mean norm of the activations, which stand for a constant scale: folded with the thresholds. `token-wise` is the
`token_norm` here. `batchtopk` has no thresholds, so it is read as mutual choice without: calibrate before evaluation.
GLU encoders, batch-wise norms, transcoders (hook points that differ) and everything that is not `sae` are refused.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lm.errors import UserError
from sae.formats.files import Facts, Tensors, write_config
from sae.formats.files import write as write_tensors
from sae.formats.weights import Weights
from sae.model_config import InputNorm, Rule

CONFIG, WEIGHTS = "config.json", "sae_weights.safetensors"
_NORM, _THRESHOLD = "dataset_average_activation_norm.", "activation_function.log_jumprelu_threshold"
_RULES: dict[str, Rule] = {"relu": "threshold", "jumprelu": "threshold", "topk": "token", "batchtopk": "mutual"}
_NORMS: dict[str, InputNorm] = {"inference": "none", "dataset-wise": "none", "token-wise": "token_norm"}


def read(folder: Path, scale: float | None) -> Weights:
    """See the package."""
    config = Facts.read(folder / CONFIG)
    act, norm = config.text("act_fn", "relu").lower(), config.text("norm_activation", "dataset-wise")
    here, there = config.text("hook_point_in"), config.text("hook_point_out")
    for what, bad in (
        (f"sae_type {config.text('sae_type')}", config.text("sae_type") != "sae"),
        (f"act_fn {act}", act not in _RULES),
        (f"norm_activation {norm}", norm not in _NORMS),
        ("a GLU encoder", config.flag("use_glu_encoder", False)),
        (f"other hook points in and out ({here}, {there}), a transcoder", here != there),
    ):
        if bad:
            raise UserError(
                f"{config.where} has {what}, which this project cannot represent: it reads plain autoencoders"
            )
    hidden = config.whole("d_model")
    features = int(hidden * config.number("expansion_factor"))
    tensors = Tensors(folder / WEIGHTS)
    numbers = Weights(
        w_enc=tensors.take("W_E", hidden, features).T,
        b_enc=tensors.take("b_E", features),
        w_dec=tensors.take("W_D", features, hidden),
        b_dec=tensors.take("b_D", hidden) if config.flag("use_decoder_bias", True) else torch.zeros(hidden),
        rule=_RULES[act],
        k=config.whole("top_k", 50) if act.endswith("topk") else 0,
        threshold=_threshold(act, tensors, features),
        input_norm=_NORMS[norm],
        metadata={"hook_name": here, **config.table("metadata", {}).values},
    )
    if norm == "dataset-wise" and scale is None:
        norm_of_data = float(tensors.take(_NORM + here))
        if not norm_of_data > 0:
            raise UserError(f"{tensors.path} has an average activation norm of {norm_of_data}: the file is damaged")
        scale = math.sqrt(hidden) / norm_of_data
    tensors.drop([name for name in tensors.names() if name.startswith(_NORM)])
    tensors.finish("load and save it with llamascopium")
    if config.flag("sparsity_include_decoder_norm", True):
        numbers = numbers.with_decoder_norms()
    numbers = numbers.with_pre_bias()
    return numbers if scale is None else numbers.with_scale(scale)


def write(numbers: Weights, folder: Path, metadata: dict[str, Any]) -> None:
    """Thresholds as `jumprelu` (their logarithms), token choice as `topk`; `inference`: nothing is left to fold."""
    if numbers.input_norm == "layer_norm":
        raise UserError("llamascopium has no layer norm of the input and this autoencoder has one: write it as saelens")
    facts = {**numbers.metadata, **metadata}
    hook = facts["hook_name"] if isinstance(facts.get("hook_name"), str) else "unknown"
    features, hidden = numbers.w_enc.shape
    act = "topk" if numbers.rule == "token" else "relu" if numbers.is_relu else "jumprelu"
    config = {
        "sae_type": "sae",
        "d_model": hidden,
        "expansion_factor": _factor(features, hidden),
        "use_decoder_bias": True,
        "act_fn": act,
        "norm_activation": "token-wise" if numbers.input_norm == "token_norm" else "inference",
        "sparsity_include_decoder_norm": False,
        "top_k": numbers.k or 50,
        "hook_point_in": hook,
        "hook_point_out": hook,
        "use_glu_encoder": False,
        "metadata": facts,
    }
    tensors: dict[str, Tensor] = {
        "W_E": numbers.w_enc.T,
        "b_E": numbers.folded_pre_bias(),
        "W_D": numbers.w_dec,
        "b_D": numbers.b_dec,
        f"{_NORM}{hook}": torch.tensor(math.sqrt(hidden)),
    }
    if act == "jumprelu" and numbers.threshold is not None:
        tensors[_THRESHOLD] = numbers.threshold.clamp(min=0).log()
    write_config(folder / CONFIG, config)
    write_tensors(folder, WEIGHTS, tensors)


def _threshold(act: str, tensors: Tensors, features: int) -> Tensor | None:
    if act == "jumprelu":
        return tensors.take(_THRESHOLD, features, finite=False).double().exp()
    return torch.zeros(features) if act == "relu" else None


def _factor(features: int, hidden: int) -> float:
    """A number whose product with the width, cut to a whole number as the reader does, is the number of features."""
    factor = features / hidden
    return factor if int(hidden * factor) == features else math.nextafter(factor, math.inf)
