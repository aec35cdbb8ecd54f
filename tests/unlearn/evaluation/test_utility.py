"""Multiple choice: log-likelihoods against the slow way, accuracy against lm-eval on the same model object."""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from families import TEXT, byte_level, tiny

from lm.data.rows import Question
from lm.errors import UserError
from lm.model import LanguageModel
from lm.row_files import load_questions
from unlearn.evaluation import utility
from unlearn.evaluation.lm_eval_harness import BUILTIN_TASK, run_lm_eval, write_task
from unlearn.evaluation.questions import letter_prompt, sentence_prompt
from unlearn.generation.batching import Workers


def questions(count: int, seed: int = 0) -> list[Question]:
    """Questions of random words, with answers of different lengths."""
    generator = random.Random(seed)
    words = " ".join(TEXT).split()
    made = []
    for number in range(count):
        choices = tuple(" ".join(generator.sample(words, generator.randint(1, 2))) for _ in range(4))
        text = " ".join(generator.sample(words, 3)) + "?"
        made.append(Question(text, choices, generator.randrange(4), f"subject_{number % 2}"))
    return made


def slow(model: LanguageModel, context: str, answer: str) -> float:
    """Log-probability of `answer` after `context`, token by token, one forward pass each."""
    ids = list(model.tokenizer(context)["input_ids"])
    total = 0.0
    for token in list(model.tokenizer(context + answer)["input_ids"])[len(ids) :]:
        with torch.no_grad():
            total += model.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[token].item()
        ids.append(token)
    return total


def test_log_likelihoods_are_those_of_the_slow_way() -> None:
    model = tiny("olmo", seed=1)
    pairs, expected = [], []
    for question in questions(5):
        for choice in question.choices:
            context = model.tokenizer(question.question)["input_ids"]
            joint = model.tokenizer(f"{question.question} {choice}")["input_ids"]
            pairs.append((context, joint[len(context) :]))
            expected.append(slow(model, question.question, f" {choice}"))
    assert len({len(answer) for _, answer in pairs}) > 2
    assert utility.log_likelihoods(model, pairs, batch_size=3) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("style", ["sentence", "letter"])
def test_a_tokenizer_that_ends_every_text_with_eos_changes_nothing(style: utility.Style) -> None:
    """An EOS behind the context would be scored in place of the answer's first token."""
    asked = questions(30)
    plain = tiny("olmo", seed=1, max_position_embeddings=256)
    ending = replace(plain, tokenizer=byte_level(eos=True))
    assert ending.tokenizer("a")["input_ids"][-1] == ending.tokenizer.eos_token_id
    expected = utility.multiple_choice(plain, asked, style=style)
    assert utility.multiple_choice(ending, asked, style=style) == expected


def test_the_sentence_style_is_what_lm_eval_does(tmp_path: Path) -> None:
    """Same wording, same cut into tokens, same choice: equal accuracy, not nearly equal, on three models."""
    asked = questions(40)
    write_task(tmp_path, asked)
    for seed in range(3):
        model = tiny("olmo", seed=seed, max_position_embeddings=256)
        ours = utility.multiple_choice(model, asked, batch_size=7)
        theirs = run_lm_eval(model, [BUILTIN_TASK], task_dir=tmp_path, batch_size=5)
        assert theirs[BUILTIN_TASK]["acc"] == ours.accuracy
    half = run_lm_eval(model, [BUILTIN_TASK], task_dir=tmp_path, limit=20)
    assert half[BUILTIN_TASK]["acc"] == np.mean(ours.right[:20])


def test_lm_eval_agrees_on_the_builtin_questions(tmp_path: Path) -> None:
    asked = load_questions("builtin:utility")
    model = tiny("olmo", seed=7, max_position_embeddings=256)
    write_task(tmp_path, asked)
    theirs = run_lm_eval(model, [BUILTIN_TASK], task_dir=tmp_path)
    assert theirs[BUILTIN_TASK]["acc"] == utility.multiple_choice(model, asked).accuracy


def test_lm_eval_leaves_the_generators_and_the_model_as_they_were(tmp_path: Path) -> None:
    model = tiny("olmo", max_position_embeddings=256)
    model.model.train()
    write_task(tmp_path, questions(4))
    before = (random.getstate(), torch.random.get_rng_state(), np.random.get_state()[1].tolist())  # noqa: NPY002
    run_lm_eval(model, [BUILTIN_TASK], task_dir=tmp_path)
    assert random.getstate() == before[0]
    assert torch.equal(torch.random.get_rng_state(), before[1])
    assert np.random.get_state()[1].tolist() == before[2]  # noqa: NPY002
    assert model.model.training


