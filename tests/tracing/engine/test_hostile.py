"""What is not meant to happen: ids that are paths or markup, full disks, prompts that are too long, tiny and broken models."""

from __future__ import annotations

import errno
import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_tracing import known, say, tiny

from lm.errors import UserError
from lm.model import LanguageModel, ModelSpec
from tests.forked import run_forked
from tracing import Effects, Fact, GaussianNoise, LayerPlan, TokenReplacement, estimate, plot, trace
from tracing.known import known_facts
from tracing.stages.trace.config import TraceConfig
from tracing.stages.trace.stage import run_trace

ROOT = Path(__file__).resolve().parents[3]
IDS = ("../../x", "<script>alert(1)</script>", "y" * 300, "a\nb\r\t", "\u0141\u00f3d\u017a \u202e$\\frac{", "nul\x00")


def saved(model: LanguageModel, folder: Path) -> str:
    model.model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return str(folder)


def stage(path: str, out: Path, **more: Any) -> TraceConfig:
    return TraceConfig(model=ModelSpec(path=path, device="cpu"), kinds=("mlp",), out=str(out), **more)


def test_the_script_takes_ids_that_are_paths_markup_or_endless(tmp_path: Path) -> None:
    model = tiny("olmo")
    asked = [replace(fact, id=name, group=name) for fact, name in zip(known(model, how_many=6), IDS, strict=True)]
    lines = [asdict(one) for one in asked]
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    path, inside = saved(model, tmp_path / "model"), tmp_path / "inside" / "run"
    before = sorted(tmp_path.iterdir())
    words = [
        "--model.path",
        path,
        "--model.device",
        "cpu",
        "--facts",
        str(tmp_path / "facts.jsonl"),
        "--out",
        str(inside),
    ]
    done = run_forked(ROOT / "scripts" / "trace.py", *words, "--kinds", "[mlp]")
    assert done.returncode == 0, done.stderr
    effects = Effects.load(inside / "effects.npz")
    assert [fact.id for fact in effects.facts] == list(IDS)
    assert [one["id"] for one in json.loads((inside / "effects.json").read_text())["facts"]] == list(IDS)
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "inside"])  # nothing is written elsewhere
    assert not any(name in str(path.relative_to(inside)) for path in inside.rglob("*") for name in ("script", "yyy"))
    for index in range(len(IDS)):
        assert plot(effects, index).png.startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["id", "group", "foil", "answer"])
def test_half_a_surrogate_pair_is_refused_before_anything_runs(name: str) -> None:
    with pytest.raises(UserError, match=f"the {name} of a fact is .*cannot be written as UTF-8"):
        Fact(**{"prompt": "Ada is a", "subject": "Ada", "answer": "poet", name: "x\ud800"})


@pytest.mark.parametrize("engine", ["wavefront", "reference"])
def test_a_prompt_longer_than_the_model_s_positions_is_left_out(engine: str) -> None:
    model = tiny("gpt2")
    facts = known(model)
    fits = Fact(
        "ada " + "w1 " * 62 + "is", "ada", "w1 w2", id="one too many"
    )  # the answer's first token is put in, too
    long = replace(facts[0], prompt=facts[0].prompt + " now" * 80, id="long")
    effects = trace(model, [long, *facts, fits], kinds=("mlp",), engine=engine, progress=False)
    assert list(effects.facts) == facts
    assert {one.fact.id: one.reason for one in effects.skipped} == {
        "long": "its 88 tokens are more than the model's 64 positions",
        "one too many": "its 65 tokens are more than the model's 64 positions",
    }
    assert estimate(model, [long, *facts], progress=False).facts == len(facts)
    assert [encoded.fact for encoded in known_facts(model, [long, *facts], effects_prompt())[0]] == facts
    exactly = Fact("ada " + "w1 " * 62 + "is", "ada", say(model, "ada " + "w1 " * 62 + "is", 1))
    assert len(trace(model, [exactly], kinds=("mlp",), engine=engine, progress=False).tokens[0]) == 64
    with pytest.raises(UserError, match="the first, 'long': its 88 tokens"):
        trace(model, [long], progress=False)


def effects_prompt() -> Any:
    return TraceConfig().prompt


def test_a_model_of_one_layer_gives_a_plan_that_tells_nothing_apart(tmp_path: Path) -> None:
    model = tiny("olmo", layers=1)
    path = saved(model, tmp_path / "model")
    also = (TokenReplacement(any_question=True),)
    result = run_trace(stage(path, tmp_path / "run", window=3, also=also), known(model, how_many=6))
    assert result.plan.layers == (0,)
    assert not result.plan.singled_out
    assert LayerPlan.load(tmp_path / "run" / "plan.json").verdict == result.plan.verdict


def test_weights_that_are_not_numbers_are_told() -> None:
    model = tiny("olmo")
    facts, embeddings = known(model), model.model.get_input_embeddings().weight  # type: ignore[union-attr]
    assert isinstance(embeddings, torch.Tensor)
    with torch.no_grad():
        embeddings[40] = float("nan")  # of a token that no fact has
    assert len(trace(model, facts, kinds=("mlp",), progress=False).facts) == len(facts)
    with pytest.raises(UserError, match="the embeddings of tiny olmo hold NaN or infinity"):
        trace(model, facts, corruption=GaussianNoise(covariance="full"), progress=False)
    with torch.no_grad():
        model.model.get_parameter("model.layers.2.mlp.down_proj.weight")[0, 0] = float("nan")
    with pytest.raises(UserError, match="tiny olmo gives NaN or infinite logits for fact 'fact0'"):
        trace(model, facts, progress=False)


@contextmanager
def small_files(size: int) -> Iterator[None]:
    """No file of this process may grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_that_may_not_grow_costs_no_finished_fact(tmp_path: Path) -> None:
    model = tiny("olmo")
    path, facts = saved(model, tmp_path / "model"), known(model, how_many=6)
    with small_files(3000), pytest.raises(UserError, match=r"cannot write .*effects.*, the file would be larger"):
        run_trace(stage(path, tmp_path / "run"), facts)
    assert len(list((tmp_path / "run" / "facts").glob("*.npz"))) == 6
    assert not list(tmp_path.rglob("*.tmp"))
    assert not (tmp_path / "run" / "plan.json").exists()
    again = run_trace(stage(path, tmp_path / "run", resume=True), facts)
    assert again.plan == run_trace(stage(path, tmp_path / "whole"), facts).plan


def test_a_disk_that_fills_up_in_mid_sweep_is_one_sentence_and_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("olmo")
    path, facts, written = saved(model, tmp_path / "model"), known(model, how_many=6), []
    real = os.fsync

    def filling(file: int) -> None:
        written.append(file)
        if len(written) > 10:  # config, manifest and three facts, each with its folder
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file)

    with monkeypatch.context() as full:
        full.setattr(os, "fsync", filling)
        with pytest.raises(UserError, match=r"cannot write .*npz, the disk is full: .*--resume true"):
            run_trace(stage(path, tmp_path / "run"), facts)
    kept = {one.name: one.stat().st_mtime_ns for one in (tmp_path / "run" / "facts").iterdir()}
    assert len(kept) == 3
    again = run_trace(stage(path, tmp_path / "run", resume=True), facts)
    assert kept.items() <= {one.name: one.stat().st_mtime_ns for one in (tmp_path / "run" / "facts").iterdir()}.items()
    whole = run_trace(stage(path, tmp_path / "whole"), facts).effects
    for mine, theirs in zip(again.effects.restored["mlp"], whole.restored["mlp"], strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-9)  # fewer facts share the wave: rounding
