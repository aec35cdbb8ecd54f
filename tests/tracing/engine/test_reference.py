"""The published procedure against an independent oracle with raw hooks, and the invariants any tracing must keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tiny_tracing import LAYERS, known, say, tiny

from lm.model import LanguageModel
from tracing import Fact, GaussianNoise, trace
from tracing.engine.reference import swept_positions, window_layers

_LLAMA_LIKE = {
    "embed": "model.embed_tokens",
    "resid": "model.layers.{}",
    "mlp": "model.layers.{}.mlp",
    "attn": "model.layers.{}.self_attn",
}
_GPT2 = {
    "embed": "transformer.wte",
    "resid": "transformer.h.{}",
    "mlp": "transformer.h.{}.mlp",
    "attn": "transformer.h.{}.attn",
}
PARTS: dict[str, dict[str, str]] = {"olmo": _LLAMA_LIKE, "olmo2": _LLAMA_LIKE, "llama": _LLAMA_LIKE, "gpt2": _GPT2}


def published_noise_level(model: LanguageModel, family: str, subjects: list[str]) -> float:
    """Three standard deviations of the subjects' embeddings, collected with a hook on the embedding layer."""
    seen: list[torch.Tensor] = []
    layer = model.model.get_submodule(PARTS[family]["embed"])
    for subject in subjects:
        handle = layer.register_forward_hook(lambda module, inputs, output: seen.append(output[0].detach()))
        model.model(torch.tensor([model.tokenizer.encode(subject)]))
        handle.remove()
    return 3 * float(torch.cat(seen).std())


