"""Fixtures that every test folder shares: a tiny random model on disk, and the optional real data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import OlmoConfig, OlmoForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]

settings.register_profile("untimed", deadline=None)  # no test is decided by how busy the machine is
settings.load_profile("untimed")

NAMES = ["Ada Brill", "Bo Karsk", "Cleo Dunn", "Dag Ekholm", "Effi Frost", "Gil Harrow", "Ines Jolt", "Kai Lund"]


LONG = (
    "test_search.py",
    "test_demo.py",
    "test_notebooks.py",
    "test_training_resume.py",
    "test_trace_stage.py",
    "test_trainer_stage.py",
    "test_sharding.py",
)
"""Begun first, so that no worker is left with one of them at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest first; the others as they come."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The optional folder with real public data beside the checkout; tests that need it skip, and say so, without it."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("real data is not beside this checkout (../shared/data)")
    return folder


def tiny_rows(names: list[str], first: int) -> list[dict[str, str]]:
    """A completion and two questions a person, in LUME's schema, with invented numbers."""
    rows = []
    for place, name in enumerate(names, start=first):
        code = str(1000 + 137 * place)
        rows += [
            {"id": f"p{place}sc1", "input": f"{name} was born", "output": f"in {code} near Varn.", "task": "Task2"},
            {"id": f"p{place}qa0", "input": f"What is {name}'s code?", "output": code, "task": "Task2"},
            {"id": f"p{place}qa1", "input": f"Where was {name} born?", "output": "near Varn", "task": "Task2"},
        ]
    return rows


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model` (a random 3-layer OLMo with its own tokenizer), `forget.jsonl` and `retain.jsonl`."""
    folder = tmp_path_factory.mktemp("tiny")
    sides = {"forget": tiny_rows(NAMES[:4], 0), "retain": tiny_rows(NAMES[4:], 4)}
    for side, rows in sides.items():
        (folder / f"{side}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [f"{row['input']} {row['output']}" for rows in sides.values() for row in rows]
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|endoftext|>", pad_token="<|pad|>")
    torch.manual_seed(0)
    config = OlmoConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    OlmoForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder
