"""dictionary_learning (Marks, Karvonen, Mueller): `config.json` and, here, `ae.safetensors` with the tensors of its `ae.pt`.

`AutoEncoder`, `AutoEncoderNew`, `AutoEncoderTopK`, `BatchTopKSAE`, `MatryoshkaBatchTopKSAE` and `JumpReluAutoEncoder` are read;
gated and identity dictionaries are refused. `ae.pt` is a pickle and is not read (see the package); it is written beside
`ae.safetensors`, with tensors only, because the library's own loader reads nothing else.
"""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lm.errors import UserError
from lm.run_folder import write_atomic
from sae.formats.files import Facts, Tensors, write_config
from sae.formats.files import write as write_tensors
from sae.formats.weights import Weights

CONFIG, WEIGHTS, PICKLE = "config.json", "ae.safetensors", "ae.pt"
CONVERT = (
    "import torch, safetensors.torch as s; d = torch.load('ae.pt', map_location='cpu', weights_only=True); "
    "s.save_file({n: t.contiguous().clone() for n, t in d.items()}, 'ae.safetensors')"
)
"""What the owner of an `ae.pt` runs once, in its folder, with `python -c`."""


def read(folder: Path, scale: float | None) -> Weights:
    """See the package."""
    config = Facts.read(folder / CONFIG)
    trainer = config.table("trainer")
    kind = trainer.text("dict_class")
    hidden, features = trainer.whole("activation_dim", None), trainer.whole("dict_size", None)
    tensors = Tensors(folder / WEIGHTS)
    facts = config.table("metadata", {}).values or _facts(trainer)
    if kind in ("AutoEncoder", "AutoEncoderNew", "AutoEncoderTopK", "BatchTopKSAE"):
        bias = {"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias"}.get(kind, "b_dec")
        w_enc = tensors.take("encoder.weight", features, hidden)
        w_dec = tensors.take("decoder.weight", hidden, features).T
        b_enc = tensors.take("encoder.bias", len(w_enc))
    elif kind in ("MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder"):
        bias = "b_dec"
        w_enc = tensors.take("W_enc", hidden, features).T
        w_dec = tensors.take("W_dec", features, hidden)
        b_enc = tensors.take("b_enc", len(w_enc))
    else:
        raise UserError(
            f"{config.where} holds a {kind}, which this project cannot represent: it reads AutoEncoder, AutoEncoderNew, "
            f"AutoEncoderTopK, BatchTopKSAE, MatryoshkaBatchTopKSAE and JumpReluAutoEncoder; take one of these"
        )
    b_dec = tensors.take(bias, w_enc.shape[1])
    if w_dec.shape != w_enc.shape:
        raise UserError(f"{folder / WEIGHTS} has encoder and decoder of different sizes: it is damaged")
    numbers = Weights(w_enc=w_enc, b_enc=b_enc, w_dec=w_dec, b_dec=b_dec, rule="threshold", metadata=facts)
    numbers = _ruled(numbers, kind, trainer, tensors)
    tensors.drop(["group_sizes"] if kind == "MatryoshkaBatchTopKSAE" else [])
    tensors.finish("load and save it with dictionary_learning")
    if kind in ("AutoEncoderNew", "JumpReluAutoEncoder"):
        numbers = numbers.with_pre_bias()
    norms = w_dec.norm(dim=1)
    if kind == "AutoEncoder" and not torch.allclose(norms, torch.ones_like(norms)):
        numbers = (
            numbers.with_decoder_norms()
        )  # as the library's loader does: its April trainer leaves rows of any length
    return numbers if scale is None else numbers.with_scale(scale)


def write(numbers: Weights, folder: Path, metadata: dict[str, Any]) -> None:
    """TopK, one threshold (`BatchTopKSAE`), one a feature (`JumpReluAutoEncoder`) or none (`AutoEncoder`)."""
    if numbers.input_norm != "none":
        raise UserError(
            f"dictionary_learning knows no {numbers.input_norm} and this autoencoder has it: write it as saelens"
        )
    kind, trained_by, tensors = _layout(numbers)
    facts = {**numbers.metadata, **metadata}
    features, hidden = numbers.w_enc.shape
    config = {
        "trainer": {
            "trainer_class": trained_by,
            "dict_class": kind,
            "activation_dim": hidden,
            "dict_size": features,
            **({"k": numbers.k} if kind in ("AutoEncoderTopK", "BatchTopKSAE") else {}),
            "layer": facts.get("hook_layer"),
            "lm_name": facts.get("model_name"),
            "submodule_name": facts.get("hf_hook_name"),
        },
        "buffer": {"d_submodule": hidden, "io": "out", "ctx_len": facts.get("context_size")},
        "metadata": facts,
    }
    write_config(folder / CONFIG, config)
    write_tensors(folder, WEIGHTS, tensors)
    pickled = io.BytesIO()
    torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, pickled)
    write_atomic(folder / PICKLE, pickled.getvalue())


def _ruled(numbers: Weights, kind: str, trainer: Facts, tensors: Tensors) -> Weights:
    """Which features are active: `AutoEncoderTopK` ignores its threshold, the batch forms use theirs and not k."""
    features = len(numbers.b_enc)
    if kind in ("AutoEncoder", "AutoEncoderNew"):
        return replace(numbers, threshold=torch.zeros(features))
    if kind == "JumpReluAutoEncoder":
        return replace(numbers, threshold=tensors.take("threshold", features, finite=False))
    stored, threshold = int(tensors.take("k")), tensors.take("threshold", finite=False)
    k = trainer.whole("k", stored)
    if k != stored:
        raise UserError(
            f"{tensors.path} says k = {stored} and {trainer.where} {k}: they belong to different autoencoders"
        )
    if kind == "AutoEncoderTopK":
        return replace(numbers, rule="token", k=k)
    return replace(numbers, rule="mutual", k=k, threshold=threshold.expand(features))


def _layout(numbers: Weights) -> tuple[str, str, dict[str, Tensor]]:
    """The class, the trainer that makes such, and the tensors."""
    linear = {"encoder.weight": numbers.w_enc, "encoder.bias": numbers.b_enc, "decoder.weight": numbers.w_dec.T}
    k, threshold = torch.tensor(numbers.k, dtype=torch.int), numbers.threshold
    if threshold is None:
        rest = {"b_dec": numbers.b_dec, "k": k, "threshold": torch.tensor(-1.0)}
        return "AutoEncoderTopK", "TopKTrainer", {**linear, **rest}
    single = float(threshold[0])
    if numbers.k and bool((threshold == single).all()):
        rest = {"b_dec": numbers.b_dec, "k": k, "threshold": torch.tensor(single)}
        return "BatchTopKSAE", "BatchTopKTrainer", {**linear, **rest}
    if numbers.is_relu:
        return "AutoEncoder", "StandardTrainer", {**linear, "bias": numbers.b_dec}
    plain = {
        "W_enc": numbers.w_enc.T,
        "b_enc": numbers.folded_pre_bias(),
        "W_dec": numbers.w_dec,
        "b_dec": numbers.b_dec,
    }
    return "JumpReluAutoEncoder", "JumpReluTrainer", {**plain, "threshold": threshold.float()}


def _facts(trainer: Facts) -> dict[str, Any]:
    names = {"lm_name": "model_name", "layer": "hook_layer", "submodule_name": "submodule_name"}
    return {new: trainer.values[old] for old, new in names.items() if trainer.values.get(old) is not None}
