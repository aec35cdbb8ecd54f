"""What other tools' files mean, worked out from the files alone (json and safetensors): dense, without this project's code."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor


def keep_top(z: Tensor, k: int) -> Tensor:
    top = z.topk(k, dim=1)
    return torch.zeros_like(z).scatter(1, top.indices, top.values.relu())


def by_saelens(folder: Path, x: Tensor) -> Tensor:
    cfg, w = json.loads((folder / "cfg.json").read_text()), load_file(folder / "sae_weights.safetensors")
    norm, back = cfg.get("normalize_activations", "none"), lambda y: y
    if norm == "layer_norm":
        mu, std = x.mean(-1, keepdim=True), (x - x.mean(-1, keepdim=True)).std(-1, keepdim=True)
        x, back = (x - mu) / (std + 1e-5), lambda y: y * std + mu
    elif norm == "constant_norm_rescale":
        rescale = x.shape[1] ** 0.5 / x.norm(dim=-1, keepdim=True)
        x, back = x * rescale, lambda y: y / rescale
    z = (x - w["b_dec"] * cfg.get("apply_b_dec_to_input", True)) @ w["W_enc"] + w["b_enc"]
    norms = w["W_dec"].norm(dim=-1) if cfg.get("rescale_acts_by_decoder_norm") else torch.ones(len(w["W_dec"]))
    topk = cfg.get("architecture") == "topk" or cfg.get("activation_fn_str") == "topk"
    if topk:
        acts = keep_top(z * norms, cfg["k"] if "k" in cfg else cfg["activation_fn_kwargs"]["k"]) / norms
    elif cfg.get("architecture") == "jumprelu":
        acts = z.relu() * (z > w["threshold"])
    else:
        acts = z.relu()
    return back(acts @ w["W_dec"] + w["b_dec"])


def by_sparsify(folder: Path, x: Tensor) -> Tensor:
    cfg, w = json.loads((folder / "cfg.json").read_text()), load_file(folder / "sae.safetensors")
    latents = cfg["num_latents"] or cfg["d_in"] * cfg["expansion_factor"]
    assert w["encoder.weight"].shape == w["W_dec"].shape == (latents, cfg["d_in"])
    z = (x - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"]
    return keep_top(z.relu(), cfg["k"]) @ w["W_dec"] + w["b_dec"]


def by_dictionary_learning(folder: Path, x: Tensor) -> Tensor:
    kind = json.loads((folder / "config.json").read_text())["trainer"]["dict_class"]
    w = load_file(folder / "ae.safetensors")
    if kind == "AutoEncoder":
        return ((x - w["bias"]) @ w["encoder.weight"].T + w["encoder.bias"]).relu() @ w["decoder.weight"].T + w["bias"]
    if kind == "AutoEncoderNew":
        return (x @ w["encoder.weight"].T + w["encoder.bias"]).relu() @ w["decoder.weight"].T + w["decoder.bias"]
    if kind == "JumpReluAutoEncoder":
        z = x @ w["W_enc"] + w["b_enc"]
        return (z * (z > w["threshold"])).relu() @ w["W_dec"] + w["b_dec"]
    if kind == "MatryoshkaBatchTopKSAE":
        z = ((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
        return (z * (z > w["threshold"])) @ w["W_dec"] + w["b_dec"]
    z = ((x - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"]).relu()
    acts = keep_top(z, int(w["k"])) if kind == "AutoEncoderTopK" else z * (z > w["threshold"])
    return acts @ w["decoder.weight"].T + w["b_dec"]


def by_openai(folder: Path, x: Tensor) -> Tensor:
    with safe_open(folder / "autoencoder.safetensors", framework="pt") as file:
        info, w = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    back: Callable[[Tensor], Tensor] = lambda y: y  # noqa: E731
    if info["activation"] == "TopK":
        mu = x.mean(-1, keepdim=True)
        std = (x - mu).std(-1, keepdim=True)
        x, back = (x - mu) / (std + 1e-5), lambda y: y * std + mu
    z = (x - w["pre_bias"]) @ w["encoder.weight"].T + w["latent_bias"]
    acts = keep_top(z, int(info["k"])) if info["activation"] == "TopK" else z.relu()
    return back(acts @ w["decoder.weight"].T + w["pre_bias"])


def by_llamascopium(folder: Path, x: Tensor) -> Tensor:
    cfg, w = json.loads((folder / "config.json").read_text()), load_file(folder / "sae_weights.safetensors")
    rescale: Tensor | float = 1.0
    if cfg["norm_activation"] == "dataset-wise":
        rescale = math.sqrt(x.shape[1]) / float(w[f"dataset_average_activation_norm.{cfg['hook_point_in']}"])
    elif cfg["norm_activation"] == "token-wise":
        rescale = math.sqrt(x.shape[1]) / x.norm(dim=-1, keepdim=True)
    z = (x * rescale) @ w["W_E"] + w["b_E"]
    norms = w["W_D"].norm(dim=1) if cfg.get("sparsity_include_decoder_norm", True) else torch.ones(len(w["W_D"]))
    z = z * norms
    if cfg["act_fn"] == "topk":
        acts = keep_top(z.relu(), cfg["top_k"])
    elif cfg["act_fn"] == "jumprelu":
        acts = z * (z > w["activation_function.log_jumprelu_threshold"].exp())
    elif cfg["act_fn"] == "batchtopk":
        acts = z * (z >= z.relu().flatten().topk(cfg["top_k"] * len(x)).values[-1])
    else:
        acts = z.relu()
    return (acts / norms @ w["W_D"] + w.get("b_D", 0)) / rescale


DEFINITIONS = {
    "saelens": by_saelens,
    "saelens5": by_saelens,
    "sparsify": by_sparsify,
    "dictionary_learning": by_dictionary_learning,
    "openai": by_openai,
    "llamascopium": by_llamascopium,
}
