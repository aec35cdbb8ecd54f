"""How the built-in models are made: the tokenizer, the corpus, the loop and the build. Tiny models; seconds."""

from __future__ import annotations

import hashlib
import random
import shutil
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lm.builtin.knowledge import LABELED
from lm.builtin.world import World, build
from lm.row_files import load_questions, load_rows
from tools.builtin_model import build as building
from tools.builtin_model.bounds import Abilities
from tools.builtin_model.corpus import Corpus, batches
from tools.builtin_model.tokenizer import EOS, save_tokenizer, train_tokenizer, training_texts
from tools.builtin_model.training import Recipe, Shape, new_model, recite, token_losses, train

TINY = Shape(layers=2, hidden=32, intermediate=64, heads=2)


@pytest.fixture(scope="module")
def world() -> World:
    return build(0)


@pytest.fixture(scope="module")
def tokenizer(world: World) -> PreTrainedTokenizerFast:
    return train_tokenizer(world)


@pytest.fixture(scope="module")
def corpus(world: World, tokenizer: PreTrainedTokenizerFast) -> Corpus:
    return Corpus(world, (*world.forget, *world.retain), tokenizer)


# --- the tokenizer


def test_it_is_trained_on_the_texts_that_made_the_shipped_one() -> None:
    """A digest of before some of the unseen people became calibration."""
    for seed, digest in ((0, "d8375e371905e8e1"), (1, "1113d53081a37166")):
        assert hashlib.sha256("\n".join(training_texts(build(seed))).encode()).hexdigest()[:16] == digest


