"""SAELens: `cfg.json` and `sae_weights.safetensors`, the layout of version 6 and the flat one before it. Also the native file.

Read are `standard`, `topk` and `jumprelu` (what BatchTopK is exported as). Encoders that do not subtract the decoder bias,
selection on decoder norms and a known constant scale are folded; gated, absolute TopK, matching pursuit, temporal and
transcoder files are refused, for the module cannot hold them.
"""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

from lm.errors import UserError
from sae.formats.files import Facts, Tensors, check_config, write_config
from sae.formats.files import write as write_tensors
from sae.formats.weights import Weights
from sae.model_config import InputNorm, Rule

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
NORMS = {"none": "none", "layer_norm": "layer_norm", "token_norm": "constant_norm_rescale"}
"""How SAELens spells `input_norm`."""
OWN = ("training_architecture", "autoencoder", "input_variance", "sae_lens_version")
"""The metadata that a file of ours states itself. The version is that of SAELens' layout; without it, it reads an older."""
_LAYOUT = "6.0.0"
SCALER = "activation_scaler.json"
KEYS = (
    "model_name",
    "hook_name",
    "hook_layer",
    "hook_head_index",
    "model_class_name",
    "model_from_pretrained_kwargs",
    "prepend_bos",
    "exclude_special_tokens",
    "neuronpedia_id",
    "context_size",
    "seqpos_slice",
    "dataset_path",
    "sae_lens_training_version",
    "hf_hook_name",
)
"""Metadata that stood flat in the old layout. (`hook_layer` is no longer known to SAELens but survives.)"""


def read(folder: Path, scale: float | None) -> Weights:
    """Either layout; see the package."""
    config = Facts.read(folder / CONFIG)
    new = "metadata" in config
    facts = config.table("metadata") if new else _flat_metadata(config)
    architecture, k = _architecture(config, new)
    if config.text("reshape_activations", "none") != "none":
        raise UserError(
            f"{folder} reads activations reshaped ({config.text('reshape_activations')}): its input is no residual "
            "contribution, use SAELens for it"
        )
    hidden, features = config.whole("d_in"), config.whole("d_sae")
    tensors = Tensors(folder / WEIGHTS)
    numbers = Weights(
        w_enc=tensors.take("W_enc", hidden, features).T,
        b_enc=tensors.take("b_enc", features),
        w_dec=tensors.take("W_dec", features, hidden),
        b_dec=tensors.take("b_dec", hidden),
        rule="token" if architecture == "topk" else "threshold",
        k=k,
        metadata={name: value for name, value in facts.values.items() if name not in OWN},
        input_norm=_normalization(config),
    )
    if architecture == "jumprelu":
        numbers = replace(numbers, threshold=tensors.take("threshold", features, finite=False))
    elif architecture == "standard":
        numbers = replace(numbers, threshold=numbers.b_enc.new_zeros(features))
    for name in ("scaling_factor", "finetuning_scaling_factor"):
        if name in tensors.names() and not bool((tensors.take(name, features) == 1).all()):
            raise UserError(
                f"{folder / WEIGHTS} scales its features by {name}, which is not supported: fold it into W_dec"
            )
    tensors.finish("load it with SAELens and save its inference form")
    if config.flag("rescale_acts_by_decoder_norm", False) and architecture == "topk":
        numbers = numbers.with_decoder_norms()
    if not config.flag("apply_b_dec_to_input", True):
        numbers = numbers.with_pre_bias()
    numbers = _scaled(numbers, config, folder, scale)
    return _with_own_facts(numbers, facts) if "autoencoder" in facts else numbers


def write(numbers: Weights, folder: Path, metadata: dict[str, Any]) -> None:
    """The layout of version 6: the native file, as `SparseAutoencoder.save_pretrained` describes it."""
    taken = set(OWN) & set(metadata)
    if taken:
        raise UserError(f"the metadata names {', '.join(sorted(taken))} are the file's own: use other names")
    token = numbers.rule == "token"
    relu = numbers.rule == "threshold" and numbers.is_relu
    architecture = "topk" if token else "standard" if relu else "jumprelu"
    tensors = {"W_enc": numbers.w_enc.T, "b_enc": numbers.b_enc, "W_dec": numbers.w_dec, "b_dec": numbers.b_dec}
    if architecture == "jumprelu" and numbers.threshold is not None:
        tensors["threshold"] = numbers.threshold
    own = numbers.config
    config = {
        "architecture": architecture,
        "d_in": own.hidden,
        "d_sae": own.features,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": NORMS[own.input_norm],
        "reshape_activations": "none",
        **({"k": own.k, "rescale_acts_by_decoder_norm": False} if token else {}),
        "metadata": {
            **numbers.metadata,
            **metadata,
            "sae_lens_version": _LAYOUT,
            "training_architecture": f"{own.choice}_choice",
            "autoencoder": asdict(own),
            "input_variance": None if math.isnan(numbers.variance) else numbers.variance,
        },
    }
    check_config(config)
    write_tensors(folder, WEIGHTS, tensors)
    write_config(folder / CONFIG, config)


