"""The same files in the tools themselves, where they are installed (extra `peers`): ours load there, theirs load here.

Each comparison is of forward passes, to 1e-5. dictionary_learning's own loader reads pickles, which only this test lets it
do, with files that it or we have just written.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from format_files import D, F, K, own, rand, sample
from torch import Tensor

from lm import Site
from sae import fold_scale, load_autoencoder, save_autoencoder
from sae.formats import Provenance, dictionary_learning

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@torch.no_grad()
def stir(module: torch.nn.Module) -> None:
    """Other numbers in every parameter than those it starts with; thresholds positive."""
    for seed, (name, parameter) in enumerate(module.named_parameters()):
        if "threshold" in name:
            parameter.copy_(torch.linspace(0, 1, parameter.numel()).view_as(parameter))
        else:
            parameter.add_(rand(*parameter.shape, seed=seed, scale=0.2))


OURS = [("token", {}), ("feature", {}), ("mutual", {}), ("threshold", {})]
NORMED = [("token", {"input_norm": "layer_norm"}), ("token", {"input_norm": "token_norm"})]


@pytest.mark.parametrize("format", ["saelens", "saelens5"])
@pytest.mark.parametrize(("choice", "more"), OURS + NORMED)
def test_our_files_load_in_saelens(format: Any, choice: str, more: dict[str, Any], tmp_path: Path) -> None:
    sae_lens = pytest.importorskip("sae_lens", reason="sae-lens is not installed (extra `peers`)")
    model, x = own(choice, **more), sample()
    facts = Provenance(model_name="m", prepend_bos=False, context_size=64, dataset_path="d", training_tokens=7)
    save_autoencoder(model, tmp_path, format=format, metadata=facts.metadata(Site("resid", 2)))
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    torch.testing.assert_close(theirs(x), model(x), **CLOSE)
    torch.testing.assert_close(theirs.encode(x) != 0, model.encode(x).to_dense() != 0)
    known = theirs.cfg.metadata
    assert (known.hook_name, known.model_name, known.prepend_bos) == ("blocks.2.hook_resid_post", "m", False)
    assert (known.context_size, known.dataset_path) == (64, "d")
    if format == "saelens":
        assert (known.training_tokens, known.training_architecture) == (7, f"{choice}_choice")
    theirs.save_model(tmp_path / "again")
    again = load_autoencoder(tmp_path / "again")
    torch.testing.assert_close(again(x), model(x), **CLOSE)
    assert again.metadata["hook_name"] == "blocks.2.hook_resid_post"
    if format == "saelens":
        assert again.config == model.config


def test_saelens_gives_our_densities_back(tmp_path: Path) -> None:
    pytest.importorskip("sae_lens", reason="sae-lens is not installed (extra `peers`)")
    from sae_lens.constants import SPARSITY_FILENAME
    from safetensors.torch import load_file

    save_autoencoder(own("token"), tmp_path, densities=torch.full((F,), 0.125))
    torch.testing.assert_close(load_file(tmp_path / SPARSITY_FILENAME)["sparsity"], torch.full((F,), -0.90309))


@pytest.mark.parametrize("apply", [True, False])
@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("Standard", {}),
        ("JumpReLU", {}),
        ("TopK", {"k": K}),
        ("TopK", {"k": K, "rescale_acts_by_decoder_norm": True}),
        ("TopK", {"k": K, "normalize_activations": "layer_norm"}),
        ("Standard", {"normalize_activations": "constant_norm_rescale"}),
    ],
)
def test_saelens_files_load_here(kind: str, more: dict[str, Any], apply: bool, tmp_path: Path) -> None:
    sae_lens = pytest.importorskip("sae_lens", reason="sae-lens is not installed (extra `peers`)")
    config = getattr(sae_lens, f"{kind}SAEConfig")(d_in=D, d_sae=F, apply_b_dec_to_input=apply, **more)
    theirs, x = getattr(sae_lens, f"{kind}SAE")(config), sample()
    stir(theirs)
    theirs.save_model(tmp_path)
    ours = load_autoencoder(tmp_path)
    torch.testing.assert_close(ours(x), theirs(x), **CLOSE)


def test_a_scale_is_folded_as_saelens_folds_it(tmp_path: Path) -> None:
    sae_lens = pytest.importorskip("sae_lens", reason="sae-lens is not installed (extra `peers`)")
    for choice in ("token", "mutual"):
        model, x = own(choice), sample()
        save_autoencoder(model, tmp_path)
        theirs = sae_lens.SAE.load_from_disk(tmp_path)
        theirs.fold_activation_norm_scaling_factor(0.4)
        torch.testing.assert_close(theirs(x), fold_scale(model, 0.4)(x), **CLOSE)


def test_sparsify_both_ways(tmp_path: Path) -> None:
    sparsify = pytest.importorskip("sparsify", reason="eai-sparsify is not installed (extra `peers`)")
    model, x = own("token"), sample()
    save_autoencoder(model, tmp_path / "ours", format="sparsify", metadata={"hook_name": "blocks.0.hook_mlp_out"})
    theirs = sparsify.SparseCoder.load_from_disk(tmp_path / "ours")
    torch.testing.assert_close(sparsify_output(theirs, x), model(x), **CLOSE)
    for more in ({"num_latents": F}, {"expansion_factor": F // D}):
        theirs = sparsify.SparseCoder(D, sparsify.SparseCoderConfig(k=K, **more))
        stir(theirs)
        theirs.save_to_disk(tmp_path / "theirs")
        ours = load_autoencoder(tmp_path / "theirs")
        torch.testing.assert_close(ours(x), sparsify_output(theirs, x), **CLOSE)


def sparsify_output(coder: Any, x: Tensor) -> Tensor:
    """Encode and decode; its forward() insists on a GPU's autocast."""
    found = coder.encode(x)
    return coder.decode(found.top_acts, found.top_indices)


@pytest.mark.parametrize("choice", ["token", "feature", "mutual", "threshold"])
def test_our_files_load_in_dictionary_learning(choice: str, tmp_path: Path) -> None:
    pytest.importorskip("dictionary_learning", reason="dictionary-learning is not installed (extra `peers`)")
    from dictionary_learning.utils import load_dictionary

    model, x = own(choice), sample()
    save_autoencoder(model, tmp_path, format="dictionary_learning")
    theirs, config = load_dictionary(str(tmp_path), "cpu")
    assert config["trainer"]["dict_size"] == F
    torch.testing.assert_close(theirs(x), model(x), **CLOSE)


@pytest.mark.parametrize(
    "kind",
    [
        "AutoEncoder",
        "AutoEncoderNew",
        "AutoEncoderTopK",
        "BatchTopKSAE",
        "MatryoshkaBatchTopKSAE",
        "JumpReluAutoEncoder",
    ],
)
def test_dictionary_learning_files_load_here(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("dictionary_learning", reason="dictionary-learning is not installed (extra `peers`)")
    from dictionary_learning import utils

    sizes: dict[str, Any] = {"group_sizes": [16, F - 16]} if kind.startswith("Matryoshka") else {}
    theirs, x = getattr(utils, kind)(D, F, **({"k": K} if "TopK" in kind else {}), **sizes), sample()
    stir(theirs)
    if kind in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        theirs.threshold.fill_(0.3)
    torch.save(theirs.state_dict(), tmp_path / "ae.pt")
    trainer = {"dict_class": kind, "activation_dim": D, "dict_size": F, "k": K}
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer}))
    monkeypatch.chdir(tmp_path)
    exec(dictionary_learning.CONVERT, {})
    torch.testing.assert_close(load_autoencoder(tmp_path)(x), theirs(x), **CLOSE)
