"""Chosen cells on the wave are the reference's, and what is said of cells that were not computed is what may be said."""

from __future__ import annotations

from dataclasses import replace
from pkgutil import resolve_name
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, RECURRENT
from families import tiny as tiny_family
from scipy.stats import binom
from tiny_tracing import known, tiny

from lm import UserError
from lm.anatomy import Kind
from lm.model import LanguageModel
from lm.prompts import PromptSpec
from tracing import Effects, Fact, GaussianNoise
from tracing.engine.estimate import row_bytes, trunk_row_bytes
from tracing.engine.reference import score_cells
from tracing.engine.wavefront import Wavefront
from tracing.known import evaluating
from tracing.localizers.attribution import attribute_fact, attributed
from tracing.localizers.verify import Compared, Verification, _drawn, upper_bound, verify
from tracing.question.encoded_fact import EncodedFact, encode_fact
from tracing.question.sweep import Sweep
from tracing.settings import TraceSettings

NOISE = GaussianNoise(samples=2, sigma=1.0)
FACT = Fact("Where was Anna Kowalska born?", "Anna Kowalska", " in 1984")
ASKED: tuple[tuple[Kind, int, int], ...] = (
    ("mlp", 3, 1),
    ("resid", 3, 0),
    ("attn", 2, 2),
    ("mlp", 0, 1),  # before the subject
    ("mlp", 3, 1),  # twice
    ("attn", 3, 0),
    ("mlp", 5, 2),
)


def double(name: str) -> LanguageModel:
    return tiny_family(name, dtype=torch.float64)


def probe_of(model: LanguageModel, sweep: Sweep) -> EncodedFact:
    encoded = encode_fact(model, FACT, PromptSpec(), sweep.metric)
    assert encoded.span == (2, 4)
    assert len(encoded.prompt_ids) == 6
    return encoded


@pytest.mark.parametrize("name", FAMILIES)
def test_chosen_cells_are_the_reference_s(name: str) -> None:
    model = double(name)
    if name in RECURRENT:
        pytest.skip("its blocks cannot be run from a token on, which the wavefront's own test shows to be refused")
    in_float32 = ("gptj", "gpt_neo", "deepseek_v3")  # attention, or the router, whatever the weights are in
    allowed = 1e-6 if name in in_float32 else 1e-10
    questions: tuple[dict[str, Any], ...] = (
        {"window": 1},
        {"window": 5},
        {"window": 5, "sever": "mlp"},
        {"sever": "attn"},
    )
    for question in questions:
        sweep = Sweep(metric="log_probability", **question)
        encoded = probe_of(model, sweep)
        batch = NOISE.bind(model, [encoded]).batch(encoded)
        expected = score_cells(model, encoded, batch, sweep, ASKED)
        for rows in (10**6, 3, 1):
            found = Wavefront(model, sweep, rows).score_cells(encoded, batch, ASKED)
            np.testing.assert_allclose(found, expected, rtol=0, atol=allowed, err_msg=f"{question} {rows}")
        assert np.ptp(expected) > 1e-3


def test_a_cell_that_does_not_exist_is_refused() -> None:
    model = tiny("llama")
    encoded = encode_fact(model, known(model)[0], PromptSpec(), "log_probability")
    batch = NOISE.bind(model, [encoded]).batch(encoded)
    wave = Wavefront(model, Sweep(kinds=("mlp",)), 100)
    for cell in (("attn", 2, 0), ("mlp", 99, 0), ("mlp", 2, 4)):
        with pytest.raises(UserError, match=r"no cell of .*choose of mlp, \d+ tokens and 4 layers"):
            wave.score_cells(encoded, batch, [cell])  # type: ignore[list-item]
    assert wave.score_cells(encoded, batch, []) == []


KINDS: tuple[Kind, ...] = ("resid", "mlp", "attn")


