"""What a model still knows: multiple-choice accuracy, by this project's own scorer or (`run_lm_eval`) by lm-eval.

Two styles. `sentence` scores each whole answer after a question, as lm-eval's multiple-choice tasks do; a test holds
the two equal. `letter` scores the letter of each answer, as the MMLU code that the SemEval-2025 Task 4 organizers used.
Badge: faithful to both, but with zero shots: the public MMLU file has no questions to take shots from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.utils.rnn import pad_sequence

from lm.data.rows import Question
from lm.errors import UserError
from lm.model import LanguageModel
from lm.prompts import PromptSpec, check_ids, encode_prompt, max_positions
from unlearn.evaluation.lm_eval_harness import run_lm_eval
from unlearn.evaluation.questions import LETTERS, letter_prompt, sentence_prompt
from unlearn.generation.batching import ONE_PROCESS, Workers, evaluating, sorted_batches, unless_sharded

__all__ = ["Style", "Utility", "log_likelihoods", "multiple_choice", "run_lm_eval"]

Style = Literal["sentence", "letter"]
Pairs = list[tuple[list[int], list[int]]]
"""One question as token ids: for each answer the context and the continuation."""


@dataclass(frozen=True, kw_only=True)
class Utility:
    """Accuracy over questions, and what it was made of.

    Attributes:
        accuracy: right answers over questions, each question counting once (so subjects count by their size).
        chosen: the index of the chosen answer, one a question; the first of equals.
        right: whether it was the right one.
        subjects: accuracy by subject.
        truncated: questions whose prompt was longer than the model's context and lost its beginning.
    """

    accuracy: float
    chosen: tuple[int, ...]
    right: tuple[bool, ...]
    subjects: dict[str, float]
    truncated: int


def multiple_choice(
    model: LanguageModel,
    questions: Sequence[Question],
    *,
    style: Style = "sentence",
    batch_size: int = 32,
    progress: Callable[[int], object] | None = None,
    workers: Workers = ONE_PROCESS,
) -> Utility:
    """Accuracy of choosing the answer with the highest summed log-probability.

    Args:
        style: `sentence`: the whole answer, after `Question: ...\\nAnswer:`. `letter`: `" A"` to `" J"`, after the
            question with its lettered answers under MMLU's headline.
        batch_size: sequences a forward pass; a sentence-style question is one sequence an answer.
        progress: called with the number of sequences done since the last call.
        workers: which process this is; each takes a share of the questions and all return the whole result.
    """
    if not questions:
        raise UserError("there are no questions: give a file with at least one, or leave utility out")
    pairs = [(_letter if style == "letter" else _sentence)(model, question) for question in questions]
    limit = max_positions(model)
    workers = unless_sharded(workers, model)
    mine = workers.share(len(pairs))
    likelihoods = _answer_likelihoods(model, [pairs[index] for index in mine], limit, batch_size, progress)
    chosen = workers.gather([int(np.argmax(each)) for each in likelihoods])
    right = tuple(pick == question.answer for pick, question in zip(chosen, questions, strict=True))
    subjects = sorted({question.subject for question in questions})
    return Utility(
        accuracy=float(np.mean(right)),
        chosen=tuple(chosen),
        right=right,
        subjects={
            name: float(
                np.mean([ok for ok, question in zip(right, questions, strict=True) if question.subject == name])
            )
            for name in subjects
        },
        truncated=sum(limit is not None and max(len(c) + len(a) - 1 for c, a in each) > limit for each in pairs),
    )


def log_likelihoods(
    model: LanguageModel,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch_size: int = 32,
    progress: Callable[[int], object] | None = None,
) -> NDArray[np.float64]:
    """Summed log-probability, in nats, of each continuation's tokens after its context's. Shape (pairs,).

    Contexts and continuations are token ids, at least one each. What is too long for the model loses its beginning.
    Pairs that need the same forward pass (one-token answers to one question) share it.
    """
    limit = max_positions(model)
    check_ids(model, ([*context, *continuation] for context, continuation in pairs))
    inputs: dict[tuple[int, ...], list[int]] = {}
    for index, (context, continuation) in enumerate(pairs):
        seen = (*context, *continuation)[:-1]
        inputs.setdefault(seen if limit is None else seen[-limit:], []).append(index)
    sequences = list(inputs)
    sums = np.zeros(len(pairs))
    with evaluating(model):
        for batch in sorted_batches([len(sequence) for sequence in sequences], batch_size):
            tokens = [torch.tensor(sequences[at]) for at in batch]
            padded = pad_sequence(
                tokens, batch_first=True
            )  # on the right: under causal attention nothing earlier sees it
            logits = model.model(input_ids=padded.to(model.device), use_cache=False).logits
            for row, at in enumerate(batch):
                length = len(sequences[at])
                for index in inputs[sequences[at]]:
                    answer = torch.tensor(pairs[index][1], device=logits.device)
                    logprobs = logits[row, length - len(answer) : length].float().log_softmax(dim=-1)
                    sums[index] = logprobs.gather(1, answer[:, None]).sum().item()
                if progress is not None:
                    progress(len(inputs[sequences[at]]))
    return sums


def _answer_likelihoods(
    model: LanguageModel,
    questions: Sequence[Pairs],
    limit: int | None,
    batch_size: int,
    progress: Callable[[int], object] | None,
) -> list[NDArray[np.float64]]:
    """For each question the log-likelihood of each of its answers."""
    longest = max((len(answer) for each in questions for _, answer in each), default=0)
    if limit is not None and longest > limit:
        raise UserError(
            f"an answer of {longest} tokens is longer than the {limit} that {model.name} can read: shorten it"
        )
    sums = log_likelihoods(
        model, [pair for each in questions for pair in each], batch_size=batch_size, progress=progress
    )
    cuts = np.cumsum([len(each) for each in questions])[:-1]
    return list(np.split(sums, cuts)) if questions else []


def _sentence(model: LanguageModel, question: Question) -> Pairs:
    """Context and answer as lm-eval cuts them: the answer is what the joint tokens have beyond the context's."""
    prompt = sentence_prompt(question)
    context = _ids(model, prompt)
    return [(context, _ids(model, f"{prompt} {choice}")[len(context) :]) for choice in question.choices]


def _letter(model: LanguageModel, question: Question) -> Pairs:
    """Context and the last token of each letter with its space."""
    context = _ids(model, letter_prompt(question))
    letters = [f" {LETTERS[index]}" for index in range(len(question.choices))]
    return [(context, model.tokenizer(text, add_special_tokens=False)["input_ids"][-1:]) for text in letters]


def _ids(model: LanguageModel, text: str) -> list[int]:
    """With the BOS that the tokenizer may add, without an EOS: the text goes on."""
    return encode_prompt(model.tokenizer, text, PromptSpec())
