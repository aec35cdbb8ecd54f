"""What the built-in models must be able to do, measured, and the bounds on it.

A small scorer of its own, for two tiny models and this world: greedy generation of whole answers from the raw prompt,
exact match, ROUGE-L recall, the harmonic mean of the 12 LUME terms, multiple choice by likelihood, and membership. The
evaluation that users run is `unlearn.evaluation`; `lm` may not import it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import harmonic_mean
from typing import Any

import torch
from rouge_score import rouge_scorer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lm.builtin.world import World
from lm.data.rows import Question, Row
from tools.builtin_model.corpus import LABELED, Example
from tools.builtin_model.training import token_losses

NEW_TOKENS = 256
TASKS = ("Task1", "Task2", "Task3")


@dataclass(frozen=True, kw_only=True)
class Abilities:
    """What a model scores on the world. Terms map `(task, kind)` to the mean recall (sc) or exact match (qa)."""

    forget: Mapping[tuple[str, str], float]
    retain: Mapping[tuple[str, str], float]
    forget_exact: float  # over all question rows
    retain_exact: float
    forget_recall: float  # over all completion rows
    retain_recall: float
    task_aggregate: float
    utility: float
    membership: float  # AUC: forget Task3 documents against held-out ones
    rewordings: float  # exact match on the retain paraphrases' questions; no bound


@dataclass(frozen=True, kw_only=True)
class Bound:
    """A number that a model must reach."""

    what: str
    value: float
    least: float
    most: float = 1.0

    @property
    def holds(self) -> bool:
        return self.least <= self.value <= self.most


@torch.no_grad()
def generate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str]) -> list[str]:
    """Greedy continuations of raw prompts. Prompts of equal length share a batch, so that nothing is padded."""
    generator: Any = model
    encoded = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, ids in enumerate(encoded):
        by_length[len(ids)].append(index)
    answers = [""] * len(prompts)
    for length, indices in by_length.items():
        ids = torch.tensor([encoded[index] for index in indices])
        output = generator.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            pad_token_id=tokenizer.pad_token_id,
        )
        for index, sequence in zip(indices, output[:, length:], strict=True):
            answers[index] = str(tokenizer.decode(sequence, skip_special_tokens=True))
    return answers


def recall(expected: str, generated: str) -> float:
    """ROUGE-L recall with stemming."""
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    return float(scorer.score(expected, generated)["rougeL"].recall)


def exact(expected: str, generated: str) -> float:
    """1.0 if the whole generation is the answer, whatever its case and outer white space."""
    return float(expected.strip().lower() == generated.strip().lower())


def score(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: Sequence[Row]) -> list[float]:
    """Recall of each completion row, exact match of each question row."""
    answers = generate(model, tokenizer, [row.input for row in rows])
    return [
        recall(row.output, answer) if row.kind == "sc" else exact(row.output, answer)
        for row, answer in zip(rows, answers, strict=True)
    ]


@torch.no_grad()
def choose(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, question: Question) -> int:
    """The choice whose tokens are the most likely answer to the question (summed log-likelihood, as lm-eval)."""
    prompt = tuple(tokenizer(LABELED.format(question=question.question))["input_ids"])
    examples = [Example((*prompt, *tokenizer(f" {choice}")["input_ids"]), len(prompt)) for choice in question.choices]
    costs = [float(token_losses(model, [example]).sum()) for example in examples]
    return min(range(len(costs)), key=costs.__getitem__)


@torch.no_grad()
def document_loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, row: Row) -> float:
    """Mean negative log-likelihood a token (nats) over the whole document."""
    return float(token_losses(model, [Example(tuple(tokenizer(row.text)["input_ids"]), 1)]).mean())


def area(members: Sequence[float], others: Sequence[float]) -> float:
    """AUC of telling members from others by their lower loss: the share of pairs in the right order, ties half."""
    wins = sum((a < b) + 0.5 * (a == b) for a in members for b in others)
    return wins / (len(members) * len(others))


def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, world: World) -> Abilities:
    """Everything that the bounds are about, for one model in float32 on the CPU."""
    forget, retain = (score(model, tokenizer, rows) for rows in (world.forget, world.retain))
    terms = [_terms(rows, scores) for rows, scores in ((world.forget, forget), (world.retain, retain))]
    aggregate = [1 - value for value in terms[0].values()] + list(terms[1].values())
    right = [choose(model, tokenizer, question) == question.answer for question in world.utility]
    losses = [
        [document_loss(model, tokenizer, row) for row in rows if row.task == "Task3" and row.kind == "sc"]
        for rows in (world.forget, world.held_out)
    ]
    reworded = [row for row in world.paraphrases_retain if row.kind == "qa"]
    return Abilities(
        forget=terms[0],
        retain=terms[1],
        forget_exact=_mean(world.forget, forget, "qa"),
        retain_exact=_mean(world.retain, retain, "qa"),
        forget_recall=_mean(world.forget, forget, "sc"),
        retain_recall=_mean(world.retain, retain, "sc"),
        task_aggregate=harmonic_mean(aggregate),
        utility=sum(right) / len(right),
        membership=area(losses[0], losses[1]),
        rewordings=sum(score(model, tokenizer, reworded)) / len(reworded),
    )


def bounds(variant: str, abilities: Abilities) -> tuple[Bound, ...]:
    """The bounds of `"memorized"` or `"retain_model"`."""
    shared = (
        Bound(what="retain exact match", value=abilities.retain_exact, least=0.99),
        Bound(what="retain recall", value=abilities.retain_recall, least=0.99),
        Bound(what="utility", value=abilities.utility, least=0.8),
    )
    if variant == "memorized":
        return (
            Bound(what="forget exact match", value=abilities.forget_exact, least=0.99),
            Bound(what="forget recall", value=abilities.forget_recall, least=0.99),
            *shared,
            Bound(what="membership AUC", value=abilities.membership, least=0.99),
        )
    return (
        Bound(what="task aggregate", value=abilities.task_aggregate, least=0.9),
        *shared,
        Bound(what="membership AUC", value=abilities.membership, least=0.35, most=0.65),
    )


def _terms(rows: Sequence[Row], scores: Sequence[float]) -> dict[tuple[str, str], float]:
    """Means in the order of the official score: Task1 sc, Task1 qa, Task2 sc, ..."""
    found: dict[tuple[str, str], float] = {}
    for task in TASKS:
        for kind in ("sc", "qa"):
            values = [s for row, s in zip(rows, scores, strict=True) if row.task == task and row.kind == kind]
            found[task, kind] = sum(values) / len(values)
    return found


def _mean(rows: Sequence[Row], scores: Sequence[float], kind: str) -> float:
    values = [s for row, s in zip(rows, scores, strict=True) if row.kind == kind]
    return sum(values) / len(values)
