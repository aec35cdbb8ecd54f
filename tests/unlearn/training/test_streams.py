"""Orders of three streams, of folds and of late forget rows, beside sets and counts by hand."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from lm.errors import UserError
from unlearn.training.batches import PairedBatches, StepRows
from unlearn.training.config import TrainerConfig
from unlearn.training.schedule import forget_weight
from unlearn.training.streams import FoldedBatches, LateBatches, StreamBatches, deal_folds

STREAMS = TrainerConfig(pairing="streams", batch=20, forget_share=0.1, general_share=0.5)


def test_a_step_has_its_share_of_each_stream_and_an_epoch_every_row() -> None:
    order = STREAMS.batches(forget=6, retain=21, general=1000)
    assert order.total(2) == 6, "three steps see each forget row, and each retain row"
    steps = [order.step(step).order for step in range(3)]
    for rows in steps:
        kinds = Counter("forget" if is_forget else "retain" if row < 21 else "general" for is_forget, row in rows)
        assert kinds == {"forget": 2, "retain": 8, "general": 10}
    forget = [row for rows in steps for is_forget, row in rows if is_forget]
    assert sorted(forget) == list(range(6))
    retain = [row for rows in steps for is_forget, row in rows if not is_forget and row < 21]
    assert set(retain) == set(range(21)), "the three rows beyond an epoch come from the next"
    general = [row for rows in steps for is_forget, row in rows if not is_forget and row >= 21]
    assert len(set(general)) == 30
    assert [order.epoch(step) for step in range(7)] == [0, 0, 0, 1, 1, 1, 2]


def test_without_retain_rows_or_general_text_the_others_take_their_place() -> None:
    assert StreamBatches.of_shares(
        forget=5, retain=0, general=9, batch=20, forget_share=0.1, general_share=0.5, seed=0
    ).each == (2, 0, 18)
    assert STREAMS.batches(forget=5, retain=9).each == (2, 18, 0)  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="no row is left"):
        replace(STREAMS, batch=2).batches(forget=5, retain=9, general=9)


def test_a_stage_forgets_its_folds_and_retains_the_others() -> None:
    fold, retain, general = (0, 0, 1, 2, 1, 2), 4, 3
    order = FoldedBatches(
        inner=lambda some, others: StreamBatches(forget=some, retain=others, general=general, each=(2, 4, 3)),
        fold=fold,
        retain=retain,
        general=general,
        steps=30,
    )
    seen: list[tuple[set[int], set[int]]] = [(set(), set()) for _ in range(3)]
    for step in range(30):
        for is_forget, row in order.step(step).order:
            seen[step // 10][0 if is_forget else 1].add(row)
    texts = set(range(retain + general))
    assert seen[0] == ({0, 1}, texts | {7 + row for row in (2, 3, 4, 5)})
    assert seen[1] == ({0, 1, 2, 4}, texts | {7 + row for row in (3, 5)})
    assert seen[2] == ({0, 1, 2, 3, 4, 5}, texts)
    epochs = [order.epoch(step) for step in range(30)]
    assert epochs == sorted(epochs), "an epoch never comes back"
    assert order.total(8) == 30


def test_folds_are_dealt_by_documents() -> None:
    documents = [f"d{place // 2}" for place in range(20)]
    fold = deal_folds(documents, ["Task1"] * 10 + ["Task2"] * 10, 3, seed=1)
    for document in set(documents):
        assert len({fold[row] for row in range(20) if documents[row] == document}) == 1
    assert sorted(Counter(fold).values()) == [6, 6, 8]
    assert fold == deal_folds(documents, ["Task1"] * 10 + ["Task2"] * 10, 3, seed=1)
    with pytest.raises(UserError, match="there are 10 forget documents"):
        deal_folds(documents, ["Task1"] * 20, 11, seed=0)


def test_forget_rows_come_late_and_the_others_stay() -> None:
    inner = PairedBatches(forget=4, retain=4, batch=4)
    late = LateBatches(inner=inner, quiet=lambda step: step < 2)
    assert late.step(0) == StepRows(tuple(each for each in inner.step(0).order if not each[0]))
    assert not late.step(1).forget
    assert late.step(2) == inner.step(2)
    assert (late.total(3), late.epoch(5)) == (inner.total(3), inner.epoch(5))


def test_the_forget_weight_begins_and_rises() -> None:
    weights = [forget_weight(step, 20, begins=0.5, ramp=0.2) for step in range(20)]
    assert weights == [0.0] * 10 + [0.25, 0.5, 0.75] + [1.0] * 7
    assert [forget_weight(step, 4, begins=0.0, ramp=0.0) for step in range(4)] == [1.0] * 4


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"forget_share": 1.0}, "forget_share is 1.0"),
        ({"forget_share": 0.0}, "forget_share is 0.0"),
        ({"forget_share": 0.6, "general_share": 0.6}, "general_share 0.6, together above 1"),
        ({"forget_from": 0.9, "forget_ramp": 0.2}, "forget_ramp 0.2, together above 1"),
        ({"pairing": "paired"}, "set trainer.pairing to streams"),
        ({"folds": 0}, "folds is 0"),
        ({"pairing": "sequential", "forget_share": 0.1, "general_share": 0.45, "folds": 2}, "chunks of their own"),
    ],
)
def test_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        replace(STREAMS, **changes)  # type: ignore[arg-type]
