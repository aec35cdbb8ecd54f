"""Loading: what comes back, and one clear sentence for everything that cannot."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, byte_level, ids, tiny
from safetensors.torch import load_file, save_file
from transformers.utils import logging

import lm.builtin
from lm import EMBEDDING, Edit, ModelSpec, UserError, anatomy_of, capture, load, patch

sources = importlib.import_module("lm.hub")
WEIGHT = "model.layers.1.mlp.up_proj.weight"


def save(folder: Path, family: str = "llama", **more: Any) -> Path:
    model = tiny(family, **more)
    model.model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of a sound model that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None takes a key out."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def read(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of their own: safetensors' are views of the file, which is about to be overwritten."""
    return {name: weight.clone() for name, weight in load_file(path).items()}


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = read(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


# --- what comes back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_comes_back_as_it_was(family: str, tmp_path: Path) -> None:
    original = tiny(family)
    loaded = load(str(save(tmp_path, family)), device="cpu")
    assert not loaded.model.training
    assert loaded.name == str(tmp_path)
    assert loaded.anatomy == original.anatomy == anatomy_of(loaded.model)
    assert loaded.tokenizer("Anna Kowalska")["input_ids"] == original.tokenizer("Anna Kowalska")["input_ids"]
    weights = original.model.state_dict()
    assert weights.keys() == loaded.model.state_dict().keys()
    assert all(torch.equal(weights[name], weight) for name, weight in loaded.model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(loaded.model(ids()).logits, original.model(ids()).logits)


@pytest.mark.parametrize(("name", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_half_precision(saved: Path, name: Any, dtype: torch.dtype) -> None:
    model = load(str(saved), dtype=name, device="cpu")
    assert {parameter.dtype for parameter in model.model.parameters()} == {dtype}
    with patch(model, [Edit(site=EMBEDDING, value=torch.zeros(()))]), capture(model, [EMBEDDING]) as seen:
        model.model(ids())
    assert seen[EMBEDDING].dtype == dtype


def test_tied_weights_stay_tied_and_count_as_present(tmp_path: Path) -> None:
    model = load(str(save(tmp_path, tie_word_embeddings=True)), device="cpu")
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    embedding, head = (model.model.get_submodule(name) for name in (model.anatomy.embedding, model.anatomy.head))
    assert embedding.weight is head.weight


def test_one_layer(tmp_path: Path) -> None:
    model = load(str(save(tmp_path, num_hidden_layers=1)), device="cpu")
    assert model.anatomy.layers == 1
    with capture(model, model.anatomy.sites()) as seen:
        model.model(ids())
    assert len(seen.sites) == 3


def test_shards_are_read(tmp_path: Path, saved: Path) -> None:
    original = tiny("llama")
    original.model.save_pretrained(tmp_path, max_shard_size="20KB")
    original.tokenizer.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(load(str(tmp_path), device="cpu").model(ids()).logits, original.model(ids()).logits)


def test_keywords_replace_what_the_spec_says(saved: Path) -> None:
    spec = ModelSpec(path=str(saved), dtype="bfloat16", device="cpu", attention="sdpa")
    kept = load(spec)
    assert kept.model.dtype == torch.bfloat16
    assert kept.model.config._attn_implementation == "sdpa"
    replaced = load(spec, dtype="float32", attention="eager")
    assert replaced.model.dtype == torch.float32
    assert replaced.model.config._attn_implementation == "eager"
    assert replaced.device == torch.device("cpu")


def test_a_device_that_a_config_asks_for_must_be_there_wherever_a_stage_loads_to(saved: Path) -> None:
    """Training loads to the CPU first: a GPU that is not there would be trained without, in silence."""
    missing = "cuda:7" if torch.cuda.device_count() < 8 else "mps"
    with pytest.raises(UserError, match=f"the device '{missing}' is not there"):
        load(ModelSpec(path=str(saved), device=missing), device="cpu")


def test_builtin_is_found_in_the_package(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(lm.builtin, "model_path", lambda variant: asked.append(variant) or saved)
    assert load(ModelSpec(device="cpu")).name == "builtin"
    assert load("builtin:retain_model", device="cpu").name == "builtin:retain_model"
    assert asked == ["memorized", "retain_model"]


def test_an_unknown_builtin_is_refused() -> None:
    with pytest.raises(UserError, match="'nope'"):
        load("builtin:nope")


def test_a_tokenizer_from_elsewhere(folder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "tokenizer"
    byte_level(bos=True).save_pretrained(elsewhere)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match="has no tokenizer files: pass the folder or hub id that has them as tokenizer"):
        load(str(folder))
    assert load(str(folder), tokenizer=str(elsewhere), device="cpu").tokenizer("Anna")["input_ids"][0] == 1


def test_a_missing_pad_token_becomes_eos(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", pad_token=None)
    tokenizer = load(str(folder), device="cpu").tokenizer
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2


def test_added_tokens_beyond_the_embeddings_are_allowed(folder: Path) -> None:
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})  # as Gemma-3's tokenizer has
    tokenizer.save_pretrained(folder)
    assert len(load(str(folder), device="cpu").tokenizer) == 385


def test_library_verbosity_is_left_alone(folder: Path) -> None:
    before = logging.get_verbosity()
    load(str(folder), device="cpu")
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError):
        load(str(folder))
    assert logging.get_verbosity() == before


# --- adapters --------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["down_proj", "q_proj"], init_lora_weights=False)
    get_peft_model(tiny("llama").model, config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_is_merged(saved: Path, adapter: Path) -> None:
    from peft import PeftModel

    expected = PeftModel.from_pretrained(tiny("llama").model, adapter)(ids()).logits
    merged = load(str(saved), adapter=str(adapter), device="cpu")
    assert "lora" not in " ".join(name for name, _ in merged.model.named_parameters())
    assert merged.anatomy == load(str(saved), device="cpu").anatomy
    torch.testing.assert_close(merged.model(ids()).logits, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(merged.model(ids()).logits, load(str(saved), device="cpu").model(ids()).logits, atol=1e-2)


def test_adapters_that_do_not_fit(saved: Path, adapter: Path, tmp_path: Path) -> None:
    def refused(says: str, base: Path = saved, path: Path = adapter) -> None:
        with pytest.raises(UserError, match=says):
            load(str(base), adapter=str(path), device="cpu")

    refused(r"the folder /nowhere/a does not exist", path=Path("/nowhere/a"))
    refused("does not fit this model, .*layers.2", base=save(tmp_path / "short", num_hidden_layers=2))
    refused("cannot be merged into this model", base=save(tmp_path / "other", "gpt2"))
    refused("cannot be merged into this model", base=save(tmp_path / "wide", intermediate_size=40))
    with pytest.raises(UserError, match=r"is a PEFT adapter: give its base model as path and .* as adapter"):
        load(str(adapter))
    weights = read(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").write_bytes(b"{}")
    refused("cannot be merged into this model: ")
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(weights, adapter / "adapter_model.bin")
    refused(r"has no adapter_model.safetensors: save it again as safetensors")


# --- what cannot be loaded -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda w: w[WEIGHT].view(-1)[3].fill_(float("nan")), f"the weight {WEIGHT} holds NaN or infinite values"),
        (lambda w: w[WEIGHT].view(-1)[3].fill_(float("-inf")), f"the weight {WEIGHT} holds NaN or infinite values"),
        (lambda w: w.pop(WEIGHT), f"the checkpoint lacks 1 weights, {WEIGHT} first"),
        (lambda w: w.update({WEIGHT: w[WEIGHT][:5].clone()}), f"has another shape for 1 weights, {WEIGHT} first"),
    ],
)
def test_damaged_weights(folder: Path, damage: Callable[[dict[str, torch.Tensor]], Any], says: str) -> None:
    edit_weights(folder, damage)
    with pytest.raises(UserError, match=says):
        load(str(folder), device="cpu")


def test_large_finite_weights_are_not_infinite(folder: Path) -> None:
    """Their sum overflows; they are finite all the same."""
    edit_weights(folder, lambda w: w["lm_head.weight"].fill_(3e38))
    assert load(str(folder), device="cpu").anatomy.layers == 3


def test_a_weight_on_the_meta_device() -> None:
    model = tiny("llama").model
    model.lm_head = model.lm_head.to("meta")
    with pytest.raises(UserError, match=r"m: the weight lm_head.weight was not loaded"):
        lm.check_weights(model, "m")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def only_pickles(folder: Path) -> None:
    torch.save(read(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def index_without_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"metadata": {}, "weight_map": {WEIGHT: "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / "config.json").unlink(), "has no config.json: give a folder that save_pretrained wrote"),
        (lambda f: (f / "config.json").write_text("{nope"), "has a damaged config.json, restore it"),
        (lambda f: edit_json(f / "config.json", model_type=None), "has no model_type in its config.json"),
        (
            lambda f: edit_json(f / "config.json", model_type="bert"),
            r"'bert' is not among the known ones.*: use one of .*qwen3, .*or add its module names to KNOWN",
        ),
        (
            lambda f: edit_json(f / "config.json", model_type="mystery"),
            "'mystery', which transformers .* does not have",
        ),
        (lambda f: edit_json(f / "config.json", hidden_size="wide"), "damaged config.json|cannot be loaded"),
        (lambda f: (f / "model.safetensors").unlink(), r"holds no \*.safetensors weights"),
        (lambda f: truncate(f / "model.safetensors"), "cannot be loaded, mend or replace its files"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "cannot be loaded, mend or replace its files"),
        (only_pickles, "holds its weights as pytorch_model.bin.*safetensors only"),
        (index_without_shard, "cannot be loaded.*model-00002-of-00002.safetensors"),
        (lambda f: (f / "tokenizer.json").write_text("{nope"), "the tokenizer of .* cannot be loaded, mend it or pass"),
        (lambda f: edit_json(f / "tokenizer_config.json", eos_token=None), "has no EOS token, so no answer can end"),
    ],
)
def test_damaged_folders(folder: Path, damage: Callable[[Path], Any], says: str) -> None:
    damage(folder)
    with pytest.raises(UserError, match=says) as raised:
        load(str(folder), device="cpu")
    assert "\n" not in str(raised.value)


def test_a_tokenizer_larger_than_the_model(tmp_path: Path) -> None:
    save(tmp_path, vocab_size=200)
    with pytest.raises(UserError, match="tokenizer has ids up to 383 but the model has only 200 embeddings"):
        load(str(tmp_path), device="cpu")


def test_a_family_without_a_record_is_loaded_with_the_standard_names(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(lm.KNOWN, "llama")
    loaded = load(str(saved), device="cpu")
    assert (loaded.anatomy.architecture, loaded.anatomy.known) == ("llama", False)


def test_what_cannot_be_named_is_refused_before_the_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tmp_path, "gpt2")
    monkeypatch.delitem(lm.KNOWN, "gpt2")
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"usual names do not fit it \(GPT2LMHeadModel has no module model\.layers"):
        load(str(folder), device="cpu")


def test_an_attention_that_the_family_lacks_is_not_blamed_on_the_files(tmp_path: Path) -> None:
    folder = save(tmp_path, "bloom")
    with pytest.raises(UserError, match="lacks the attention 'sdpa', use another or leave it out"):
        load(str(folder), device="cpu", attention="sdpa")
    assert load(str(folder), device="cpu", attention="eager").anatomy.architecture == "bloom"


def test_blocks_that_do_not_add_up(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Load runs the self-check: with a wrong record it refuses."""
    monkeypatch.setitem(lm.KNOWN, "llama", lm.Architecture(mlp_out="post_attention_layernorm"))
    with pytest.raises(UserError, match="layer 0 of this llama model is not resid_before"):
        load(str(saved), device="cpu")


@pytest.mark.parametrize(
    "path", ["/nowhere/model", "./nowhere", "~/nowhere-at-all", "a/b/c", "bad name!", "https://x.co/a/b"]
)
def test_a_path_that_does_not_exist(path: str) -> None:
    with pytest.raises(UserError, match="does not exist: check it, or give a hub id such as"):
        load(path)


def test_a_file_and_an_empty_path(folder: Path) -> None:
    with pytest.raises(UserError, match="is a file: give the folder"):
        load(str(folder / "config.json"))
    with pytest.raises(UserError, match="the model path is empty"):
        load("")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"device": "toaster"}, "the device 'toaster' is not there: use cpu"),
        ({"device": "cuda:99"}, "the device 'cuda:99' is not there"),
        ({"dtype": "float8"}, "the dtype 'float8' is unknown: use one of float32, bfloat16, float16"),
        ({"attention": "fast"}, "the attention 'fast' is unknown: use one of eager, sdpa, flash_attention_2"),
        ({"revision": "main"}, "revision 'main' belongs to a hub id"),
    ],
)
def test_impossible_options(saved: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        load(str(saved), **options)


def test_flash_attention_that_is_not_installed(saved: Path) -> None:
    if importlib.util.find_spec("flash_attn") or torch.cuda.is_available():
        pytest.skip("flash attention may be had here")
    with pytest.raises(UserError, match="needs a package that is not here, or another attention"):
        load(str(saved), attention="flash_attention_2")


# --- the hub, without the hub ----------------------------------------------------------------------------------------


def test_a_hub_id_is_fetched_without_pickles_or_code(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def snapshot(repo: str, **options: Any) -> str:
        asked.update(options, repo=repo)
        return str(saved)

    monkeypatch.setattr(sources, "snapshot_download", snapshot)
    model = load("someone/a-model", revision="abc", device="cpu")
    assert model.name == asked["repo"] == "someone/a-model"
    assert asked["revision"] == "abc"
    assert "model*.safetensors" in asked["allow_patterns"]
    assert not [pattern for pattern in asked["allow_patterns"] if pattern.endswith((".bin", ".py", "*"))]


@pytest.mark.parametrize("error", [OSError("no route\nto host"), ValueError("gated"), FileNotFoundError("offline")])
def test_a_hub_id_that_cannot_be_had(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot(repo: str, **options: Any) -> str:
        raise error

    monkeypatch.setattr(sources, "snapshot_download", snapshot)
    with pytest.raises(
        UserError, match="someone/a-model at revision v1 is no folder here and could not be had"
    ) as raised:
        load("someone/a-model", revision="v1")
    assert "\n" not in str(raised.value)
    assert raised.value.__cause__ is error


def test_an_attention_that_names_code_on_the_hub_is_refused(folder: Path) -> None:
    edit_json(folder / "config.json", attn_implementation="somebody/kernel")
    with pytest.raises(UserError, match="no code is fetched"):
        load(str(folder))
