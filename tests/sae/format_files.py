"""Small autoencoders of this project, and other tools' files written by hand in plain tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sae import SparseAutoencoder, SparseAutoencoderConfig, calibrate_features, calibrate_mutual
from sae.formats import Format

D, F, K = 6, 20, 3
Files = tuple[dict[str, Any], dict[str, Tensor]]


def rand(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def sample(tokens: int = 40) -> Tensor:
    return rand(tokens, D, seed=99, scale=2.0) + 0.7


def encoder() -> dict[str, Tensor]:
    """(d, M) encoder, (M, d) decoder of uneven norms, and biases that matter."""
    return {
        "W_enc": rand(D, F, seed=1),
        "b_enc": rand(F, seed=2, scale=0.3),
        "W_dec": rand(F, D, seed=3) * (0.5 + torch.rand(F, 1, generator=torch.Generator().manual_seed(4))),
        "b_dec": rand(D, seed=5),
    }


def own(choice: str, **more: Any) -> SparseAutoencoder:
    k = 0 if choice == "threshold" else K
    model = SparseAutoencoder(SparseAutoencoderConfig(hidden=D, features=F, k=k, choice=choice, seed=1, **more))  # type: ignore[arg-type]
    model.start_from(sample(200))
    with torch.no_grad():
        model.w_enc += rand(F, D, seed=11, scale=0.3)
        model.b_enc += rand(F, seed=12, scale=0.3)
        affinity = model.affinity(sample(200))
    if choice == "mutual":
        model.set_threshold(calibrate_mutual(affinity, k=K))
    elif choice == "feature":
        model.set_threshold(calibrate_features(affinity, K * 200 // F))
    elif choice == "threshold":
        model.set_threshold(torch.linspace(0, 1, F))
    return model.eval()


def put(folder: Path, config: str, weights: str, files: Files) -> Path:
    (folder / config).write_text(json.dumps(files[0]))
    save_file({name: tensor.contiguous() for name, tensor in files[1].items()}, folder / weights)
    return folder


def saelens(folder: Path, *, threshold: bool = False, **changes: Any) -> Path:
    cfg = {
        "architecture": "standard",
        "d_in": D,
        "d_sae": F,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.54.12", "hook_name": "blocks.2.hook_resid_post", "odd": [1, {"a": None}]},
        **changes,
    }
    weights = encoder()
    if threshold:
        weights["threshold"] = torch.linspace(-0.5, 2, F)
    return put(folder, "cfg.json", "sae_weights.safetensors", (cfg, weights))


def saelens5(folder: Path, **changes: Any) -> Path:
    cfg = {"d_in": D, "d_sae": F, "dtype": "float32", "hook_name": "blocks.1.hook_mlp_out", "hook_layer": 1, **changes}
    return put(folder, "cfg.json", "sae_weights.safetensors", (cfg, encoder()))


def sparsify(folder: Path, **changes: Any) -> Path:
    w = encoder()
    cfg = {"activation": "topk", "expansion_factor": 32, "num_latents": F, "k": K, "d_in": D, **changes}
    tensors = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "W_dec": w["W_dec"], "b_dec": w["b_dec"]}
    if cfg["num_latents"] == 0:
        rows = D * cfg["expansion_factor"]
        tensors |= {name: tensors[name][:rows] for name in ("encoder.weight", "encoder.bias", "W_dec")}
    return put(folder, "cfg.json", "sae.safetensors", (cfg, tensors))


def dictionaries(folder: Path, kind: str) -> Path:
    w = encoder()
    linear = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "decoder.weight": w["W_dec"].T}
    batch = {"k": torch.tensor(K, dtype=torch.int32), "threshold": torch.tensor(0.8)}
    tensors = {
        "AutoEncoder": {**linear, "bias": w["b_dec"]},
        "AutoEncoderNew": {**linear, "decoder.bias": w["b_dec"]},
        "AutoEncoderTopK": {**linear, **batch, "b_dec": w["b_dec"]},
        "BatchTopKSAE": {**linear, **batch, "b_dec": w["b_dec"]},
        "MatryoshkaBatchTopKSAE": {**w, **batch, "group_sizes": torch.tensor([4, F - 4])},
        "JumpReluAutoEncoder": {**w, "threshold": torch.linspace(0, 2, F)},
        "GatedAutoEncoder": linear,
    }[kind]
    trainer = {"dict_class": kind, "activation_dim": D, "dict_size": F, "layer": 3, "lm_name": "m", "k": K}
    return put(folder, "config.json", "ae.safetensors", ({"trainer": trainer, "buffer": {}}, tensors))


def openais(folder: Path, info: dict[str, str]) -> Path:
    w = encoder()
    tensors = {
        "pre_bias": w["b_dec"],
        "latent_bias": w["b_enc"],
        "encoder.weight": w["W_enc"].T.contiguous(),
        "decoder.weight": w["W_dec"].T.contiguous(),
        "stats_last_nonzero": torch.zeros(F, dtype=torch.long),
        "latents_activation_frequency": torch.ones(F),
        "latents_mean_square": torch.zeros(F),
    }
    save_file(tensors, folder / "autoencoder.safetensors", info)
    return folder


def llamascopium(folder: Path, **changes: Any) -> Path:
    w = encoder()
    hook = "blocks.2.hook_resid_post"
    cfg = {
        "sae_type": "sae",
        "d_model": D,
        "expansion_factor": F / D,
        "act_fn": "relu",
        "norm_activation": "dataset-wise",
        "top_k": K,
        "hook_point_in": hook,
        "hook_point_out": hook,
        **changes,
    }
    tensors = {"W_E": w["W_enc"], "b_E": w["b_enc"], "W_D": w["W_dec"], "b_D": w["b_dec"]}
    tensors[f"dataset_average_activation_norm.{hook}"] = torch.tensor(5.0)
    if cfg["act_fn"] == "jumprelu":
        tensors["activation_function.log_jumprelu_threshold"] = torch.linspace(-2, 1, F)
    if cfg.get("use_decoder_bias") is False:
        del tensors["b_D"]
    return put(folder, "config.json", "sae_weights.safetensors", (cfg, tensors))


FOREIGN: dict[str, tuple[Format, Callable[[Path], Path]]] = {
    "saelens standard": ("saelens", saelens),
    "saelens not applied b_dec": ("saelens", lambda f: saelens(f, apply_b_dec_to_input=False)),
    "saelens topk": ("saelens", lambda f: saelens(f, architecture="topk", k=K)),
    "saelens topk on decoder norms": (
        "saelens",
        lambda f: saelens(f, architecture="topk", k=K, rescale_acts_by_decoder_norm=True),
    ),
    "saelens jumprelu": ("saelens", lambda f: saelens(f, threshold=True, architecture="jumprelu")),
    "saelens jumprelu not applied b_dec": (
        "saelens",
        lambda f: saelens(f, threshold=True, architecture="jumprelu", apply_b_dec_to_input=False),
    ),
    "saelens layer norm": ("saelens", lambda f: saelens(f, normalize_activations="layer_norm")),
    "saelens token norm": ("saelens", lambda f: saelens(f, normalize_activations="constant_norm_rescale")),
    "saelens 5": ("saelens5", saelens5),
    "saelens 5 topk": ("saelens5", lambda f: saelens5(f, activation_fn_str="topk", activation_fn_kwargs={"k": K})),
    "saelens 5 unnormalized": ("saelens5", lambda f: saelens5(f, normalize_activations=False)),
    "sparsify": ("sparsify", sparsify),
    "sparsify derived width": ("sparsify", lambda f: sparsify(f, num_latents=0, expansion_factor=3)),
    **{
        f"dictionary_learning {kind}": ("dictionary_learning", lambda f, kind=kind: dictionaries(f, kind))
        for kind in ("AutoEncoder", "AutoEncoderNew", "AutoEncoderTopK", "BatchTopKSAE")
    },
    "dictionary_learning Matryoshka": ("dictionary_learning", lambda f: dictionaries(f, "MatryoshkaBatchTopKSAE")),
    "dictionary_learning JumpRelu": ("dictionary_learning", lambda f: dictionaries(f, "JumpReluAutoEncoder")),
    "openai topk": ("openai", lambda f: openais(f, {"activation": "TopK", "k": str(K), "postact_fn": "ReLU"})),
    "openai relu": ("openai", lambda f: openais(f, {"activation": "ReLU"})),
    **{
        f"llamascopium {act} {norm}": (
            "llamascopium",
            lambda f, act=act, norm=norm: llamascopium(f, act_fn=act, norm_activation=norm),
        )
        for act in ("relu", "jumprelu", "topk")
        for norm in ("dataset-wise", "inference", "token-wise")
    },
    "llamascopium plain gate, no bias": (
        "llamascopium",
        lambda f: llamascopium(f, act_fn="topk", sparsity_include_decoder_norm=False, use_decoder_bias=False),
    ),
}
