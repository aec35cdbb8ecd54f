"""The order of rows: deterministic, complete, and the same for any number of processes."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lm.errors import UserError
from lm.prompts import Encoded
from unlearn.forward.passes import collate
from unlearn.training.batches import MICRO_BATCH_COST, PairedBatches, SequentialBatches, StepRows, micro_batches


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


@given(
    forget=st.integers(1, 30), retain=st.integers(1, 40), chunk=st.integers(1, 9), each=st.integers(1, 5),
    at_once=st.integers(1, 4), epochs=st.integers(1, 3),
)  # fmt: skip
def test_sequential_chunks_follow_each_other_and_the_retain_rows_go_round(
    forget: int, retain: int, chunk: int, each: int, at_once: int, epochs: int
) -> None:
    batches = SequentialBatches(
        forget=forget, retain=retain, batch=at_once * (1 + each), chunk=chunk, retain_per_forget=each, epochs=epochs
    )
    total = batches.total(epochs)
    drawn = [batches.step(step) for step in range(total)]
    assert Counter(i for rows in drawn for i in rows.forget) == dict.fromkeys(range(forget), epochs)
    by_epoch: dict[int, list[StepRows]] = {}
    for step, rows in enumerate(drawn):
        by_epoch.setdefault(batches.epoch(step), []).append(rows)
        assert len(rows.retain) == each * len(rows.forget)
        assert [is_forget for is_forget, _ in rows.order] == [
            place % (1 + each) == 0 for place in range(len(rows.order))
        ]
    assert list(by_epoch) == list(range(-(-forget // chunk) * epochs))
    seen: set[int] = set()
    cycle: list[int] = []
    for first in range(0, len(by_epoch), epochs):
        passes = [[row for rows in by_epoch[first + one] for row in rows.order] for one in range(epochs)]
        assert all(one == passes[0] for one in passes), "a chunk is the same in each of its epochs"
        rows = {row for is_forget, row in passes[0] if is_forget}
        assert len(rows) <= chunk
        assert not rows & seen
        seen |= rows
        cycle += [row for is_forget, row in passes[0] if not is_forget]
    if len(cycle) >= retain:
        assert sorted(cycle[:retain]) == list(range(retain))
    assert all(one == cycle[place % retain] for place, one in enumerate(cycle)), "the next ones, then from the start"
    assert batches.step(total) == drawn[0], "after the last chunk the first again"
    assert batches.epoch(total) == len(by_epoch)


def test_sequential_batches_of_the_published_size() -> None:
    batches = SequentialBatches(forget=70, retain=100, batch=8, seed=3)
    assert batches.total(7) == 70 * 7, "a forget row with its seven a step"
    assert batches.step(0) == batches.step(32) != SequentialBatches(forget=70, retain=100, batch=8, seed=4).step(0)
    assert [batches.epoch(step) for step in (0, 31, 32, 223, 224, 489)] == [0, 0, 1, 6, 7, 20]
    alone = SequentialBatches(forget=5, retain=0, batch=2, chunk=3, epochs=1)
    assert [len(alone.step(step).order) for step in range(alone.total(1))] == [2, 1, 2]
    with pytest.raises(UserError, match="multiple of 8"):
        SequentialBatches(forget=5, retain=5, batch=12)


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


@given(st.lists(st.integers(1, 300), max_size=40), st.integers(1, 7), st.integers(1, 5))
def test_rows_of_like_length_come_together(lengths: list[int], size: int, processes: int) -> None:
    shares = [
        micro_batches(range(len(lengths)), size, rank, processes, lengths.__getitem__) for rank in range(processes)
    ]
    assert sorted(row for share in shares for micro in share for row in micro) == list(range(len(lengths)))
    assert len({len(share) for share in shares}) == 1, "every process runs as many micro-batches"
    for share in shares:
        assert all(len(micro) <= size for micro in share)
        flat = [lengths[row] for micro in share for row in micro]
        assert flat == sorted(flat)


@given(st.lists(st.integers(1, 600), min_size=1, max_size=8), st.integers(1, 4))
def test_no_way_to_cut_a_batch_costs_less(lengths: list[int], size: int) -> None:
    ordered = sorted(lengths)

    def cost(pieces: list[list[int]]) -> int:
        return sum(MICRO_BATCH_COST + len(piece) * max(piece) for piece in pieces)

    ways = []
    for cuts in itertools.product((False, True), repeat=len(ordered) - 1):
        pieces = [[ordered[0]]]
        for value, cut in zip(ordered[1:], cuts, strict=True):
            pieces.append([value]) if cut else pieces[-1].append(value)
        if max(map(len, pieces)) <= size:
            ways.append(cost(pieces))
    found = micro_batches(range(len(lengths)), size, 0, 1, lengths.__getitem__)
    assert cost([[lengths[row] for row in micro] for micro in found]) == min(ways)


@given(st.lists(st.integers(1, 300), max_size=40), st.integers(1, 7), st.integers(1, 3), st.integers(1, 900))
def test_a_micro_batch_keeps_to_its_tokens(lengths: list[int], size: int, processes: int, tokens: int) -> None:
    shares = [
        micro_batches(range(len(lengths)), size, rank, processes, lengths.__getitem__, tokens)
        for rank in range(processes)
    ]
    assert sorted(row for share in shares for micro in share for row in micro) == list(range(len(lengths)))
    assert len({len(share) for share in shares}) == 1, "every process runs as many micro-batches"
    for micro in (micro for share in shares for micro in share):
        assert len(micro) <= size
        assert len(micro) <= 1 or max(lengths[row] for row in micro) * len(micro) <= tokens


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