def write_old(numbers: Weights, folder: Path, metadata: dict[str, Any]) -> None:
    """The flat layout before version 6, for tools that know no other; the tensors are the same."""
    write(numbers, folder, metadata)
    config = Facts.read(folder / CONFIG).values
    facts = config.pop("metadata")
    flat = {
        **config,
        "activation_fn_str": "topk" if config["architecture"] == "topk" else "relu",
        "activation_fn_kwargs": {"k": config["k"]} if config["architecture"] == "topk" else {},
        "architecture": "standard" if config["architecture"] == "topk" else config["architecture"],
        "finetuning_scaling_factor": False,
        "sae_lens_training_version": None,
        **{name: value for name, value in facts.items() if name not in OWN},
    }
    write_config(folder / CONFIG, flat)


def _flat_metadata(config: Facts) -> Facts:
    names = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index", "hook_point_layer": "hook_layer"}
    values = {names.get(name, name): value for name, value in config.values.items()}
    return Facts(where=config.where, values={name: values[name] for name in KEYS if name in values})


_IN_TRAINING = ("batchtopk", "matryoshka_batchtopk")
"""What SAELens trains and saves for inference as another architecture."""


def _architecture(config: Facts, new: bool) -> tuple[str, int]:
    """`standard`, `topk` or `jumprelu`, and k for TopK (0 otherwise)."""
    architecture = config.text("architecture", "standard")
    activation = "relu" if new else config.text("activation_fn_str", config.text("activation_fn", "relu"))
    if not new and architecture in ("standard", "topk") and activation == "topk":
        return "topk", config.table("activation_fn_kwargs").whole("k")
    if architecture not in ("standard", "topk", "jumprelu") or activation != "relu":
        what = architecture if activation == "relu" else f"{architecture} with {activation}"
        reads = f"{config.where} holds a {what} autoencoder, which this project cannot represent: it reads standard, topk and"
        if architecture in _IN_TRAINING:
            raise UserError(
                f"{reads} jumprelu; this is a training checkpoint, save its inference form with SAELens first"
            )
        raise UserError(f"{reads} jumprelu; take an autoencoder of one of these, or use this one with SAELens")
    if config.flag("finetuning_scaling_factor", False):
        raise UserError(
            f"{config.where} scales its features after training, which is not supported: fold it into W_dec"
        )
    return architecture, config.whole("k") if architecture == "topk" else 0


def _normalization(config: Facts) -> InputNorm:
    spelled = _spelled(config)
    by_name = {name: norm for norm, name in NORMS.items()}
    if spelled in by_name:
        return cast(InputNorm, by_name[spelled])
    if spelled == "expected_average_only_in":
        return "none"
    raise UserError(
        f"{config.where} normalizes its input by {spelled}, which is not supported: fold it with SAELens first"
    )


def _spelled(config: Facts) -> str:
    if isinstance(config.values.get("normalize_activations"), bool):
        return "expected_average_only_in" if config.flag("normalize_activations") else "none"
    return config.text("normalize_activations", "none")


def _scaled(numbers: Weights, config: Facts, folder: Path, scale: float | None) -> Weights:
    if _spelled(config) == "expected_average_only_in" and scale is None:
        if not (folder / SCALER).is_file():
            raise UserError(
                f"{config.where} was trained on activations times a constant that the file does not hold: give it as "
                f"scale=..., or scale=1.0 if it was folded in already"
            )
        scale = Facts.read(folder / SCALER).number("scaling_factor")
    return numbers if scale is None else numbers.with_scale(scale)


def _with_own_facts(numbers: Weights, facts: Facts) -> Weights:
    """What our own writer stated, as far as it agrees with the rest of the file, which another tool may have rewritten."""
    own = facts.table("autoencoder")
    rule = own.text("choice")
    if rule not in ("token", "feature", "mutual", "threshold") or (rule == "token") != (numbers.rule == "token"):
        return numbers
    variance = facts.number("input_variance") if "input_variance" in facts else numbers.variance
    if numbers.rule == "token":
        return replace(numbers, seed=own.whole("seed", 0), variance=variance)
    return replace(numbers, rule=cast(Rule, rule), k=own.whole("k"), seed=own.whole("seed", 0), variance=variance)
