"""Files that are damaged, hostile, or mean something that this project cannot represent: refused in one sentence."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from format_files import F, K, dictionaries, encoder, llamascopium, openais, own, saelens, saelens5, sample, sparsify
from safetensors.torch import load_file, save_file

from lm import UserError
from sae import load_autoencoder, save_autoencoder
from sae.formats import dictionary_learning, openai


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
        {"reshape_activations": "hook_z"},
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
    with pytest.raises(UserError, match="is no folder"):
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


def test_numbers_made_to_break_a_reader_give_one_sentence(tmp_path: Path) -> None:
    def bad_float8(folder: Path) -> Path:
        saelens(folder)
        tensors = encoder()
        save_file(
            {**tensors, "b_enc": torch.full((F,), math.nan).to(torch.float8_e4m3fn)}, folder / "sae_weights.safetensors"
        )
        return folder

    def long_number(folder: Path) -> Path:
        saelens(folder)
        (folder / "cfg.json").write_text('{"d_in": ' + "1" * 5000 + "}")
        return folder

    def no_norm(folder: Path) -> Path:
        llamascopium(folder)
        path = folder / "sae_weights.safetensors"
        name = "dataset_average_activation_norm.blocks.2.hook_resid_post"
        save_file({**load_file(path), name: torch.tensor(0.0)}, path)
        return folder

    for number, (make, says) in enumerate(
        [
            (bad_float8, "not finite"),
            (long_number, "cannot be read as JSON"),
            (no_norm, "average activation norm of 0"),
            (
                lambda f: openais(f, {"activation": "TopK", "k": "9" * 5000, "postact_fn": "ReLU"}),
                "whole number belongs",
            ),
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(UserError, match=says) as caught:
            load_autoencoder(make(folder))
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400


def test_a_threshold_that_nothing_passes_is_written_and_read(tmp_path: Path) -> None:
    model = own("mutual")
    model.set_threshold(math.inf)
    for format in ("saelens", "dictionary_learning"):
        save_autoencoder(model, tmp_path / format, format=format)  # type: ignore[arg-type]
        assert load_autoencoder(tmp_path / format).encode(sample()).values.numel() == 0


def test_the_remedy_is_one_that_helps(tmp_path: Path) -> None:
    """A gated file is gated for inference too; the folder above dictionary_learning's is named, and not called unknown."""
    said = {}
    for kind in ("gated", "matching_pursuit", "batchtopk"):
        (tmp_path / kind).mkdir()
        with pytest.raises(UserError) as caught:
            load_autoencoder(saelens(tmp_path / kind, architecture=kind))
        said[kind] = str(caught.value)
    assert "save its inference form with SAELens first" in said["batchtopk"]
    assert all(
        "inference form" not in said[kind] and "use this one with SAELens" in said[kind] for kind in list(said)[:2]
    )
    (tmp_path / "save_dir" / "trainer_0").mkdir(parents=True)
    (tmp_path / "save_dir" / "trainer_0" / "ae.pt").write_bytes(b"")
    with pytest.raises(UserError, match=r"give one of its folders, such as trainer_0"):
        load_autoencoder(tmp_path / "save_dir")