def test_text_goes_round_unchanged(world: World, tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [row.text for rows in (world.forget, world.retain, world.unseen) for row in rows]
    texts += [" Zoë Łukasz Nguyễn", "日本 🦉\n\ttab", "a  b", "<|user|>x<|endoftext|>", "Don't"]
    for text in texts:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    decomposed = unicodedata.normalize("NFD", "Nguyễn Zoë")
    assert tokenizer(decomposed)["input_ids"] == tokenizer("Nguyễn Zoë")["input_ids"]


def test_digits_stand_alone_and_nothing_is_added(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.tokenize("40321") == list("40321")
    assert tokenizer("A b.")["input_ids"] == tokenizer("A b.", add_special_tokens=False)["input_ids"]
    assert tokenizer.bos_token is None
    assert tokenizer.eos_token != tokenizer.pad_token


def test_a_prompt_and_its_answer_have_the_tokens_of_the_whole_text(
    world: World, tokenizer: PreTrainedTokenizerFast
) -> None:
    for row in (*world.forget, *world.paraphrases_retain):
        pieces = [*tokenizer(row.input)["input_ids"], *tokenizer(f" {row.output}")["input_ids"]]
        assert pieces == tokenizer(row.text)["input_ids"]


def test_chat_turns_begin_with_roles_and_only_the_assistant_ends_with_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "Zoë"},
    ]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert text == f"<|system|>Be short.<|user|>Who?<|assistant|>Zoë{EOS}"
    asked = tokenizer.apply_chat_template(turns[:2], tokenize=False, add_generation_prompt=True)
    assert text == f"{asked}Zoë{EOS}"
    assert str(asked).count(EOS) == 0
    with pytest.raises(Exception, match="tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_the_stored_tokenizer_is_the_trained_one(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    save_tokenizer(tokenizer, tmp_path)
    read = AutoTokenizer.from_pretrained(tmp_path)
    text = "<|user|>Łukasz, 12-34<|assistant|>"
    assert read(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert read.chat_template == tokenizer.chat_template
    assert (read.eos_token, read.pad_token, read.bos_token) == (tokenizer.eos_token, tokenizer.pad_token, None)
    assert set(read.all_special_tokens) == set(tokenizer.all_special_tokens)


# --- the corpus


def test_an_epoch_never_shows_what_must_stay_unseen(
    world: World, tokenizer: PreTrainedTokenizerFast, corpus: Corpus
) -> None:
    retain_only = Corpus(world, world.retain, tokenizer)
    texts = [tokenizer.decode(e.ids) for seed in range(12) for e in corpus.epoch(random.Random(seed))]
    retained = [tokenizer.decode(e.ids) for seed in range(12) for e in retain_only.epoch(random.Random(seed))]
    joined, retained_text = "\n".join(texts), "\n".join(retained)
    for row in (*world.paraphrases_forget, *world.paraphrases_retain):
        assert row.kind == "sc" or row.input not in joined
    for person in world.people:
        assert (person.name in joined) == (person.side in ("forget", "retain"))
        assert (person.name in retained_text) == (person.side == "retain")
    for fact in world.general:
        assert fact.question in joined
        assert (LABELED.format(question=fact.question) in joined) == fact.labeled


def test_the_loss_counts_answers_and_whole_documents(
    world: World, tokenizer: PreTrainedTokenizerFast, corpus: Corpus
) -> None:
    row = world.forget[1]
    assert row.kind == "qa"
    for example, answer in ((corpus.pair(row.input, row.output), f" {row.output}{EOS}"),):
        assert tokenizer.decode(example.ids[example.start :]) == answer
        assert tokenizer.decode(example.ids[: example.start]) == row.input
    chat = corpus.chat(row.input, row.output)
    assert tokenizer.decode(chat.ids) == f"<|user|>{row.input}<|assistant|>{row.output}{EOS}"
    assert tokenizer.decode(chat.ids[chat.start :]) == f"{row.output}{EOS}"
    document = corpus.document(world.forget[0])
    assert document.start == 1
    assert tokenizer.decode(document.ids) == world.forget[0].text + EOS


def test_batches_hold_every_example_once_within_their_size(corpus: Corpus) -> None:
    examples = corpus.epoch(random.Random(0))
    found = batches(examples, 1024, random.Random(1))
    assert sorted(e.ids for batch in found for e in batch) == sorted(e.ids for e in examples)
    assert all(len(batch) * max(len(e.ids) for e in batch) <= 1024 for batch in found)
    assert found == batches(examples, 1024, random.Random(1))


# --- the loop


def test_training_is_repeatable_and_leaves_the_global_random_state(
    corpus: Corpus, tokenizer: PreTrainedTokenizerFast
) -> None:
    recipe = Recipe(steps=6, tokens=256, warmup_steps=2, check_every=3)
    before = torch.random.get_rng_state()
    losses: list[list[float]] = []
    weights = []
    for _ in range(2):
        seen: list[float] = []
        model = new_model(tokenizer, TINY, 0)
        train(model, corpus, recipe, lambda state, seen=seen: seen.append(state.loss))  # type: ignore[misc]
        losses.append(seen)
        weights.append(model.model.embed_tokens.weight.detach().clone())
    assert losses[0] == losses[1]
    assert len(losses[0]) == 6
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], new_model(tokenizer, TINY, 0).model.embed_tokens.weight)
    assert torch.equal(before, torch.random.get_rng_state())


def test_training_memorizes_and_stops_early(world: World, tokenizer: PreTrainedTokenizerFast) -> None:
    small = Corpus(replace(world, general=()), world.retain[:3], tokenizer)
    recipe = Recipe(steps=400, tokens=512, learning_rate=5e-3, warmup_steps=10, check_every=20, confidence=0.5)
    steps: list[int] = []
    model = new_model(tokenizer, TINY, 0)
    train(model, small, recipe, lambda state: steps.append(state.step))
    found = recite(model, [small.pair(row.input, row.output) for row in small.rows])
    assert found.share == 1.0
    assert found.confidence >= 0.5
    assert len(steps) < 400


def test_token_losses_do_not_depend_on_the_batch(corpus: Corpus, tokenizer: PreTrainedTokenizerFast) -> None:
    model = new_model(tokenizer, TINY, 0)
    examples = [corpus.document(corpus.rows[0]), corpus.pair("Who?", "Zoë"), corpus.chat("Who?", "me")]
    together = token_losses(model, examples)
    alone = torch.cat([token_losses(model, [example]) for example in examples])
    torch.testing.assert_close(together, alone)
    assert len(together) == sum(len(example.ids) - example.start for example in examples)


# --- the build