@pytest.mark.parametrize("name", ["olmo2", "gemma2", "gpt2"])
def test_the_largest_and_random_others_are_computed_exactly(name: str) -> None:
    model = double(name)
    encoded = encode_fact(model, FACT, PromptSpec(), "log_probability")
    corruptor = NOISE.bind(model, [encoded])
    batch = corruptor.batch(encoded)
    with evaluating(model):
        effects = estimates(model, encoded, batch)
        found = verify(model, [encoded], corruptor, effects, top=6, chance=5, seed=3, progress=False)
    (top,), (chance,) = found.top, found.random
    assert (len(top.cells), len(chance.cells), found.outside.tolist()) == (6, 5, [3 * 4 * 3 - 6])
    assert not set(top.cells) & set(chance.cells)
    assert len(set(chance.cells)) == 5
    sweep = Sweep(kinds=KINDS, metric="log_probability")
    for some in (top, chance):
        exact = np.array(score_cells(model, encoded, batch, sweep, some.cells)) - effects.corrupted[0]
        np.testing.assert_allclose(some.exact, exact, rtol=0, atol=1e-9)
    guess = {cell: effects.indirect(cell[0])[0][cell[1], cell[2]] for cell in (*top.cells, *chance.cells)}
    assert min(abs(guess[cell]) for cell in top.cells) >= max(abs(guess[cell]) for cell in chance.cells)
    applied = found.applied(effects)
    for (kind, token, layer), value in zip(top.cells, top.exact, strict=True):
        assert applied.indirect(kind)[0][token, layer] == pytest.approx(value)
    changed = sum(int((applied.restored[kind][0] != effects.restored[kind][0]).sum()) for kind in KINDS)
    assert changed <= 11


def estimates(model: LanguageModel, encoded: EncodedFact, batch: torch.Tensor) -> Effects:
    found = attribute_fact(model, encoded, batch, KINDS, "log_probability")
    return Effects(
        facts=(encoded.fact,),
        clean=np.array([found.clean]),
        corrupted=np.array([found.corrupted]),
        restored={kind: [cells] for kind, cells in found.restored.items()},
        tokens=(encoded.tokens,),
        subject_spans=(encoded.span,),
        sigma=1.0,
        metric="log_probability",
        window=1,
    )


