"""The live stream: one global batch whatever the number of processes, and exact resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import byte_level, tiny
from harvested import SITES, SOURCE, harvested_model

from lm import LanguageModel, UserError
from sae.activations import (
    ActivationBatch,
    BufferSpec,
    ContextSpec,
    HarvestSpec,
    LiveActivations,
    MaskSpec,
    Texts,
    TextSource,
    harvest,
    merge_states,
    open_activations,
    read_state,
    save_state,
)

HARVEST = HarvestSpec(context=ContextSpec(length=16), forward_contexts=2)
BUFFER = BufferSpec(tokens=256, lanes=4)
BATCH = 32


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return harvested_model()


def stream(model: LanguageModel, rank: int = 0, world: int = 1, **more: object) -> LiveActivations:
    given = {"batch_tokens": BATCH, "harvest": HARVEST, "buffer": BUFFER, "rank": rank, "world": world, **more}
    source = given.pop("source", SOURCE)
    return LiveActivations(model, source, SITES, **given)  # type: ignore[arg-type]


def take(source: LiveActivations, count: int) -> list[ActivationBatch]:
    return [next(source) for _ in range(count)]


def same(one: ActivationBatch, other: ActivationBatch) -> bool:
    return (
        all(torch.equal(one[site], other[site]) for site in SITES)
        and torch.equal(one.token_ids, other.token_ids)
        and torch.equal(one.documents, other.documents)
        and torch.equal(one.positions, other.positions)
    )


def once(tokens: int | None = None, **context: object) -> dict[str, object]:
    spec = HarvestSpec(context=ContextSpec(length=16, epochs=1, **context), forward_contexts=2)  # type: ignore[arg-type]
    return {"harvest": spec, "tokens": tokens}


def test_batches_have_the_model_s_values_each_token_once_an_epoch_and_mixed(model: LanguageModel) -> None:
    served = list(stream(model, **once()))
    reference = {}
    for batch in harvest(
        model, SOURCE, SITES, HarvestSpec(context=ContextSpec(length=16, epochs=1), forward_contexts=2)
    ):
        for row in range(len(batch)):
            reference[int(batch.documents[row]), int(batch.positions[row])] = {site: batch[site][row] for site in SITES}
    keys = [key for batch in served for key in zip(batch.documents.tolist(), batch.positions.tolist(), strict=True)]
    assert len(keys) == len(set(keys))
    assert len(reference) - len(keys) < BATCH * 3  # what stays in the lanes when one of them is empty
    for batch in served:
        assert len(batch) == BATCH
        assert batch[SITES[0]].dtype == torch.float32
        assert len(set(batch.documents.tolist())) > 8, "a batch of few documents is not mixed"
        for row in range(BATCH):
            wanted = reference[int(batch.documents[row]), int(batch.positions[row])]
            for site in SITES:  # another company in the forward pass: equal but for rounding
                torch.testing.assert_close(batch[site][row], wanted[site])


def test_twenty_batches_are_ten_and_ten_more(model: LanguageModel, tmp_path: Path) -> None:
    straight = take(stream(model), 20)
    first = stream(model)
    assert all(same(a, b) for a, b in zip(take(first, 10), straight[:10], strict=True))
    save_state(tmp_path / "state", first.state_dict())
    second = stream(model)
    second.load_state_dict(read_state(tmp_path / "state"))
    rest = take(second, 10)
    assert all(same(a, b) for a, b in zip(rest, straight[10:], strict=True))
    assert all(same(a, b) for a, b in zip(take(first, 10), rest, strict=True))  # taking a state changed nothing
    assert second.facts()["masked"] == first.facts()["masked"]
    end, other = first.state_dict(), second.state_dict()
    assert end["facts"] == other["facts"]
    assert all(torch.equal(value, other["tensors"][name]) for name, value in end["tensors"].items())


def test_a_state_taken_anywhere_resumes_exactly(model: LanguageModel) -> None:
    straight = take(stream(model), 12)
    for stop in range(12):
        first = stream(model)
        take(first, stop)
        second = stream(model)
        second.load_state_dict(first.state_dict())
        assert same(next(second), straight[stop])


@pytest.mark.parametrize("world", [2, 4])
def test_processes_together_get_the_batches_of_one(model: LanguageModel, world: int) -> None:
    straight = take(stream(model), 12)
    parts = [take(stream(model, rank, world), 12) for rank in range(world)]
    for step, whole in enumerate(straight):
        for rank in range(world):
            assert same(parts[rank][step], whole.select(slice(rank, None, world)))


def test_each_context_is_run_by_one_process_only(model: LanguageModel) -> None:
    def kept(source: LiveActivations) -> int:
        take(source, 12)
        return int(source.facts()["masked"]["seen"])

    assert sum(kept(stream(model, rank, 4)) for rank in range(4)) == kept(stream(model))


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (4, 2), (2, 4)])
def test_another_number_of_processes_goes_on_from_the_joined_states(
    model: LanguageModel, before: int, after: int
) -> None:
    straight = take(stream(model), 14)
    firsts = [stream(model, rank, before) for rank in range(before)]
    for first in firsts:
        take(first, 7)
    state = merge_states([first.state_dict() for first in firsts])
    for rank in range(after):
        second = stream(model, rank, after)
        second.load_state_dict(state)
        for step, batch in enumerate(take(second, 7), start=7):
            assert same(batch, straight[step].select(slice(rank, None, after)))


def test_states_of_other_settings_text_weights_or_processes_are_refused(model: LanguageModel) -> None:
    first = stream(model)
    take(first, 2)
    state = first.state_dict()
    other = tiny("llama", seed=1)
    for changed, says in (
        (stream(model, batch_tokens=64), "batch_tokens"),
        (stream(model, harvest=HarvestSpec(context=ContextSpec(length=16), forward_contexts=2, seed=1)), "seed"),
        (stream(model, source=Texts(texts=(*SOURCE.texts[:-1], "changed"))), "content.sha256"),
        (stream(LanguageModel(other.model, model.tokenizer, other.anatomy, "tiny")), "weights"),
    ):
        with pytest.raises(UserError, match=says):
            changed.load_state_dict(state)
    half = stream(model, 0, 2)
    take(half, 2)
    with pytest.raises(UserError, match="merge_states"):
        stream(model, 1, 2).load_state_dict(half.state_dict())
    with pytest.raises(UserError, match="different batches"):
        merge_states([half.state_dict(), stream(model, 1, 2).state_dict()])


def test_a_damaged_state_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(b"no state")
    with pytest.raises(UserError, match="holds no state"):
        read_state(tmp_path / "state")


def test_a_source_too_short_goes_round_or_says_so(model: LanguageModel) -> None:
    short = Texts(texts=("Only a few words here, and no more.",))
    around = stream(model, source=short)
    take(around, 5)
    assert around.facts()["epoch"] > 1
    with pytest.raises(UserError, match=r"holds only \d+ tokens .* epochs: null"):
        list(stream(model, source=short, **once(tokens=1000)))
    assert list(stream(model, source=short, **once())) == []
    full = list(stream(model, **once(tokens=3 * BATCH)))
    assert len(full) > 3


def test_masks_that_leave_nothing_are_an_error_and_not_an_endless_loop(model: LanguageModel) -> None:
    harvest_spec = HarvestSpec(context=ContextSpec(length=16), masks=MaskSpec(first=16), forward_contexts=2)
    with pytest.raises(UserError, match="the masks leave no token"):
        next(stream(model, harvest=harvest_spec))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"batch_tokens": 30}, "multiple of the 4 lanes"),
        ({"world": 3}, "multiple of 3"),
        ({"batch_tokens": 256}, "mixes no batches"),
        ({"world": 2, **once()}, "epochs: null"),
    ],
)
def test_what_cannot_be_is_refused_at_once(model: LanguageModel, more: dict[str, object], says: str) -> None:
    with pytest.raises(UserError, match=says):
        stream(model, **more)  # type: ignore[arg-type]


def test_a_bfloat16_model_gives_its_values_as_float32() -> None:
    made = tiny("gpt2", dtype=torch.bfloat16)
    batch = next(stream(LanguageModel(made.model, byte_level(), made.anatomy, "tiny")))
    values = batch[SITES[0]]
    assert values.dtype == torch.float32
    assert torch.equal(values, values.bfloat16().float())


def test_one_door_opens_text(model: LanguageModel) -> None:
    opened = open_activations(SOURCE, SITES, batch_tokens=BATCH, model=model, harvest=HARVEST, buffer=BUFFER)
    assert same(next(opened), next(stream(model)))
    with pytest.raises(UserError, match="give a model"):
        open_activations(SOURCE, SITES, batch_tokens=BATCH)
    assert isinstance(SOURCE, TextSource)
