"""What a trace says beforehand is what then runs."""

from __future__ import annotations

import re
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
from tiny_tracing import known, say, tiny

import tracing
from lm import UserError
from lm.anatomy import module_at
from lm.prompts import PromptSpec
from tracing import Fact, GaussianNoise, causal_tracing, trace
from tracing.engine import engines
from tracing.engine.estimate import row_bytes
from tracing.question.encoded_fact import encode_fact
from tracing.question.sweep import Sweep
from tracing.settings import Workers


def test_what_is_told_beforehand_leaves_out_what_is_finished_and_what_others_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny("llama")
    facts = known(model)
    trace(model, facts[:2], corruption=GaussianNoise(sigma=1.0), cache=tmp_path)
    assert re.search(r"trace: 2 facts, .* GB beside the model\n", capsys.readouterr().err)
    trace(model, facts, corruption=GaussianNoise(sigma=1.0), cache=tmp_path)
    assert "trace: 1 fact, " in capsys.readouterr().err
    trace(model, facts, corruption=GaussianNoise(sigma=1.0), cache=tmp_path, workers=Workers(0, 2))
    assert "every fact is finished" in capsys.readouterr().err


@pytest.mark.parametrize("engine", ["wavefront", "reference"])
def test_an_estimate_is_what_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
    """Cells, passes, rows and token-blocks that are told are counted by hooks; a finished fact of a group is left out."""
    model = tiny("llama")
    shape = ("where is ada byron w5 now ?", "where is w5 byron ada now ?", "where is now ada byron w5 ?")
    facts = [*known(model), *(Fact(prompt, "ada", say(model, prompt, 2), id=prompt) for prompt in shape)]
    noise, layers = GaussianNoise(samples=5), range(model.anatomy.layers)
    told: list[int] = []
    rows: list[int] = []
    blocks = 0

    def into_mlp(module: Any, args: Any) -> None:
        nonlocal blocks
        blocks += args[0].shape[0] * args[0].shape[1]

    def counted(name: str, place: int | None) -> None:
        path, _, last = name.rpartition(".")
        real = getattr(resolve_name(path), last)

        def call(*args: Any, **more: Any) -> Any:
            found = real(*args, **more)
            rows.append(found.shape[0] * found.shape[1] if place is None else len(args[place]))
            return found

        monkeypatch.setattr(name, call)

    for layer in layers:
        module_at(model.model, f"{model.anatomy.block_path(layer)}.mlp").register_forward_pre_hook(into_mlp)
    counted("tracing.engine.wavefront.block_replay.trunk", 1)
    counted("tracing.engine.wavefront.Wavefront._wave", None)
    if engine == "reference":
        counted("tracing.engine.reference.forward", 1)
    monkeypatch.setattr("tracing.engine.engines.check", lambda *args, **more: None)
    make = causal_tracing.make_engine

    def watching(*args: Any) -> Any:
        made = make(*args)
        trace_some = made.trace

        def only_the_sweep(encoded_facts: Any, batches: Any, advance: Any) -> Any:
            nonlocal blocks
            if not told:
                rows.clear()
                blocks = 0
            told.append(0)
            return trace_some(encoded_facts, batches, told.append)

        monkeypatch.setattr(made, "trace", only_the_sweep)
        return made

    monkeypatch.setattr(causal_tracing, "make_engine", watching)
    asked: dict[str, Any] = {"corruption": noise, "engine": engine, "window": 2, "progress": False}
    for memory in (2.0, 0.001, 0.0001):
        cache = tmp_path / str(memory)
        trace(model, facts, cache=cache, memory=memory, **asked)
        some = sorted(cache.iterdir())[::2]
        for path in some:
            path.unlink()
        for given, count in ((facts[:1], 1), (facts, len(some))):
            folder = cache if len(given) > 1 else None
            said = tracing.estimate(model, given, cache=folder, memory=memory, **asked)
            told.clear()
            trace(model, given, cache=folder, memory=memory, **asked)
            assert (said.facts, said.cells, said.passes, said.rows) == (count, sum(told), len(rows), max(rows))
            assert said.token_blocks == blocks
            assert said.seconds > 0
    assert tracing.estimate(model, facts, cache=cache, **asked).facts == 0  # all are finished


def test_an_estimate_of_memory_is_the_engine_s_for_the_largest_fact() -> None:
    model = tiny("llama")
    facts = known(model)
    encoded_facts = [encode_fact(model, fact, PromptSpec(), "probability") for fact in facts]
    for memory in (2.0, 0.0005):
        engine = engines.Checked(model, Sweep(), int(memory * 1e9))
        each = [engine.takes(len(one.input_ids), len(one.answer_ids), 10) for one in encoded_facts]
        said = tracing.estimate(model, facts, memory=memory, progress=False)
        assert said.memory == max(each)
    assert said.memory < 0.0005e9 + row_bytes(model, 20)
    assert str(said).startswith("3 facts, ")
    assert f"(by {said.timed}) and up to {said.memory / 1e9:.2g} GB beside the model" in str(said)
    with pytest.raises(UserError, match="memory is 0"):
        tracing.estimate(model, facts, memory=0)
