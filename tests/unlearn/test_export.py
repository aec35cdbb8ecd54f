"""What is exported is read back before anything is given up for it, and is the input's own files with other weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny as tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, OlmoForCausalLM

from lm.errors import UserError
from lm.loading import load
from lm.model import ModelSpec
from lm.prompts import PromptSpec
from lm.run_folder import RunFolder
from tests.unlearn.helpers import SMALL, small_config
from unlearn import model_files, unlearn
from unlearn.attacks.config import AttackConfig
from unlearn.merging.config import MergeConfig
from unlearn.merging.stage import run_merge
from unlearn.objectives import Joint
from unlearn.scope.scope import Lora, Scope
from unlearn.stage import run_unlearn

SHORT = replace(SMALL, steps=2)
LARGE = "model.layers.0.self_attn.o_proj.weight"


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model and its rows, to be edited."""
    return Path(shutil.copytree(tiny, tmp_path / "tiny"))


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None takes a key out."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def edit_weight(folder: Path, name: str, value: Tensor) -> None:
    weights = {key: weight.clone() for key, weight in load_file(folder / "model.safetensors").items()}
    save_file({**weights, name: value}, folder / "model.safetensors", metadata={"format": "pt"})


def with_a_large_weight(folder: Path) -> None:
    weight = load_file(folder / "model.safetensors")[LARGE].clone()
    weight[0, 0] = 1e5  # float16 ends at 65,504
    edit_weight(folder, LARGE, weight)


