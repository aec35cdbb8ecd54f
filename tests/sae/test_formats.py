"""Other tools' files by forward passes: every reader and writer against the format's definition in plain tensors.

The `by_*` functions work the output out from the files alone (json and safetensors), dense, without this project's code.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lm import EMBEDDING, Site, UserError
from sae import SparseAutoencoder, SparseAutoencoderConfig, calibrate_features, calibrate_mutual
from sae.formats import (
    Format,
    Provenance,
    dictionary_learning,
    fold_scale,
    hook_name,
    load_autoencoder,
    openai,
    read_densities,
    save_autoencoder,
    site_of,
)

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


def put(folder: Path, config: str, weights: str, files: Files) -> Path:
    (folder / config).write_text(json.dumps(files[0]))
    save_file({name: tensor.contiguous() for name, tensor in files[1].items()}, folder / weights)
    return folder


def keep_top(z: Tensor, k: int) -> Tensor:
    top = z.topk(k, dim=1)
    return torch.zeros_like(z).scatter(1, top.indices, top.values.relu())


# --- the definitions ---


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
        rescale = math.sqrt(D) / float(w[f"dataset_average_activation_norm.{cfg['hook_point_in']}"])
    elif cfg["norm_activation"] == "token-wise":
        rescale = math.sqrt(D) / x.norm(dim=-1, keepdim=True)
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


# --- files written by hand ---


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
    "saelens 5 unnormalised": ("saelens5", lambda f: saelens5(f, normalize_activations=False)),
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


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_file_gives_what_its_format_defines(name: str, tmp_path: Path) -> None:
    format, make = FOREIGN[name]
    folder, x = make(tmp_path), sample()
    expected = DEFINITIONS[format](folder, x)
    assert float((expected - x).norm()) > 0
    for asked in (format, "auto"):
        model = load_autoencoder(folder, asked)
        assert not model.training
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=2e-5)


def test_what_foreign_files_tell_is_kept(tmp_path: Path) -> None:
    model = load_autoencoder(saelens(tmp_path))
    assert model.metadata == {"hook_name": "blocks.2.hook_resid_post", "odd": [1, {"a": None}]}
    save_autoencoder(model, tmp_path / "again", metadata={"l0": 3.0})
    again = load_autoencoder(tmp_path / "again")
    assert again.metadata == {**model.metadata, "l0": 3.0}
    assert json.loads((tmp_path / "again/cfg.json").read_text())["architecture"] == "standard"
    (tmp_path / "old").mkdir()
    assert load_autoencoder(saelens5(tmp_path / "old")).metadata == {
        "hook_name": "blocks.1.hook_mlp_out",
        "hook_layer": 1,
    }


def test_batchtopk_of_llamascopium_selects_in_a_batch_and_asks_for_thresholds(tmp_path: Path) -> None:
    folder, x = llamascopium(tmp_path, act_fn="batchtopk"), sample()
    model = load_autoencoder(folder)
    with pytest.raises(UserError, match="set_threshold"):
        model(x)
    torch.testing.assert_close(model.train()(x), by_llamascopium(folder, x), rtol=1e-5, atol=2e-5)


# --- our own, written in every format that can hold it ---


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


WRITTEN = [
    *[(choice, format) for choice in ("token", "feature", "mutual", "threshold", "relu") for format in DEFINITIONS],
    ("layer_norm", "saelens"),
    ("layer_norm", "openai"),
    ("token_norm", "saelens"),
    ("token_norm", "llamascopium"),
]
REFUSED = {
    *[("sparsify", choice) for choice in ("feature", "mutual", "threshold", "relu")],
    *[("openai", choice) for choice in ("token", "feature", "mutual", "threshold")],
}


@pytest.mark.parametrize(("choice", "format"), WRITTEN)
def test_what_we_write_means_the_same_by_the_format(choice: str, format: Format, tmp_path: Path) -> None:
    model, x = (
        own(choice.replace("relu", "threshold")) if "norm" not in choice else own("token", input_norm=choice),
        sample(),
    )
    if choice == "relu":
        model.set_threshold(0.0)
    if (format, choice) in REFUSED:
        with pytest.raises(UserError, match="write it as saelens"):
            save_autoencoder(model, tmp_path / "out", format=format)
        assert not (tmp_path / "out").exists()
        return
    save_autoencoder(model, tmp_path / "out", format=format, metadata={"hook_name": "blocks.1.hook_mlp_out"})
    torch.testing.assert_close(DEFINITIONS[format](tmp_path / "out", x), model(x), rtol=1e-5, atol=2e-5)
    again = load_autoencoder(tmp_path / "out")
    torch.testing.assert_close(again(x), model(x), rtol=1e-5, atol=2e-5)
    if format == "saelens":
        assert again.config == model.config
        assert torch.equal(again.variance, model.variance)
    if format != "openai":
        assert again.metadata["hook_name"] == "blocks.1.hook_mlp_out"


def test_a_constant_scale_is_folded_with_biases_and_thresholds(tmp_path: Path) -> None:
    x, s = sample(), 0.37
    for choice in ("token", "feature", "mutual", "threshold"):
        model = own(choice)
        folded = fold_scale(model, s)
        torch.testing.assert_close(folded(x), model(s * x) / s, rtol=1e-5, atol=2e-5)
        assert torch.equal(folded.w_dec, model.w_dec)
    folder = saelens(
        tmp_path, threshold=True, architecture="jumprelu", normalize_activations="expected_average_only_in"
    )
    with pytest.raises(UserError, match=r"scale=\.\.\."):
        load_autoencoder(folder)
    expected = by_saelens(folder, s * x) / s
    torch.testing.assert_close(load_autoencoder(folder, scale=s)(x), expected, rtol=1e-5, atol=2e-5)
    (folder / "activation_scaler.json").write_text('{"scaling_factor": 0.37}')
    torch.testing.assert_close(load_autoencoder(folder)(x), expected, rtol=1e-5, atol=2e-5)
    for bad in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(UserError, match="scale"):
            load_autoencoder(folder, scale=bad)


def test_densities_are_written_as_log10_and_read_again(tmp_path: Path) -> None:
    densities = torch.linspace(0, 1, F, dtype=torch.float64) ** 3
    save_autoencoder(own("token"), tmp_path, densities=densities)
    stored = load_file(tmp_path / "sparsity.safetensors")["sparsity"]
    torch.testing.assert_close(stored, (densities + 1e-10).log10().float())
    torch.testing.assert_close(read_densities(tmp_path), densities, rtol=1e-4, atol=1e-9)
    for bad in (densities[1:], densities + 1, densities * math.nan):
        with pytest.raises(UserError, match="densities"):
            save_autoencoder(own("token"), tmp_path / "bad", densities=bad)
    assert not (tmp_path / "bad").exists()


def test_sites_have_the_names_that_other_tools_use() -> None:
    for site in (EMBEDDING, Site("resid", 3), Site("mlp", 0), Site("attn", 11)):
        assert site_of(hook_name(site)) == site
    assert site_of("blocks.4.hook_resid_pre") == Site("resid", 3)
    assert hook_name(Site("resid", 3)) == "blocks.3.hook_resid_post"
    for bad in ("blocks.3.attn.hook_z", "blocks.-1.hook_resid_post", "../blocks.1.hook_mlp_out", ""):
        with pytest.raises(UserError, match="hook name"):
            site_of(bad)


def test_provenance_names_both_spellings_and_leaves_out_what_is_unknown(tiny: Path) -> None:
    from lm import load

    anatomy = load(str(tiny / "model")).anatomy
    facts = Provenance(model_name="m", prepend_bos=False, context_size=64, l0=3.5).metadata(Site("mlp", 1), anatomy)
    assert facts == {
        "model_name": "m",
        "prepend_bos": False,
        "context_size": 64,
        "l0": 3.5,
        "hook_name": "blocks.1.hook_mlp_out",
        "hook_layer": 1,
        "hf_hook_name": "model.layers.1.mlp",
    }
    assert "hf_hook_name" not in Provenance().metadata(EMBEDDING, anatomy)


# --- what is refused ---


def test_what_cannot_be_represented_is_refused_by_name(tmp_path: Path) -> None:
    cases: list[tuple[Callable[[Path], Path], str]] = [
        *[
            (lambda f, a=a: saelens(f, architecture=a), a)
            for a in (
                "gated",
                "abstopk",
                "transcoder",
                "jumprelu_transcoder",
                "matching_pursuit",
                "temporal",
                "batchtopk",
            )
        ],
        (lambda f: saelens(f, normalize_activations="covariance_whitening"), "covariance_whitening"),
        (lambda f: saelens(f, finetuning_scaling_factor=True), "after training"),
        (lambda f: saelens5(f, activation_fn_str="tanh-relu"), "tanh-relu"),
        (lambda f: saelens(f, threshold=True), "also holds threshold"),
        (lambda f: sparsify(f, activation="groupmax"), "groupmax"),
        (lambda f: sparsify(f, transcode=True), "transcode"),
        (lambda f: sparsify(f, skip_connection=True), "skip_connection"),
        (lambda f: dictionaries(f, "GatedAutoEncoder"), "GatedAutoEncoder"),
        (lambda f: openais(f, {"activation": "Identity"}), "Identity"),
        (lambda f: openais(f, {"activation": "TopK", "k": "3", "postact_fn": "Identity"}), "Identity"),
        (lambda f: openais(f, {"other": "x"}), "header"),
        (lambda f: llamascopium(f, sae_type="clt"), "clt"),
        (lambda f: llamascopium(f, use_glu_encoder=True), "GLU"),
        (lambda f: llamascopium(f, hook_point_out="blocks.2.hook_mlp_out"), "transcoder"),
        (lambda f: llamascopium(f, norm_activation="batch-wise"), "batch-wise"),
        (lambda f: llamascopium(f, act_fn="layertopk"), "layertopk"),
    ]
    for number, (make, word) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(UserError, match=word):
            load_autoencoder(make(folder))


@pytest.mark.parametrize(
    "changes",
    [
        {"d_in": "6"},
        {"d_in": True},
        {"d_in": None},
        {"d_sae": F + 1},
        {"d_sae": -1},
        {"d_in": 10**400},
        {"metadata": {"autoencoder": {"choice": "feature", "k": 3}, "input_variance": 10**400}},
        {"architecture": 3},
        {"architecture": "topk", "k": F + 1},
        {"architecture": "topk", "k": 0},
        {"architecture": "topk", "k": 2.5},
        {"architecture": "topk"},
        {"architecture": "jumprelu"},
        {"apply_b_dec_to_input": "yes"},
        {"normalize_activations": ["none"]},
        {"metadata": [1]},
        {"metadata": {"autoencoder": 3}},
        {"metadata": {"autoencoder": {"choice": "mutual"}}},
    ],
)
def test_settings_of_wrong_types_and_sizes_give_one_sentence(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_autoencoder(saelens(tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_damaged_files_give_one_sentence(tmp_path: Path) -> None:
    folder = saelens(tmp_path)
    for text in (b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000):
        (folder / "cfg.json").write_bytes(text)
        with pytest.raises(UserError, match=r"cfg\.json"):
            load_autoencoder(folder)
    saelens(folder)
    whole = (folder / "sae_weights.safetensors").read_bytes()
    (folder / "sae_weights.safetensors").write_bytes(whole[:100])
    with pytest.raises(UserError, match="safetensors"):
        load_autoencoder(folder)
    save_file({**encoder(), "b_enc": torch.full((F,), math.nan)}, folder / "sae_weights.safetensors")
    with pytest.raises(UserError, match="not finite"):
        load_autoencoder(folder)
    with pytest.raises(UserError, match="unknown"):
        load_autoencoder(folder, "gguf")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no folder"):
        load_autoencoder(tmp_path / "nowhere")
    (tmp_path / "sae.safetensors").write_bytes(whole)
    with pytest.raises(UserError, match="say which"):
        load_autoencoder(folder)
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match="known format"):
        load_autoencoder(tmp_path / "run")
    (tmp_path / "run" / "layers.3").mkdir()
    sparsify(tmp_path / "run" / "layers.3")
    with pytest.raises(UserError, match=r"such as layers\.3"):
        load_autoencoder(tmp_path / "run")


def test_pickles_are_refused_with_a_command_that_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = sample()
    for format, module in (("dictionary_learning", dictionary_learning), ("openai", openai)):
        folder = tmp_path / format
        model = own("mutual") if format == "dictionary_learning" else own("token", input_norm="layer_norm")
        save_autoencoder(model, folder, format=format)  # type: ignore[arg-type]
        (folder / module.WEIGHTS).unlink()
        for path in (folder, folder / module.PICKLE):
            with pytest.raises(UserError, match="pickle") as caught:
                load_autoencoder(path)
            assert module.CONVERT in str(caught.value)
        if format == "openai":  # its own state_dict repeats the settings among the tensors
            state = torch.load(folder / module.PICKLE, weights_only=True)
            torch.save({**state, "activation.k": K, "activation.postact_fn": "ReLU"}, folder / module.PICKLE)
        monkeypatch.chdir(folder)
        exec(module.CONVERT, {})
        torch.testing.assert_close(load_autoencoder(folder)(x), model(x), rtol=1e-5, atol=2e-5)


def test_names_in_files_and_metadata_make_no_paths(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    evil = {"hook_name": "../../evil", "model_name": "/etc/passwd", "hf_hook_name": "../evil", "dataset_path": ".."}
    for format in ("saelens", "saelens5", "sparsify", "dictionary_learning", "llamascopium"):
        save_autoencoder(own("token"), folder / format, format=format, metadata=evil)  # type: ignore[arg-type]
        load_autoencoder(folder / format)
    assert {path.name for path in tmp_path.iterdir()} == {"a"}
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"b"}
    with pytest.raises(UserError, match="own"):
        save_autoencoder(own("token"), tmp_path / "c", metadata={"autoencoder": 1})
    for format in ("saelens", "sparsify", "dictionary_learning", "llamascopium"):
        with pytest.raises(UserError, match="JSON"):
            save_autoencoder(own("token"), tmp_path / "c", format=format, metadata={"x": math.nan})  # type: ignore[arg-type]
    assert not (tmp_path / "c").exists()
