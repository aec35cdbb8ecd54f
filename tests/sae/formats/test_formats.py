"""Other tools' files by forward passes: every reader and writer against the format's definition in plain tensors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from format_definitions import DEFINITIONS, by_llamascopium, by_saelens
from format_files import FOREIGN, F, K, dictionaries, llamascopium, openais, own, saelens, saelens5, sample
from safetensors.torch import load_file, save_file

from lm import EMBEDDING, Site, UserError, hub
from sae import fold_scale, load_autoencoder, save_autoencoder
from sae.formats import Format, Provenance, hook_name, openai, read_densities, site_of


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


def test_an_autoencoder_is_fetched_from_the_hub_without_pickles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}
    model = own("token")
    save_autoencoder(model, tmp_path / "layers.3" / "k")
    save_autoencoder(model, tmp_path)

    def snapshot(repo: str, **options: Any) -> str:
        asked.update(options, repo=repo)
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    for name, inside in (("someone/saes", ""), ("someone/saes/layers.3/k", "layers.3/k/")):
        torch.testing.assert_close(load_autoencoder(name, revision="v1")(sample()), model(sample()))
        assert (asked["repo"], asked["revision"]) == ("someone/saes", "v1")
        assert f"{inside}sae_weights.safetensors" in asked["allow_patterns"]
        assert all(pattern.endswith((".safetensors", ".json")) for pattern in asked["allow_patterns"])
        assert asked["ignore_patterns"] == [f"{inside}*/*"]
    for name, says in (
        ("someone/saes/layers.4", "no safetensors autoencoder there"),
        ("someone/../saes", "is no folder"),
        ("/someone/saes", "is no folder"),
        ("saes", "is no folder"),
    ):
        with pytest.raises(UserError, match=says):
            load_autoencoder(name)
    with pytest.raises(UserError, match="leave revision out"):
        load_autoencoder(tmp_path, revision="v1")


def test_rows_of_any_length_are_made_unit_ones_as_dictionary_learning_does(tmp_path: Path) -> None:
    """Its April trainer leaves decoder rows as they are, and its loader moves their lengths to the encoder."""
    folder, x = dictionaries(tmp_path, "AutoEncoder"), sample()
    w = load_file(folder / "ae.safetensors")
    norms = w["decoder.weight"].norm(dim=0)
    assert float((norms - 1).abs().min()) > 1e-3
    activations = ((x - w["bias"]) @ w["encoder.weight"].T + w["encoder.bias"]).relu() * norms
    model = load_autoencoder(folder)
    torch.testing.assert_close(model.encode(x).to_dense(), activations, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.w_dec.norm(dim=1), torch.ones(F))


def test_a_state_dict_of_openais_train_is_a_topk_without_normalization(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenAI's loader takes it for a ReLU, since the activation is not among the tensors; its own forward pass has k."""
    folder, x = openais(tmp_path, {"activation": "ReLU"}), sample()
    w = load_file(folder / openai.WEIGHTS)
    w = {name: tensor for name, tensor in w.items() if name not in openai._COUNTERS[1:]}
    save_file(w, folder / openai.WEIGHTS, {"activation": "ReLU"})  # as an earlier conversion wrote it
    with pytest.raises(UserError, match=r"state dict of OpenAI's train.py, a TopK whose k it does not hold") as caught:
        load_autoencoder(folder)
    assert openai.WITH_K in str(caught.value)
    monkeypatch.chdir(folder)
    exec(openai.WITH_K.replace("K'", f"{K}'"), {})
    values, indices = ((x - w["pre_bias"]) @ w["encoder.weight"].T + w["latent_bias"]).topk(K)
    acts = torch.zeros(len(x), F).scatter(1, indices, values.relu())
    torch.testing.assert_close(load_autoencoder(folder)(x), acts @ w["decoder.weight"].T + w["pre_bias"])
    torch.save(w, folder / openai.PICKLE)
    (folder / openai.WEIGHTS).unlink()
    exec(openai.CONVERT, {})
    with pytest.raises(UserError, match="whose k it does not hold"):
        load_autoencoder(folder)