def test_an_export_that_reads_back_as_another_model_is_not_moved_into_place(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = OlmoForCausalLM.save_pretrained

    def damaged(self: Any, folder: Path, **options: Any) -> None:
        name = "model.layers.0.mlp.up_proj.weight"
        weights = {**options["state_dict"], name: options["state_dict"][name] + 1e-6}
        written(self, folder, **{**options, "state_dict": weights})

    monkeypatch.setattr(OlmoForCausalLM, "save_pretrained", damaged)
    with pytest.raises(UserError, match=r"reads back as another model \(model.layers.0.mlp.up_proj.weight first\)"):
        run_unlearn(small_config(tiny, tmp_path / "run", trainer=SHORT))
    assert not (tmp_path / "run" / "model").exists()
    assert RunFolder(tmp_path / "run").checkpoints()
    monkeypatch.undo()
    assert run_unlearn(small_config(tiny, tmp_path / "run", trainer=SHORT, resume=True)).is_dir()


def test_a_type_that_the_weights_do_not_fit_in_costs_no_training(copy: Path, tmp_path: Path) -> None:
    with_a_large_weight(copy / "model")
    config = small_config(copy, tmp_path / "run", trainer=SHORT, save_dtype="float16")
    with pytest.raises(UserError, match=rf"{LARGE} is too large for float16: set save_dtype to bfloat16"):
        run_unlearn(config)
    assert not (tmp_path / "run" / "model").exists()
    assert RunFolder(tmp_path / "run").checkpoints()
    folder = run_unlearn(replace(config, save_dtype="bfloat16", resume=True))
    saved = load(str(folder), dtype="bfloat16", device="cpu").model.get_parameter(LARGE)
    assert saved[0, 0] == torch.tensor(1e5).bfloat16()


def test_a_merge_that_its_type_does_not_hold_is_refused(copy: Path, tmp_path: Path) -> None:
    with_a_large_weight(copy / "model")
    config = MergeConfig(base=str(copy / "model"), models=(str(copy / "model"),), out=str(tmp_path / "run"))
    with pytest.raises(UserError, match=rf"{LARGE} of the merged model is too large"):
        run_merge(replace(config, save_dtype="float16"))
    assert not (tmp_path / "run" / "model").exists()


def test_fp8_weights_are_trained_and_exported_as_plain_ones(copy: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    codes = (load_file(copy / "model" / "model.safetensors")[name] * 100).to(torch.float8_e4m3fn)
    edit_weight(copy / "model", name, codes)
    edit_weight(copy / "model", f"{name}_scale_inv", torch.tensor(0.01))
    edit(copy / "model" / "config.json", quantization_config={"quant_method": "fp8", "activation_scheme": "dynamic"})
    folder = run_unlearn(small_config(copy, tmp_path / "run", trainer=SHORT))  # layer 1 learns, layer 0 is as it was
    assert torch.equal(load_file(folder / "model.safetensors")[name], codes.float() * 0.01)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert torch.equal(model.get_parameter(name), codes.float() * 0.01)
    with pytest.raises(UserError, match=r"is quantized \(fp8\), and plain weights are needed"):
        run_merge(MergeConfig(base=str(copy / "model"), models=(str(folder),), out=str(tmp_path / "merge")))


def test_the_files_beside_the_weights_are_the_inputs_own(copy: Path, tmp_path: Path) -> None:
    """transformers 4 passes over `rope_parameters` in silence and cannot read `TokenizersBackend`; 5 reads the older."""
    edit(copy / "model" / "config.json", rope_parameters=None, rope_theta=500000.0, dtype=None, torch_dtype="float32")
    edit(
        copy / "model" / "tokenizer_config.json",
        tokenizer_class="TokenizersBackend",
        extra_special_tokens=["<|pad|>"],
        own="kept",
    )
    (copy / "model" / "tokenizer.model").write_bytes(b"for other programs")
    (copy / "model" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    folder = run_unlearn(small_config(copy, tmp_path / "run", trainer=SHORT, save_dtype="bfloat16"))
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_theta"] == 500000.0
    assert "rope_parameters" not in config
    assert config["torch_dtype"] == "bfloat16"
    assert "dtype" not in config
    words = json.loads((folder / "tokenizer_config.json").read_text())
    assert words["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert words["own"] == "kept"
    assert words["additional_special_tokens"] == ["<|pad|>"]
    assert "extra_special_tokens" not in words
    for name in ("tokenizer.model", "tokenizer.json", "chat_template.jinja"):
        assert (folder / name).read_bytes() == (copy / "model" / name).read_bytes()


def test_a_tokenizer_config_that_every_version_reads_stays_as_it_is(tmp_path: Path) -> None:
    text = '{"eos_token": "</s>",   "tokenizer_class": "PreTrainedTokenizerFast"}'
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text(text)
    model_files.for_every_version(tmp_path)
    assert (tmp_path / "tokenizer_config.json").read_text() == text


def test_float16_weights_are_not_trained(tiny: Path, tmp_path: Path) -> None:
    """AdamW's second moment of a gradient of 1e-4 is 1e-11 in the first step: 0 in float16, and the step is divided by 1e-8."""
    spec = ModelSpec(path=str(tiny / "model"), dtype="float16", device="cpu")
    with pytest.raises(UserError, match=r"model.dtype is float16, in which AdamW's second moments vanish"):
        small_config(tiny, tmp_path / "run", model=spec)
    with pytest.raises(UserError, match=r"model.dtype is float16, in which AdamW's second moments vanish"):
        unlearn(load(spec), str(tiny / "forget.jsonl"), str(tiny / "retain.jsonl"), trainer=SHORT)
    with pytest.raises(UserError, match=r"retain_model.dtype is float16, in which AdamW's second moments vanish"):
        AttackConfig(retain_model=spec)


def test_a_chat_template_with_tokens_beyond_the_embeddings_is_refused_before_anything_is_written(
    copy: Path, tmp_path: Path
) -> None:
    tokenizer = load(str(copy / "model"), device="cpu").tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(copy / "model")
    with pytest.raises(UserError, match=r"the token '<\|im_start\|>' has the id \d+ and .* only \d+ embeddings"):
        run_unlearn(small_config(copy, tmp_path / "run", prompt=PromptSpec(format="chat")))
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_an_adapter_untied_is_exported_untied(copy: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = tiny_model("llama", tie_word_embeddings=True)
    for folder in (copy / "base", copy / "model"):
        shutil.rmtree(folder, ignore_errors=True)
        model.model.save_pretrained(folder)
        model.tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    get_peft_model(model.model, lora).save_pretrained(copy / "adapter")
    spec = ModelSpec(path=str(copy / "model"), adapter=str(copy / "adapter"), device="cpu")
    scope = Scope(layers=(1,), lora=Lora(rank=2))
    folder = run_unlearn(
        small_config(copy, tmp_path / "run", model=spec, scope=scope, objective=Joint(), trainer=SHORT)
    )
    ends = load_file(folder / "model.safetensors")
    merged = load(spec).model
    assert torch.equal(ends["lm_head.weight"], merged.lm_head.weight)
    assert torch.equal(ends["model.embed_tokens.weight"], merged.model.embed_tokens.weight)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
