"""A merged adapter says what the base and the adapter say together, also where the base ties its embedding to its head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import ids, tiny
from peft import LoraConfig, PeftModel, get_peft_model

from lm import UserError, load
from lm.source import adapter


def saved(folder: Path, **lora: Any) -> tuple[str, str]:
    """A tied base and an adapter of it, with random factors."""
    model = tiny("llama", tie_word_embeddings=True)
    model.model.save_pretrained(folder / "base")
    model.tokenizer.save_pretrained(folder / "base")
    torch.manual_seed(0)
    wrapped: Any = get_peft_model(model.model, LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **lora))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    wrapped.save_pretrained(folder / "adapter")
    return str(folder / "base"), str(folder / "adapter")


@pytest.mark.parametrize(
    ("lora", "tied"),
    [
        ({"target_modules": ["lm_head"]}, False),
        ({"target_modules": ["embed_tokens"]}, False),
        ({"target_modules": ["embed_tokens", "lm_head"]}, False),
        ({"target_modules": ["up_proj"], "modules_to_save": ["lm_head"]}, False),
        ({"target_modules": ["up_proj"]}, True),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_tied_model_with_an_adapter_on_one_end(lora: Any, tied: bool, tmp_path: Path) -> None:
    """peft by itself merges into the weight that both ends share; what it computes before that is right: it was trained."""
    base, path = saved(tmp_path, **lora)
    plain = load(base, device="cpu")
    before = {name: weight.clone() for name, weight in plain.model.named_parameters()}
    with torch.no_grad():
        expected = PeftModel.from_pretrained(plain.model, path).eval()(input_ids=ids()).logits
        merged = load(base, adapter=path, device="cpu").model
        torch.testing.assert_close(merged(input_ids=ids()).logits, expected, rtol=1e-4, atol=1e-4)
    assert merged.config.tie_word_embeddings is tied
    if lora["target_modules"] == ["lm_head"]:
        assert torch.equal(merged.get_input_embeddings().weight, before["model.embed_tokens.weight"])


def test_a_merge_that_says_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, path = saved(tmp_path, target_modules=["lm_head"])
    monkeypatch.setattr(adapter, "_untie", lambda model: None)
    with pytest.raises(UserError, match=r"says something else when it is merged \(logits are off by"):
        load(base, adapter=path, device="cpu")