def published_cell(
    model: LanguageModel,
    family: str,
    ids: list[int],
    answer: list[int],
    span: tuple[int, int],
    level: float,
    samples: int,
    patches: list[tuple[int, str]],
) -> list[torch.Tensor]:
    """One cell as the published script computes it, for each answer token by a forward pass of its own.

    Row 0 is clean; the others get the noise on the embedding output; wherever a patch stands, row 0's activation of the
    token overwrites theirs. Returns the softmax probability of each answer token on every noisy row.
    """
    start, end = span
    handles = []

    def corrupt(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        draws = np.random.RandomState(1).randn(output.shape[0] - 1, end - start, output.shape[2])
        output[1:, start:end] += level * torch.from_numpy(draws)
        return output

    def restore(token: int) -> Callable[..., Any]:
        def hook(module: Any, inputs: Any, output: Any) -> Any:
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            hidden[1:, token] = hidden[0, token]
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return hook

    handles.append(model.model.get_submodule(PARTS[family]["embed"]).register_forward_hook(corrupt))
    for token, path in patches:
        handles.append(model.model.get_submodule(path).register_forward_hook(restore(token)))
    found = []
    with torch.no_grad():
        for index in range(len(answer)):
            batch = torch.tensor([[*ids, *answer[:index]]] * (samples + 1))
            found.append(torch.softmax(model.model(batch).logits[1:, -1], dim=1)[:, answer[index]])
    for handle in handles:
        handle.remove()
    return found


def published_window(layer: int, window: int, layers: int, kind: str) -> list[int]:
    if kind == "resid":
        return [layer]
    return list(range(max(0, layer - window // 2), min(layers, layer - (-window // 2))))


@pytest.mark.parametrize(
    ("family", "window", "metric"),
    [
        ("olmo", 1, "probability"),
        ("olmo", 3, "log_probability"),
        ("olmo", 10, "first_token_probability"),
        ("olmo2", 1, "probability"),
        ("olmo2", 2, "probability"),
        ("llama", 1, "probability"),
        ("llama", 4, "log_probability"),
        ("gpt2", 2, "probability"),
    ],
)
def test_every_cell_is_the_published_script_s(family: str, window: int, metric: Any) -> None:
    model = tiny(family)
    facts = known(model, answer_tokens=3, how_many=2)
    effects = trace(
        model,
        facts,
        corruption=GaussianNoise(samples=4),
        window=window,
        metric=metric,
        engine="reference",
        progress=False,
    )
    level = published_noise_level(model, family, [fact.subject for fact in facts])
    assert effects.sigma == pytest.approx(level, rel=1e-6)

    def reduce(steps: list[torch.Tensor]) -> float:
        if metric == "first_token_probability":
            return float(steps[0].mean())
        if metric == "probability":
            return float(torch.stack(steps).prod(0).mean())
        return float(torch.stack(steps).log().sum(0).mean())

    cells = 0
    for index, fact in enumerate(facts):
        ids = model.tokenizer.encode(fact.prompt)
        answer = model.tokenizer.encode(fact.answer)
        span = effects.subject_spans[index]
        assert model.tokenizer.decode(ids[slice(*span)]) == fact.subject

        def oracle(patches: list[tuple[int, str]], ids=ids, answer=answer, span=span) -> float:  # type: ignore[no-untyped-def]
            return reduce(published_cell(model, family, ids, answer, span, level, 4, patches))

        assert effects.corrupted[index] == pytest.approx(oracle([]), abs=1e-6, rel=1e-6)
        for kind in ("resid", "mlp", "attn"):
            for token in range(len(ids)):
                for layer in range(LAYERS):
                    layers = published_window(layer, window, LAYERS, kind)
                    expected = oracle([(token, PARTS[family][kind].format(one)) for one in layers])
                    assert effects.restored[kind][index][token, layer] == pytest.approx(expected, abs=1e-6, rel=1e-6)
                    cells += 1
        spread = np.ptp(effects.restored["mlp"][index])
        assert spread > 1e-5, "the cells of this model are all alike: this test could not tell them apart"
    assert cells == sum(3 * LAYERS * len(tokens) for tokens in effects.tokens)


def test_the_clean_score_is_the_product_over_answer_tokens() -> None:
    model = tiny()
    (fact,) = known(model, answer_tokens=3, how_many=1)
    effects = trace(model, [fact], kinds=["resid"], progress=False)
    logs = trace(model, [fact], kinds=["resid"], metric="log_probability", progress=False)
    ids, answer = model.tokenizer.encode(fact.prompt), model.tokenizer.encode(fact.answer)
    log = 0.0
    with torch.no_grad():
        for index, token in enumerate(answer):
            log += float(model.model(torch.tensor([[*ids, *answer[:index]]])).logits[0, -1].log_softmax(-1)[token])
    assert effects.clean[0] == pytest.approx(np.exp(log), abs=1e-6)
    assert logs.clean[0] == pytest.approx(log, abs=1e-5)


@pytest.mark.parametrize("family", ["olmo", "olmo2", "llama"])
def test_what_stands_before_the_subject_has_no_effect(family: str) -> None:
    model = tiny(family)
    effects = trace(model, known(model), window=2, progress=False)
    for kind in effects.kinds:
        for cells, (start, _) in zip(effects.indirect(kind), effects.subject_spans, strict=True):
            assert (np.abs(cells[:start]) <= 1e-12).all()
            assert np.abs(cells[start:]).max() > 1e-6


def test_restoring_the_stream_of_a_subject_that_ends_the_prompt_restores_a_one_token_answer() -> None:
    model = tiny()
    prompt = "w7 is ada"
    fact = Fact(prompt, "ada", say(model, prompt, 1))
    effects = trace(model, [fact], kinds=["resid"], progress=False)
    assert effects.total[0] > 1e-4
    assert effects.restored["resid"][0][-1] == pytest.approx(effects.clean[0], abs=1e-6)


def test_restoring_the_last_stream_of_the_last_token_restores_a_one_token_answer() -> None:
    model = tiny("olmo2")
    effects = trace(model, known(model, answer_tokens=1), kinds=["resid"], progress=False)
    for index, cells in enumerate(effects.restored["resid"]):
        assert cells[-1, -1] == pytest.approx(effects.clean[index], abs=1e-6)


def test_noise_too_small_to_change_a_number_changes_nothing() -> None:
    model = tiny()
    for engine, allowed in (("reference", 1e-12), ("wavefront", 1e-6)):  # batches of other shapes round otherwise
        effects = trace(
            model, known(model), corruption=GaussianNoise(sigma=1e-30), window=3, engine=engine, progress=False
        )
        assert np.abs(effects.total).max() <= 1e-7
        for kind in effects.kinds:
            for cells in effects.indirect(kind):
                assert (np.abs(cells) <= allowed).all()


def test_windows_are_the_published_ones() -> None:
    assert list(window_layers(20, 10, 48, "mlp")) == list(range(15, 25))
    assert list(window_layers(0, 10, 16, "attn")) == [0, 1, 2, 3, 4]
    assert list(window_layers(15, 10, 16, "mlp")) == [10, 11, 12, 13, 14, 15]
    assert list(window_layers(7, 1, 16, "mlp")) == [7]
    assert list(window_layers(7, 3, 16, "mlp")) == [6, 7, 8]
    assert list(window_layers(7, 10, 16, "resid")) == [7]
    for layer in range(6):
        for window in range(1, 14):
            assert list(window_layers(layer, window, 6, "mlp")) == published_window(layer, window, 6, "mlp")


def test_a_window_over_all_layers_restores_the_same_whatever_its_center() -> None:
    model = tiny()
    effects = trace(model, known(model, how_many=1), kinds=["mlp"], window=2 * LAYERS, progress=False)
    cells = effects.restored["mlp"][0]
    assert np.ptp(cells, axis=1).max() == 0
    single = trace(model, known(model, how_many=1), kinds=["mlp"], window=1, progress=False).restored["mlp"][0]
    assert np.ptp(single, axis=1).max() > 1e-6


def test_positions_leave_out_cells_and_change_none() -> None:
    model = tiny()
    facts = known(model)
    whole = trace(model, facts, progress=False)
    after = trace(model, facts, positions="subject_and_after", progress=False)
    ends = trace(model, facts, positions="subject_and_last", progress=False)
    for kind in whole.kinds:
        for index, (start, end) in enumerate(whole.subject_spans):
            reference = whole.restored[kind][index]
            assert np.array_equal(after.restored[kind][index][start:], reference[start:])
            assert np.allclose(after.restored[kind][index][:start], reference[:start], atol=1e-12)
            few = ends.restored[kind][index]
            assert np.array_equal(few[start:end], reference[start:end])
            assert np.array_equal(few[-1], reference[-1])
            assert np.isnan(few[end:-1]).all()
    assert swept_positions(8, (2, 4), "subject_and_last") == [2, 3, 7]


def test_a_fact_s_numbers_do_not_depend_on_its_neighbors() -> None:
    model = tiny()
    facts = known(model)
    noise = GaussianNoise(sigma=0.5)
    together = trace(model, facts, corruption=noise, kinds=["mlp"], progress=False)
    alone = trace(model, facts[1:2], corruption=noise, kinds=["mlp"], progress=False)
    assert np.array_equal(together.restored["mlp"][1], alone.restored["mlp"][0])


def test_a_model_of_one_layer() -> None:
    model = tiny(layers=1)
    effects = trace(model, known(model), window=10, progress=False)
    assert effects.layers == 1
    assert all(cells.shape[1] == 1 for cells in effects.restored["attn"])


def test_bfloat16_gives_finite_scores_near_those_of_float32() -> None:
    low = tiny("olmo2", dtype=torch.bfloat16)
    facts = known(low, answer_tokens=1)
    coarse = trace(low, facts, corruption=GaussianNoise(sigma=0.3), progress=False)
    assert coarse.clean.dtype == np.float64
    fine = tiny("olmo2")
    fine.model.load_state_dict(low.model.state_dict())
    same = [fact for fact in facts if say(fine, fact.prompt, 1) == fact.answer]
    assert len(same) >= 2
    exact = trace(fine, same, corruption=GaussianNoise(sigma=0.3), progress=False)
    rows = [facts.index(fact) for fact in same]
    for kind in ("resid", "mlp", "attn"):
        for row, cells in zip(rows, exact.restored[kind], strict=True):
            assert np.abs(coarse.restored[kind][row] - cells).max() < 0.05


def test_nothing_is_left_behind_on_the_model() -> None:
    model = tiny()
    before = {name: weight.clone() for name, weight in model.model.state_dict().items()}
    model.model.train()
    trace(model, known(model), progress=False)
    assert model.model.training
    assert all(torch.equal(weight, before[name]) for name, weight in model.model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.model.modules())
