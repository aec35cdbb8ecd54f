"""Scores of the model in training on rows that it is not trained on: they choose the checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from lm.data.rows import Row
from lm.devices import sum_over_processes
from lm.errors import UserError
from lm.model import LanguageModel
from lm.prompts import Encoded, PromptSpec
from lm.row_files import canonical_id, check_disjoint
from unlearn.evaluation.lume import check_rows, score
from unlearn.forward.passes import Passes
from unlearn.generation.batching import Workers
from unlearn.generation.generate import generate
from unlearn.objectives import Loss, RetainMemory
from unlearn.training.batches import dealt
from unlearn.training.config import TrainerConfig
from unlearn.training.side import encode_rows

BothSides = tuple[Sequence[Row], Sequence[Row]]
"""Forget rows and retain rows."""


def check_validation_rows(rows: BothSides, trained: Sequence[Row]) -> None:
    """Raise UserError for validation rows that are on both sides, that no score is defined for, or that are trained on."""
    forget, retain = rows
    check_disjoint(forget, retain)
    check_rows((*forget, *retain))
    known = {canonical_id(row.id) for row in trained}
    twice = [row.id for row in (*forget, *retain) if canonical_id(row.id) in known]
    if twice:
        raise UserError(
            f"validation row {twice[0]} is also trained on: the checkpoint would be chosen on training rows"
        )


def check_unseen(calibration: Sequence[Row], trained: Sequence[Row]) -> None:
    """Raise UserError for calibration rows that are trained on: they would not show what unseen rows look like."""
    known = {canonical_id(row.id) for row in trained} | {row.text for row in trained}
    twice = [row.id for row in calibration if canonical_id(row.id) in known or row.text in known]
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

    def __call__(self) -> dict[str, float]:
        """`task_aggregate` (not for lowest_joint_loss), and `joint_loss`, the weighted cross-entropies, with its parts."""
        with torch.no_grad():
            forget_ce, _ = self._cross_entropy(self.rows[0])
            retain_ce, batch_means = self._cross_entropy(self.rows[1])
            answers: dict[str, float] = {}
            if self.trainer.checkpoint != "lowest_joint_loss":  # which needs no answers, and they are most of the time
                workers = Workers(self.acc.process_index, self.acc.num_processes)
                forget, retain = (self._answers(rows, workers) for rows in self.rows)
                answers["task_aggregate"] = score(forget, retain).task_aggregate
        weight = self.loss.weight.at(RetainMemory(), retain_ce, retain_ce)
        return {
            **answers,
            "joint_loss": -forget_ce + weight * retain_ce,
            "forget_ce": forget_ce,
            "retain_ce": retain_ce,
            "retain_batch_means": batch_means,
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

    def _cross_entropy(self, rows: Sequence[Row]) -> tuple[float, float]:
        encoded = encode_rows(self.model, rows, self.prompt)
        return mean_cross_entropy(self.acc, self.model, encoded, self.trainer.micro_batch)


def mean_cross_entropy(
    acc: Accelerator, model: LanguageModel, rows: Sequence[Encoded], size: int
) -> tuple[float, float]:
    """Mean cross-entropy over the supervised tokens of all rows (nats a token), and the sum of the means of micro-batches of
    `size` consecutive rows, however many processes there are."""
    passes = Passes(acc, model.model, model)
    sums = torch.zeros(3, dtype=torch.float64, device=acc.device)
    for micro in dealt(rows, size, acc.process_index, acc.num_processes):
        logprobs = passes.logprobs(micro)
        loss, tokens = -sum((float(each.sum()) for each in logprobs), 0.0), sum(len(each) for each in logprobs)
        sums += torch.tensor([loss, tokens, loss / max(tokens, 1)], dtype=torch.float64, device=sums.device)
    total, count, means = sum_over_processes(sums).tolist()
    return total / max(count, 1.0), means
