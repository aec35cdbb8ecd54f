"""A tokenizer cuts text as its tokenizer.json says, beside a model and alone, whatever class its config names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from families import VOCABULARY, tiny
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from lm import UserError, load
from lm.prompts import check_ids

TEXT = "<think>\nOkay, 2023 and 650841823 (x)\n\nWhat's THIS?"
PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def with_pattern(folder: Path, **config: Any) -> Tokenizer:
    """Files of a tokenizer whose pre-tokenizer is not that of the class that its config names."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.decoder = decoders.ByteLevel()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PATTERN), "isolated"), byte_level])
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 4,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 3 + ["What is the number of Ada? It is 555-0137."] * 5, trainer)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer


@pytest.mark.parametrize("family", ["llama", "olmo2", "gpt2"])
def test_beside_a_model_and_alone_the_tokens_are_those_of_the_file(family: str, tmp_path: Path) -> None:
    """transformers 5 makes a `GPT2Tokenizer` anew, with GPT-2's own pre-tokenizer. The file is right: transformers 4 reads it."""
    tiny(family).model.save_pretrained(tmp_path / "model")
    expected = with_pattern(tmp_path / "alone").encode(TEXT).ids
    alone = load(str(tmp_path / "model"), tokenizer=str(tmp_path / "alone"), device="cpu").tokenizer
    for file in (tmp_path / "alone").iterdir():
        shutil.copy(file, tmp_path / "model" / file.name)
    beside = load(str(tmp_path / "model"), device="cpu").tokenizer
    assert alone(TEXT)["input_ids"] == beside(TEXT)["input_ids"] == expected
    assert alone.eos_token == beside.eos_token == "<|endoftext|>"


def test_special_tokens_that_only_the_class_has_stay(tmp_path: Path) -> None:
    tiny("llama").model.save_pretrained(tmp_path)
    with_pattern(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    assert load(str(tmp_path), device="cpu").tokenizer.eos_token == "<|endoftext|>"


def test_a_pad_token_beyond_the_embeddings_is_refused(tmp_path: Path) -> None:
    model = tiny("llama")
    model.model.save_pretrained(tmp_path)
    model.tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    model.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"the pad token '\[PAD\]' has the id 384 and the model only 384 embeddings"):
        load(str(tmp_path), device="cpu")


def test_ids_beyond_the_embeddings_are_named() -> None:
    model = tiny("llama")
    model.tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    check_ids(model, [[0, VOCABULARY - 1], []])
    with pytest.raises(UserError, match=r"the token '<\|im_start\|>' has the id 384 and llama only 384 embeddings"):
        check_ids(model, [[3], [3, VOCABULARY]])