def test_no_pass_of_a_verification_holds_more_rows_than_the_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = double("llama")
    encoded = encode_fact(model, FACT, PromptSpec(), "log_probability")
    corruptor = GaussianNoise(samples=9, sigma=1.0).bind(model, [encoded])
    rows: dict[str, list[int]] = {"ordinary": [], "wave": []}

    def counting(name: str, of: str, place: int) -> None:
        real = getattr(*_owner(name))

        def counted(*args: Any, **more: Any) -> Any:
            found = real(*args, **more)
            rows[of].append(len(args[place]) if of == "ordinary" else found.shape[0] * found.shape[1])
            return found

        monkeypatch.setattr(name, counted)

    counting("tracing.engine.wavefront.block_replay.trunk", "ordinary", 1)
    counting("tracing.engine.reference.forward", "ordinary", 1)
    counting("tracing.engine.wavefront.Wavefront._wave", "wave", 0)
    tokens = len(encoded.input_ids)
    each = trunk_row_bytes(model, tokens, len(encoded.answer_ids), Sweep(kinds=KINDS, metric="log_probability"))
    found = {}
    with evaluating(model):
        effects = estimates(model, encoded, corruptor.batch(encoded))
        for memory in (2.0, 8 * each / 1e9, 1e-9):
            for told in rows.values():
                told.clear()
            found[memory] = verify(model, [encoded], corruptor, effects, top=6, chance=5, memory=memory, progress=False)
            half = memory * 1e9 / 2
            assert 2 <= max(rows["ordinary"]) <= max(2, min(10, half // each)), memory
            assert max(rows["wave"]) <= max(1, half // row_bytes(model, tokens)), memory
    assert len(rows["ordinary"]) > 9  # each sample on its own, by the wave and by the reference
    whole, *parts = found.values()
    for one in parts:
        for mine, theirs in zip((*one.top, *one.random), (*whole.top, *whole.random), strict=True):
            assert mine.cells == theirs.cells
            np.testing.assert_allclose(mine.exact, theirs.exact, rtol=0, atol=1e-10)


def _owner(name: str) -> tuple[Any, str]:
    path, _, last = name.rpartition(".")
    return resolve_name(path), last


def test_only_the_roles_that_count_are_looked_at() -> None:
    model = tiny("llama")
    with evaluating(model):
        effects, encoded_facts, corruptor = attributed(
            model,
            known(model),
            TraceSettings(corruption=NOISE, kinds=("mlp",), metric="log_probability", progress=False),
        )
        found = verify(
            model, encoded_facts, corruptor, effects, roles=["last_subject", "before"], top=3, progress=False
        )
        for some, encoded in zip(found.top + found.random, encoded_facts * 2, strict=True):
            assert {token for _, token, _ in some.cells} <= {encoded.span[1] - 1}
        assert found.outside.tolist() == [1, 1, 1]
        with pytest.raises(UserError, match="other facts"):
            verify(model, encoded_facts[1:], corruptor, effects, progress=False)
        with pytest.raises(UserError, match="windows of 3 layers"):
            verify(model, encoded_facts, corruptor, replace(effects, window=3), progress=False)


def test_every_cell_outside_the_top_is_as_likely_to_be_drawn() -> None:
    sizes = [1, 3, 0, 6]
    counts = np.zeros(10)
    for seed in range(2000):
        drawn = _drawn(sizes, 4, seed)
        assert [len(set(part)) for part in drawn] == [len(part) for part in drawn]
        assert sum(len(part) for part in drawn) == 4
        for start, part in zip((0, 1, 4, 4), drawn, strict=True):
            counts[[start + place for place in part]] += 1
    assert np.abs(counts / 2000 - 0.4).max() < 0.05
    assert _drawn(sizes, 99, 0) == [[0], [0, 1, 2], [], [0, 1, 2, 3, 4, 5]]
    assert _drawn([0, 0], 5, 0) == [[], []]


def test_the_bound_is_where_so_few_hits_become_unlikely() -> None:
    for hits, drawn in ((0, 100), (3, 50), (49, 50), (0, 1)):
        assert binom.cdf(hits, drawn, upper_bound(hits, drawn)) == pytest.approx(0.05)
    assert upper_bound(0, 100) == pytest.approx(3 / 100, rel=0.02)
    assert upper_bound(5, 5) == upper_bound(0, 0) == 1.0


def compared(estimated: list[float], exact: list[float]) -> Compared:
    cells: tuple[tuple[Kind, int, int], ...] = tuple(("mlp", 0, layer) for layer in range(len(exact)))
    return Compared(cells=cells, estimated=np.array(estimated), exact=np.array(exact))


def test_what_is_said_of_the_cells_that_were_not_computed() -> None:
    top = (compared([3.0, 2.0, -1.0], [2.0, 1.0, -2.0]), compared([1.0, 0.5, 0.4], [1.0, 2.0, -1.0]))
    random = (compared([0.1, 0.2], [-0.4, 0.1]), compared([0.3, -0.1], [0.0, 0.3]))
    found = Verification(
        top=top, random=random, outside=np.array([20.0, 10.0]), total=np.array([4.0, -1.0]), matters=0.1
    )
    assert (found.drawn, found.missed) == (4, 2)  # -0.4 of 4 and 0.3 of 1
    assert found.bound == upper_bound(2, 4)
    assert found.sign_agreement(top) == pytest.approx(5 / 6)
    assert found.rank_correlation(top) == pytest.approx((1.0 + 0.5) / 2)
    share = f"{100 * found.bound:.2g}"
    assert str(found) == (
        "2 facts; of 4 random cells 2 have an effect of 10 % of the total or more: at most "
        f"{share} % of the 30 cells outside the top do (95 %); rank correlation with the exact effects 0.75 at the top and "
        "0.00 at random, the same sign in 83% and 25%"
    )
    assert found.to_json()["bound"] == found.bound
    assert found.to_json()["facts"][1]["random"][1] == ["mlp", 0, 1, -0.1, 0.3]
    every = replace(found, outside=np.array([2.0, 2.0]))
    assert every.bound == 0.5
    assert "50 % of the 4 cells outside the top do, all of which were computed" in str(every)
    nothing = compared([], [])
    none = replace(found, random=(nothing, nothing))
    assert none.bound == 1.0
    assert "nothing is known of the cells outside the top" in str(none)
    assert "every cell was computed" in str(replace(none, outside=np.zeros(2)))
    assert replace(none, outside=np.zeros(2)).bound == 0.0
    turned = (compared([3.0, 2.0, 1.0], [2.0, -1.0, -3.0]),)
    sizes = replace(found, signed=False)
    assert found.rank_correlation(turned) == pytest.approx(1.0)
    assert sizes.rank_correlation(turned) == pytest.approx(-0.5)
    assert "same sign" not in str(sizes)
