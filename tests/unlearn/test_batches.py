"""The order of rows: deterministic, complete, and the same for any number of processes."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lm.errors import UserError
from lm.prompts import Encoded
from unlearn.batches import PairedBatches, collate, micro_batches


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 6).map(lambda half: 2 * half), st.integers(0, 5))
def test_paired_steps_use_each_side_evenly(forget: int, retain: int, batch: int, seed: int) -> None:
    batches = PairedBatches(forget=forget, retain=retain, batch=batch, seed=seed)
    drawn = [batches.step(i) for i in range(batches.steps_per_epoch * 3)]
    for side, size in (("forget", forget), ("retain", retain)):
        counts = Counter(i for rows in drawn for i in getattr(rows, side))
        assert all(len(getattr(rows, side)) == batch // 2 for rows in drawn)
        assert max(counts.values()) - min(counts.values() if len(counts) == size else [0]) <= 1


@given(st.integers(1, 30), st.integers(0, 30), st.integers(1, 12))
def test_a_mixed_epoch_is_every_row_once(forget: int, retain: int, batch: int) -> None:
    batches = PairedBatches(forget=forget, retain=retain, batch=batch, pairing="mixed_shuffle")
    drawn = [batches.step(i) for i in range(batches.steps_per_epoch)]
    assert sorted(i for rows in drawn for i in rows.forget) == list(range(forget))
    assert sorted(i for rows in drawn for i in rows.retain) == list(range(retain))
    assert batches.epoch(batches.steps_per_epoch - 1) == 0
    assert batches.epoch(batches.steps_per_epoch) == 1


def test_a_step_needs_no_history_and_seeds_differ() -> None:
    batches = PairedBatches(forget=20, retain=20, batch=8, seed=1)
    assert batches.step(7) == PairedBatches(forget=20, retain=20, batch=8, seed=1).step(7)
    assert batches.step(7) != PairedBatches(forget=20, retain=20, batch=8, seed=2).step(7)


@given(st.lists(st.integers(), max_size=40), st.integers(1, 7), st.integers(1, 5))
def test_processes_share_a_batch_without_repeating_a_row(rows: list[int], size: int, processes: int) -> None:
    shares = [micro_batches(rows, size, rank, processes) for rank in range(processes)]
    assert Counter(row for share in shares for micro in share for row in micro) == Counter(rows)
    assert len({len(share) for share in shares}) == 1, "every process runs as many micro-batches"
    assert all(len(micro) <= size for share in shares for micro in share)


def test_collate_supervises_the_answer_only() -> None:
    inputs = collate([Encoded([5, 6, 7, 8], 2), Encoded([5, 9], 1)], pad=0, device=torch.device("cpu"))
    assert inputs.ids.tolist() == [[5, 6, 7, 8], [5, 9, 0, 0]]
    assert inputs.attention.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert inputs.targets[inputs.mask].tolist() == [7, 8, 9]


def test_an_empty_micro_batch_supervises_nothing() -> None:
    assert not collate([], pad=0, device=torch.device("cpu")).mask.any()


def test_nothing_to_forget_is_refused() -> None:
    with pytest.raises(UserError, match="no forget rows"):
        PairedBatches(forget=0, retain=3, batch=4)
    with pytest.raises(UserError, match="at least one"):
        PairedBatches(forget=3, retain=3, batch=0)
    with pytest.raises(UserError, match="even number"):
        PairedBatches(forget=3, retain=3, batch=5)
