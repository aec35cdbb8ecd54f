"""The wavefront engine equals the reference cell by cell: every family, kind, window, severed or not, in any chunks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, RECURRENT
from families import tiny as tiny_family
from tiny_tracing import known, tiny
from torch import Tensor

from lm import UserError
from lm.anatomy import module_at
from lm.forward import block_replay
from lm.model import LanguageModel
from lm.prompts import PromptSpec
from tracing import Fact, GaussianNoise, trace
from tracing.engine import engines
from tracing.engine.estimate import cost, row_bytes, trunk_row_bytes
from tracing.engine.reference import Traced, trace_fact
from tracing.engine.wavefront import Wavefront
from tracing.question.encoded_fact import EncodedFact, encode_fact, forward
from tracing.question.sweep import Sweep

FACTS = (  # of one shape, with subjects of other places and lengths
    Fact("Where was Anna Kowalska born?", "Anna Kowalska", " on 1984"),
    Fact("Where was Anna Kowalska born?", "Kowalska", " in 1984"),
)
NOISE = GaussianNoise(samples=2, sigma=1.0)
QUESTIONS: tuple[dict[str, Any], ...] = (
    {"window": 1},
    {"window": 5, "positions": "subject_and_last"},
    {"window": 1, "sever": "mlp"},
    {"window": 2, "sever": "attn", "positions": "subject_and_after"},
)


SLIDING = ("olmo3", "gemma2", "gemma3_text", "mistral", "phi3")
REACH = 3  # tokens that sliding attention sees; the prompts have twice as many


def family(name: str, dtype: torch.dtype, reach: int = REACH) -> LanguageModel:
    return tiny_family(name, dtype=dtype, **({"sliding_window": reach} if name in SLIDING else {}))


def probes_of(model: LanguageModel, sweep: Sweep) -> list[EncodedFact]:
    encoded_facts = [encode_fact(model, fact, PromptSpec(), sweep.metric) for fact in FACTS]
    assert len({(len(encoded.prompt_ids), len(encoded.answer_ids)) for encoded in encoded_facts}) == 1
    assert (
        len({encoded.span[0] for encoded in encoded_facts})
        == len({encoded.answer_ids for encoded in encoded_facts})
        == 2
    )
    return encoded_facts


def batch_of(model: LanguageModel, encoded: EncodedFact) -> Tensor:
    return NOISE.bind(model, [encoded]).batch(encoded)


def apart(found: Traced, expected: Traced) -> float:
    """The largest difference of any score; NaN must stand in the same cells."""
    worst = max(abs(found.clean - expected.clean), abs(found.corrupted - expected.corrupted))
    for kind, cells in expected.restored.items():
        assert np.array_equal(np.isnan(cells), np.isnan(found.restored[kind]))
        worst = max(worst, float(np.nanmax(np.abs(cells - found.restored[kind]))))
    return worst


@pytest.mark.parametrize(
    ("dtype", "allowed"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["float64", "float32"]
)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_cell_is_the_reference_s(name: str, dtype: torch.dtype, allowed: float) -> None:
    model = family(name, dtype)
    if name in RECURRENT:
        encoded = probes_of(model, Sweep())[0]
        with pytest.raises(UserError, match=r"layer 0 of .* keeps one state .*: trace with engine: reference"):
            Wavefront(model, Sweep(), 7).trace([encoded], [batch_of(model, encoded)])
        return
    if name in ("gptj", "gpt_neo", "deepseek_v3"):
        allowed = max(allowed, 1e-6)  # attention, or the router, is computed in float32, whatever the weights are in
    effects = 0.0
    for question in QUESTIONS:
        sweep = Sweep(metric="log_probability", **question)
        encoded_facts = probes_of(model, sweep)
        expected = [trace_fact(model, encoded, batch_of(model, encoded), sweep) for encoded in encoded_facts]
        for rows in (10**6, 7):  # all at once, and in chunks of cells and of noise samples
            found = Wavefront(model, sweep, rows).trace(
                encoded_facts, [batch_of(model, encoded) for encoded in encoded_facts]
            )
            assert max(apart(one, other) for one, other in zip(found, expected, strict=True)) < allowed, (
                question,
                rows,
            )
        spread = [np.abs(cells - one.corrupted) for one in expected for cells in one.restored.values()]
        effects = max(effects, *(float(np.nanmax(values)) for values in spread))
    assert effects > 0.05, "restoring changes next to nothing in this model: the test could not tell engines apart"


@pytest.mark.parametrize("name", SLIDING)
def test_sliding_attention_does_not_see_the_whole_prompt(name: str) -> None:
    """Else the test above would say nothing of its masks."""
    near, far = (family(name, torch.float32, reach) for reach in (REACH, 64))
    encoded = probes_of(near, Sweep())[0]
    given = batch_of(near, encoded)[:1]
    with torch.no_grad():
        assert float((forward(near, given, 1) - forward(far, given, 1)).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("olmo2", {"num_hidden_layers": 7}),
        ("gpt2", {"n_layer": 7}),
        ("gpt_neox", {"num_hidden_layers": 7}),
        ("gemma2", {"num_hidden_layers": 7, "layer_types": ["sliding_attention"] * 3 + ["full_attention"] * 4}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_windows_of_five_also_where_they_are_whole_and_severed(name: str, more: dict[str, Any]) -> None:
    """In the models of three layers every window of five is cut short, and restores all that lies above its start."""
    model = tiny_family(name, dtype=torch.float64, **more)
    for sever in (None, "mlp", "attn"):
        sweep = Sweep(
            kinds=("mlp", "attn"), window=5, sever=sever, metric="log_probability", positions="subject_and_last"
        )
        encoded = probes_of(model, sweep)[0]
        expected = trace_fact(model, encoded, batch_of(model, encoded), sweep)
        found = Wavefront(model, sweep, 10**6).trace([encoded], [batch_of(model, encoded)])[0]
        assert apart(found, expected) < 1e-10, sever
        last = expected.restored["mlp"][-1]
        assert len(set(np.round(last, 9))) > 4, "windows about other layers must give other scores"


def test_nan_in_one_part_of_the_samples_is_refused_whatever_the_others_give(monkeypatch: pytest.MonkeyPatch) -> None:
    model = family("llama", torch.float32)
    sweep = Sweep(kinds=("mlp",))
    encoded = probes_of(model, sweep)[0]
    real = Wavefront._wave

    def broken(self: Wavefront, trunk: Any, position: int, cells: Any, rows: Tensor, samples: int) -> Tensor:
        found = real(self, trunk, position, cells, rows, samples)
        return torch.where((rows == 0)[None, :, None], torch.nan, found.cpu())

    monkeypatch.setattr(Wavefront, "_wave", broken)
    for rows in (10**6, 1):  # all samples at once, and one after the other
        with pytest.raises(UserError, match="gave NaN"):
            Wavefront(model, sweep, rows).trace([encoded], [batch_of(model, encoded)])


def test_severing_matters_and_leaves_the_severed_cells_alone() -> None:
    model = family("llama", torch.float64)
    encoded = probes_of(model, Sweep())[0]
    plain, severed = (
        trace_fact(model, encoded, batch_of(model, encoded), Sweep(metric="log_probability", sever=sever))
        for sever in (None, "mlp")
    )
    assert float(np.abs(plain.restored["resid"] - severed.restored["resid"]).max()) > 1e-2
    whole = Sweep(
        kinds=("mlp",), window=99, metric="log_probability", sever="mlp"
    )  # every MLP is restored, so that none is held
    found = trace_fact(model, encoded, batch_of(model, encoded), whole)
    free = Sweep(kinds=("mlp",), window=99, metric="log_probability")
    expected = trace_fact(model, encoded, batch_of(model, encoded), free)
    assert apart(found, expected) < 1e-12


@pytest.mark.parametrize("metric", ["probability", "log_probability", "first_token_probability"])
def test_trace_gives_the_same_with_either_engine(metric: Any) -> None:
    model = tiny("olmo2")
    facts = known(model, answer_tokens=3)
    both = [
        trace(model, facts, corruption=GaussianNoise(samples=3), metric=metric, engine=engine, progress=False)
        for engine in ("wavefront", "reference")
    ]
    for kind in both[0].kinds:
        for mine, theirs in zip(both[0].restored[kind], both[1].restored[kind], strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)
    assert both[0].facts == both[1].facts


def test_what_lies_before_the_subject_is_exactly_the_corrupted_score() -> None:
    model = tiny("llama")
    effects = trace(model, known(model), window=2, progress=False)
    for kind in effects.kinds:
        for cells, low, (start, _) in zip(
            effects.restored[kind], effects.corrupted, effects.subject_spans, strict=True
        ):
            assert (cells[:start] == low).all()


def test_models_of_one_layer_and_in_bfloat16() -> None:
    one = tiny(layers=1)
    assert trace(one, known(one), window=10, progress=False).layers == 1
    low = tiny("olmo2", dtype=torch.bfloat16)
    facts = known(low, answer_tokens=1)
    both = [trace(low, facts, engine=engine, progress=False) for engine in ("wavefront", "reference")]
    for mine, theirs in zip(both[0].restored["resid"], both[1].restored["resid"], strict=True):
        np.testing.assert_allclose(mine, theirs, atol=0.05)


def test_nothing_is_left_behind_on_the_model_also_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("gpt2")
    before = model.model(torch.tensor([[5, 6, 7]])).logits
    trace(model, known(model), progress=False)
    monkeypatch.setattr("tracing.engine.wavefront.read_all", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trace(model, known(model), progress=False)
    assert torch.equal(model.model(torch.tensor([[5, 6, 7]])).logits, before)
    blocks = model.model.get_submodule(model.anatomy.blocks)
    assert not any("forward" in block.__dict__ for block in blocks)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.model.modules())


def test_the_cost_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Token-blocks counted by hooks equal the estimate, for both engines."""
    model = family("olmo2", torch.float32)
    layers = model.anatomy.layers
    for question in QUESTIONS:
        sweep = Sweep(**question)
        encoded_facts = probes_of(model, sweep)[:1]
        said = cost(encoded_facts, [NOISE.samples], layers, sweep)
        for engine, expected in (("wave", said.wave), ("reference", said.reference)):
            count = 0

            def seen(module: Any, args: Any, output: tuple[torch.Tensor, ...]) -> None:
                nonlocal count
                count += output[0].shape[0] * output[0].shape[1]

            blocks = [module_at(model.model, model.anatomy.block_path(layer)) for layer in range(layers)]
            handles = [block.get_submodule(model.anatomy.names.attn).register_forward_hook(seen) for block in blocks]
            if engine == "wave":
                Wavefront(model, sweep, 10**6).trace(
                    encoded_facts, [batch_of(model, encoded) for encoded in encoded_facts]
                )
            else:
                trace_fact(model, encoded_facts[0], batch_of(model, encoded_facts[0]), sweep)
            for handle in handles:
                handle.remove()
            assert count == expected, (question, engine)
    assert row_bytes(model, 20) > 2 * row_bytes(model, 10)


