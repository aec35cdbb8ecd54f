"""Scores of the model in training on rows that it is not trained on: they choose the checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from torch import Tensor

from lm.data.rows import Row
from lm.devices import sum_over_processes
from lm.errors import UserError
from lm.model import LanguageModel
from lm.prompts import Encoded, PromptSpec
from lm.row_files import canonical_id, check_disjoint, row_name
from unlearn.evaluation.lume import check_rows, score, words_for
from unlearn.forward.passes import Passes
from unlearn.generation.batching import Workers
from unlearn.generation.generate import generate
from unlearn.objectives import Loss, RetainMemory, Weight
from unlearn.training.batches import dealt
from unlearn.training.config import TrainerConfig
from unlearn.training.side import encode_rows

BothSides = tuple[Sequence[Row], Sequence[Row]]
"""Forget rows and retain rows."""
PUBLISHED_BATCH = 8
"""Rows of an evaluation batch in the published code of the joint method, which leaves it at its library's default."""


def check_validation_rows(rows: BothSides, trained: Sequence[Row]) -> None:
    """Raise UserError for validation rows that are on both sides, that no score is defined for, or that are trained on."""
    forget, retain = rows
    check_disjoint(forget, retain)
    check_rows((*forget, *retain))
    known = {canonical_id(row.id) for row in trained}
    twice = [row_name(row) for row in (*forget, *retain) if canonical_id(row.id) in known]
    if twice:
        raise UserError(
            f"validation row {twice[0]} is also trained on: the checkpoint would be chosen on training rows"
        )


def check_unseen(calibration: Sequence[Row], trained: Sequence[Row]) -> None:
    """Raise UserError for calibration rows that are trained on: they would not show what unseen rows look like."""
    known = {canonical_id(row.id) for row in trained} | {row.text for row in trained}
    twice = [row_name(row) for row in calibration if canonical_id(row.id) in known or row.text in known]
    if twice:
        raise UserError(
            f"calibration row {twice[0]} is also a forget or retain row: give rows of people that the model never saw"
        )


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Called by the trainer every `evaluate_every` steps, on every process; gives named numbers.

    Attributes:
        rows: both sides.
        loss: whose weight the joint loss takes.
        trainer: whose `checkpoint` says which numbers are needed.
        max_new_tokens: the longest answer that is generated, in tokens.
        batch_size: prompts generated at once on one process.
    """

    acc: Accelerator
    model: LanguageModel
    rows: BothSides
    prompt: PromptSpec
    loss: Loss
    trainer: TrainerConfig
    max_new_tokens: int
    batch_size: int

    def __call__(self, memory: RetainMemory) -> dict[str, float]:
        """`task_aggregate` (not for lowest_joint_loss; see `unlearn.evaluation.lume.words_for`), and `joint_loss` with its parts.

        The joint loss is that of the mean cross-entropies, the retain side weighed as in epoch 0; with
        `trainer.weighting: micro_batch_mean` it is the published code's (`published_joint_loss`), whose weight knows `memory`.
        """
        with torch.no_grad():
            forget, retain = (self._cross_entropies(rows) for rows in self.rows)
            forget_ce, retain_ce = mean(forget), mean(retain)
            answers: dict[str, float] = {}
            if self.trainer.checkpoint != "lowest_joint_loss":  # which needs no answers, and they are most of the time
                workers = Workers(self.acc.process_index, self.acc.num_processes)
                answered = [self._answers(rows, workers) for rows in self.rows]
                answers["task_aggregate"] = score(
                    answered[0], answered[1], words=words_for((*self.rows[0], *self.rows[1]))
                ).task_aggregate
        batches = published_batches(forget, retain)
        weight = self.loss.weight.at(RetainMemory(), retain_ce, retain_ce)
        published = self.trainer.weighting == "micro_batch_mean"
        return {
            **answers,
            "joint_loss": published_joint_loss(batches, self.loss.weight, memory)
            if published
            else -forget_ce + weight * retain_ce,
            "forget_ce": forget_ce,
            "retain_ce": retain_ce,
            "retain_batch_means": sum(mean(retain) for _, retain in batches if len(retain)),
            "retain_rows": float(len(self.rows[1])),
        }

    def _answers(self, rows: Sequence[Row], workers: Workers) -> list[dict[str, str]]:
        texts = generate(
            self.model,
            [row.input for row in rows],
            prompt=self.prompt,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            workers=workers,
        )
        return [
            {"id": row.id, "task": row.task, "expected_output": row.output, "model_output": text}
            for row, text in zip(rows, texts, strict=True)
        ]

    def _cross_entropies(self, rows: Sequence[Row]) -> Tensor:
        by_task = sorted(rows, key=lambda row: row.task)
        encoded = encode_rows(self.model, by_task, self.prompt)
        return cross_entropies(self.acc, self.model, encoded, self.trainer.micro_batch)


def cross_entropies(acc: Accelerator, model: LanguageModel, rows: Sequence[Encoded], size: int) -> Tensor:
    """(rows, 2) float64, the same on every process: each row's summed cross-entropy (nats) and its supervised tokens.

    `size` rows are asked about at once.
    """
    passes = Passes(acc, model.model, model)
    sums = torch.zeros(len(rows), 2, dtype=torch.float64, device=acc.device)
    for micro in dealt(range(len(rows)), size, acc.process_index, acc.num_processes):
        logprobs = passes.logprobs([rows[place] for place in micro])
        for place, row in zip(micro, logprobs, strict=True):
            sums[place] = torch.tensor([-float(row.sum()), len(row)], dtype=torch.float64)
    return sum_over_processes(sums).cpu()


def mean(rows: Tensor) -> float:
    """Nats a token over (rows, 2) sums and tokens."""
    total, tokens = map(float, rows.sum(0))
    return total / max(tokens, 1.0)


def published_batches(forget: Tensor, retain: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The evaluation batches of the joint method's published code: 8 rows each of the forget rows and then the retain rows,
    each side by task; in every batch the (rows, 2) of either side, which may be empty. Badge: **faithful**."""
    both, sides = torch.cat([forget, retain]), torch.arange(len(forget) + len(retain)) < len(forget)
    pieces = zip(torch.split(both, PUBLISHED_BATCH), torch.split(sides, PUBLISHED_BATCH), strict=True)
    return [(rows[is_forget], rows[~is_forget]) for rows, is_forget in pieces]


def published_joint_loss(batches: Sequence[tuple[Tensor, Tensor]], weight: Weight, memory: RetainMemory) -> float:
    """The loss by which the joint method's published code chooses a checkpoint: each batch's own, with its own retain weight,
    averaged over rows. `memory` is read and stays as it is. Badge: **faithful**."""
    total = 0.0
    for forget, retain in batches:
        loss = -mean(forget)  # 0 without rows
        if len(retain):
            loss += weight.at(replace(memory), mean(retain), mean(retain)) * mean(retain)
        total += loss * (len(forget) + len(retain))
    return total / max(sum(len(forget) + len(retain) for forget, retain in batches), 1)