def test_an_unknown_task_is_refused(tmp_path: Path) -> None:
    write_task(tmp_path, questions(2))
    with pytest.raises(UserError, match=r"no task .mmlu_abstract_algebr.*did you mean 'mmlu_abstract_algebra'"):
        run_lm_eval(tiny("olmo"), ["mmlu_abstract_algebr"], task_dir=tmp_path)


def test_without_lm_eval_a_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"^lm-eval is not installed: pip install 'palimpsest-unlearning\[eval\]'$"):
        run_lm_eval(tiny("olmo"), [BUILTIN_TASK])


def test_the_wordings() -> None:
    question = Question("What {is} 1+1?", ("1", "2", "3", "4"), 1, "elementary_mathematics")
    assert sentence_prompt(question) == "Question: What {is} 1+1?\nAnswer:"
    assert letter_prompt(question) == (
        "The following are multiple choice questions (with answers) about  elementary mathematics.\n\n"
        "What {is} 1+1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"
    )
    with pytest.raises(UserError, match="11 choices"):
        letter_prompt(Question("?", ("x",) * 11, 0))


def test_the_letter_style_compares_the_next_token_only() -> None:
    model = tiny("olmo", seed=4, max_position_embeddings=256)
    asked = questions(12)
    found = utility.multiple_choice(model, asked, style="letter", batch_size=5)
    letters = [model.tokenizer(f" {letter}")["input_ids"][-1] for letter in "ABCD"]
    for question, chosen in zip(asked, found.chosen, strict=True):
        ids = torch.tensor([model.tokenizer(letter_prompt(question))["input_ids"]])
        with torch.no_grad():
            assert int(model.model(ids).logits[0, -1][letters].argmax()) == chosen
    assert len(set(found.chosen)) > 1


def test_accuracy_counts_questions_and_subjects() -> None:
    model = tiny("olmo", seed=4, max_position_embeddings=256)
    asked = questions(5)
    first = utility.multiple_choice(model, asked)
    wanted = [True, False, True, True, False]
    rigged = [
        Question(each.question, each.choices, chosen if ok else (chosen + 1) % 4, each.subject)
        for each, chosen, ok in zip(asked, first.chosen, wanted, strict=True)
    ]
    found = utility.multiple_choice(model, rigged, batch_size=2)
    assert found.right == tuple(wanted)
    assert found.accuracy == 3 / 5
    assert found.subjects == {"subject_0": pytest.approx(2 / 3), "subject_1": 0.5}
    assert found.truncated == 0


def test_one_token_answers_to_a_question_share_a_forward_pass() -> None:
    model = tiny("olmo", max_position_embeddings=256)
    rows = []
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    done: list[int] = []
    utility.multiple_choice(model, questions(6), style="letter", batch_size=4, progress=done.append)
    assert sum(rows) == 6
    assert sum(done) == 24


def test_a_prompt_that_is_too_long_loses_its_beginning_and_is_counted() -> None:
    model = tiny("olmo", seed=1)  # 64 positions
    long = Question("Anna Kowalska " * 40, ("Zoë", "again"), 0)
    found = utility.multiple_choice(model, [long, *questions(1)])
    assert found.truncated == 1
    kept = model.tokenizer(sentence_prompt(long))["input_ids"]
    answer = model.tokenizer(" Zoë")["input_ids"]
    ids = torch.tensor([[*kept, *answer][:-1][-64:]])
    with torch.no_grad():
        logprobs = model.model(ids).logits[0, -len(answer) :].log_softmax(-1)
    expected = logprobs.gather(1, torch.tensor(answer)[:, None]).sum().item()
    assert utility.log_likelihoods(model, [(kept, answer)])[0] == pytest.approx(expected, abs=1e-5)


def test_a_bos_is_not_scored() -> None:
    plain = tiny("olmo", seed=1)
    model = LanguageModel(plain.model, byte_level(bos=True), plain.anatomy, "bos")
    found = utility.multiple_choice(model, questions(6))
    expected = []
    for question in questions(6):
        sums = [slow(model, sentence_prompt(question), f" {choice}") for choice in question.choices]
        expected.append(int(np.argmax(sums)))
    assert list(found.chosen) == expected


def test_no_questions_and_shares_of_processes() -> None:
    model = tiny("olmo", max_position_embeddings=256)
    with pytest.raises(UserError, match="no questions"):
        utility.multiple_choice(model, [])

    class Second(Workers):
        def gather(self, mine: list) -> list:  # type: ignore[type-arg]
            assert self.share(5) == range(1, 5, 2)
            return [*alone.chosen[:1], mine[0], alone.chosen[2], mine[1], alone.chosen[4]]

    asked = questions(5)
    alone = utility.multiple_choice(model, asked)
    assert utility.multiple_choice(model, asked, workers=Second(1, 2)) == alone
