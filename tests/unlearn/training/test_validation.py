"""Scores of the model in training: the published code's evaluation, written out batch by batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from lm.data.rows import Row
from lm.loading import load
from lm.model import LanguageModel
from lm.prompts import PromptSpec, encode_pair
from lm.row_files import load_rows
from tests.unlearn.helpers import SMALL, reworded, small_config
from unlearn.objectives import Adaptive, Dual, Fixed, RetainMemory
from unlearn.stage import run_unlearn
from unlearn.unlearning import Task, devices
from unlearn.validation import published_batches, published_joint_loss

MIXED = replace(
    SMALL, weighting="micro_batch_mean", pairing="mixed_shuffle", evaluate_every=1, checkpoint="lowest_joint_loss"
)
AUTHORS = Adaptive(round_alpha=True, reference="authors_sum_over_rows")


def mixed_tasks(rows: Sequence[Row]) -> list[Row]:
    """The same rows under two tasks by turns."""
    return [replace(row, task=f"Task{2 - place % 2}") for place, row in enumerate(rows)]


def token_losses(model: LanguageModel, row: Row) -> torch.Tensor:
    """(answer tokens,) the cross-entropy of each, by the network alone."""
    text = encode_pair(model.tokenizer, row.input, row.output, PromptSpec())
    ids = torch.tensor([text.ids])
    with torch.no_grad():
        logits = model.model(input_ids=ids).logits[0, :-1].double()
    return cross_entropy(logits, ids[0, 1:], reduction="none")[max(text.answer_start - 1, 0) :]


def published_evaluation(
    losses: dict[str, torch.Tensor], forget: list[Row], retain: list[Row], seen: tuple[float, float] | None
) -> tuple[float, float, int]:
    """The published loop over an evaluation: its loss, and what it adds to the sum of batch means and to the count of rows.

    Eight rows a batch, forget rows by task and then retain rows by task; each batch's loss counts once a row. `seen` are sum
    and count at the end of epoch 0, or None in epoch 0.
    """
    dataset = [(-1, row) for row in sorted(forget, key=lambda row: row.task)]
    dataset += [(1, row) for row in sorted(retain, key=lambda row: row.task)]
    every, added, count = [], 0.0, 0
    for first in range(0, len(dataset), 8):
        batch = dataset[first : first + 8]
        negative = [losses[row.id] for sign, row in batch if sign == -1]
        positive = [losses[row.id] for sign, row in batch if sign == 1]
        loss = -float(torch.cat(negative).mean()) if negative else 0.0
        if positive:
            kept = float(torch.cat(positive).mean())
            multiplier = 1.2
            if seen is None:
                added, count = added + kept, count + len(positive)
            elif kept > seen[0] / seen[1]:
                multiplier = min(max(round(0.3 * 6 ** (kept - seen[0] / seen[1]) + 0.8, 1), 1.2), 2.3)
            loss += multiplier * kept
        every += [loss] * len(batch)
    return sum(every) / len(every), added, count


@pytest.mark.parametrize("micro_batch", [3, 64])
def test_the_published_evaluation_has_batches_of_eight_forget_rows_first(tiny: Path, micro_batch: int) -> None:
    """Whatever the micro-batch is: it says how much fits into memory, and not what is measured."""
    model = load(str(tiny / "model"), device="cpu")
    forget, retain = (mixed_tasks(load_rows(str(tiny / f"{side}.jsonl"))[:11]) for side in ("forget", "retain"))
    losses = {row.id: token_losses(model, row) for row in (*forget, *retain)}
    recipe = small_config(tiny, tiny / "none", retain_weight=AUTHORS).recipe
    recipe = replace(recipe, trainer=replace(MIXED, micro_batch=micro_batch))
    task = Task.of(model, forget, retain, recipe)
    validate = task.validation(devices(recipe, cpu=True), (forget, retain))

    expected, added, count = published_evaluation(losses, forget, retain, None)
    scores = validate(RetainMemory())
    assert scores["joint_loss"] == pytest.approx(expected, rel=1e-5)
    assert scores["retain_batch_means"] == pytest.approx(added, rel=1e-5)
    assert scores["retain_rows"] == count == len(retain)

    later = RetainMemory(epoch=1, batch_means=added, rows=float(count))
    expected, _, _ = published_evaluation(losses, forget, retain, (added, count))
    assert validate(later)["joint_loss"] == pytest.approx(expected, rel=1e-5)
    assert later == RetainMemory(epoch=1, batch_means=added, rows=float(count)), "looking changes nothing"


def test_batches_by_hand() -> None:
    forget = torch.tensor([[1.0, 1.0]] * 9)
    retain = torch.tensor([[4.0, 2.0]] * 6 + [[10.0, 1.0]] * 2)
    batches = published_batches(forget, retain)
    assert [(len(one), len(other)) for one, other in batches] == [(8, 0), (1, 7), (0, 1)]
    # Means 1 | 1 and (6 x 4 + 10) / 13 | 10, counted 8, 8 and 1 times.
    expected = (8 * -1.0 + 8 * (-1.0 + 2 * 34 / 13) + 2 * 10.0) / 17
    assert published_joint_loss(batches, Fixed(factor=2.0), RetainMemory()) == pytest.approx(expected)
    memory = RetainMemory(dual=1.0)
    published_joint_loss(batches, Dual(), memory)
    assert memory.dual == 1.0


def test_an_evaluation_after_the_last_step_of_epoch_0_is_of_the_next(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The published code truncates how many epochs are done, which then is 1: such a pass adds nothing to the reference."""
    epochs: list[int] = []
    monkeypatch.setattr(Adaptive, "observe_validation", lambda self, memory, scores: epochs.append(memory.epoch))
    trainer = replace(MIXED, batch=12, micro_batch=12, steps=None, epochs=2)
    config = small_config(tiny, tmp_path / "run", trainer=trainer, validation=reworded(tiny, tmp_path))
    run_unlearn(replace(config, retain_weight=AUTHORS))  # 24 rows: two steps an epoch
    assert epochs == [0, 1, 1, 2]