def test_the_last_mlp_works_only_on_what_is_read() -> None:
    model = family("olmo2", torch.float32)
    sweep = Sweep(kinds=("resid",), metric="log_probability")
    (encoded, *_) = probes_of(model, sweep)
    last = module_at(model.model, model.anatomy.block_path(model.anatomy.layers - 1))
    tokens: list[int] = []
    handle = last.get_submodule("mlp.up_proj").register_forward_hook(
        lambda module, args, out: tokens.append(out.shape[1])
    )
    Wavefront(model, sweep, 10**6).trace([encoded], [batch_of(model, encoded)])
    handle.remove()
    assert tokens[0] == len(encoded.input_ids), "the trunk keeps every token"
    assert len(tokens) > 1
    assert set(tokens[1:]) == {len(encoded.answer_ids)}


def test_samples_that_do_not_fit_together_are_run_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """No ordinary pass holds more rows than the memory allows, and the numbers are the same."""
    model = family("llama", torch.float64)
    facts = [Fact("Where was Anna Kowalska born?", "Anna Kowalska", " on 1984")]
    sweep, noise = Sweep(window=5, sever="mlp", metric="log_probability"), GaussianNoise(samples=9, sigma=1.0)
    encoded = encode_fact(model, facts[0], PromptSpec(), sweep.metric)
    batch = noise.bind(model, [encoded]).batch(encoded)
    expected = trace_fact(model, encoded, batch, sweep)
    tokens, answer = len(encoded.input_ids), len(encoded.answer_ids)
    each = trunk_row_bytes(model, tokens, answer, sweep)
    largest = 0

    def seen(given: LanguageModel, embeddings: Tensor, keep: int) -> Any:
        nonlocal largest
        largest = max(largest, len(embeddings))
        return real(given, embeddings, keep)

    real = block_replay.trunk
    monkeypatch.setattr("tracing.engine.wavefront.block_replay.trunk", seen)
    for trunk, rows in ((10, 10), (4, 4), (2, 2), (0, 2)):  # a clean and a corrupted row are the least there is
        engine, largest = engines.Checked(model, sweep, 2 * trunk * each), 0
        said = engine.takes(tokens, answer, noise.samples)
        told = []
        found = engine.trace([encoded], [batch], told.append)[0]
        assert largest == rows
        assert apart(found, expected) < 1e-10
        assert sum(told) == cost([encoded], [1], model.anatomy.layers, sweep).cells  # each cell is told once
        assert said >= rows * each
        if trunk >= 2:
            assert said <= engine.memory + row_bytes(model, tokens)
        assert all((cells[: encoded.span[0]] == found.corrupted).all() for cells in found.restored.values())


def test_a_device_that_runs_out_gets_smaller_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    facts, calls = known(model), []

    def small(self: Wavefront, encoded_facts: Any, batches: Any, advance: Any = lambda cells: None) -> list[Traced]:
        calls.append(self.rows)
        advance(5)
        if self.rows > 40:
            raise torch.OutOfMemoryError("no room")
        return real(self, encoded_facts, batches, advance)

    real = Wavefront.trace
    expected = trace(model, facts, progress=False)
    monkeypatch.setattr(Wavefront, "trace", small)
    found = trace(model, facts, memory=0.01, progress=False)
    assert calls[0] > 40 >= calls[-1]
    for mine, theirs in zip(found.restored["mlp"], expected.restored["mlp"], strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-6)

    def full(self: Wavefront, *args: Any) -> list[Traced]:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(Wavefront, "trace", full)
    with pytest.raises(UserError, match="no memory for even one row of fact 'fact0'"):
        trace(model, facts, progress=False)