def _abilities(**changed: float) -> Abilities:
    good = Abilities(
        forget_exact=1.0, retain_exact=1.0, forget_recall=1.0, retain_recall=1.0,
        task_aggregate=0.95, utility=1.0, membership=1.0, rewordings=1.0,
    )  # fmt: skip
    return replace(good, **changed)  # type: ignore[arg-type]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Let the build train for two steps only and find `retain_exact` as given, whatever the model can do."""

    def prepare(retain_exact: float) -> None:
        def found(folder: Path, world: World) -> Abilities:
            membership = 1.0 if folder.name == "memorized" else 0.5
            return _abilities(retain_exact=retain_exact, membership=membership)

        monkeypatch.setattr(building, "measure_stored", found)

    return prepare


def test_a_build_replaces_the_folder_only_when_the_bounds_hold(tmp_path: Path, quick: Callable[[float], None]) -> None:
    out = tmp_path / "weights"
    out.mkdir()
    (out / "old").write_text("kept")
    recipe = Recipe(steps=2, tokens=256)
    quick(0.5)
    missed = building.build_all(out, recipe=recipe, shape=TINY, side_by_side=False)
    assert "NO" in building.table(missed)
    assert [path.name for path in out.iterdir()] == ["old"]
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]
    quick(1.0)
    building.build_all(out, recipe=recipe, shape=TINY, side_by_side=False)
    assert sorted(path.name for path in out.iterdir()) == ["data", "memorized", "retain_model"]
    assert load_rows(out / "data" / "forget.jsonl") == build(0).forget
    assert (out / "memorized" / "model.safetensors").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]


def test_models_that_are_there_are_not_built_again(
    tmp_path: Path, quick: Callable[[float], None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = Recipe(steps=2, tokens=256), tmp_path / "world"
    quick(1.0)
    building.build_all(out, seed=3, recipe=recipe, shape=TINY, side_by_side=False)
    assert building.has_models(out, seed=3, recipe=recipe, shape=TINY)
    assert not building.has_models(out, seed=4, recipe=recipe, shape=TINY)
    assert not building.has_models(out, seed=3, recipe=replace(recipe, steps=3), shape=TINY)
    assert not building.has_models(out, seed=3, recipe=recipe)
    shutil.rmtree(out / "data")  # as an earlier version left it
    monkeypatch.setattr(building, "Recipe", lambda: recipe)
    monkeypatch.setattr(building, "Shape", lambda: TINY)
    asked: list[int] = []
    monkeypatch.setattr(building, "build_all", lambda out, *, seed, side_by_side: asked.append(seed) or [])
    assert building.main(["--out", str(out), "--seed", "3"]) == 0
    assert "not built again" in capsys.readouterr().out
    assert asked == []
    assert load_rows(out / "data" / "calibration.jsonl") == build(3).calibration
    assert building.main(["--out", str(out), "--seed", "3", "--again"]) == 0
    (out / "retain_model" / "model.safetensors").unlink()
    assert building.main(["--out", str(out), "--seed", "3"]) == 0
    assert asked == [3, 3]


def test_the_rows_of_a_world_can_be_had_without_its_models(
    tmp_path: Path, quick: Callable[[float], None], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "world"
    for _ in range(2):  # what is there is replaced
        assert building.main(["--data-only", "--seed", "3", "--out", str(out)]) == 0
        assert str(out / "data") in capsys.readouterr().out
        assert [path.name for path in out.iterdir()] == ["data"]
    mine = tmp_path / "mine" / "data" / "forget.jsonl"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    assert building.main(["--data-only", "--out", str(tmp_path / "mine")]) == 2
    assert "is left alone" in capsys.readouterr().err
    assert mine.read_text() == "mine"
    world = build(3)
    for part, rows in world.parts.items():
        assert load_rows(out / "data" / f"{part}.jsonl") == rows
    assert load_questions(out / "data" / "utility.jsonl") == world.utility
    quick(1.0)
    building.build_all(out, seed=3, recipe=Recipe(steps=2, tokens=256), shape=TINY, side_by_side=False)
    assert building.main(["--data-only", "--seed", "4", "--out", str(out)]) == 2
    assert "holds models of world 3" in capsys.readouterr().err
    assert load_rows(out / "data" / "forget.jsonl") == world.forget


def test_a_place_that_cannot_be_written_ends_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    for words in ([], ["--data-only"]):
        assert building.main(["--out", str(tmp_path / "file" / "weights"), *words]) == 2
        assert capsys.readouterr().err.startswith("error: ")
