"""Depth of unlearning: a model that still holds everything is at 0, one that never learned at 1, and plain patching agrees."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from families import FAMILIES, RECURRENT
from families import tiny as tiny_family
from tiny_tracing import known, tiny

from lm import UserError
from lm.anatomy import Site
from lm.forward.hooks import Edit, capture, patch
from lm.model import LanguageModel, ModelSpec
from lm.prompts import PromptSpec
from tracing import Fact, unlearning_depth
from tracing.depth import DepthReport, lost_with, streams_for
from tracing.question.encoded_fact import embed, encode_fact, forward
from tracing.question.metrics import read_off
from tracing.question.target import Target
from tracing.stages.depth.config import DepthConfig
from tracing.stages.depth.stage import run_depth


def changed(model: LanguageModel, make: object, seed: int, size: float) -> LanguageModel:
    """The same family with every matrix moved a little."""
    assert callable(make)
    other: LanguageModel = make()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for own, new in zip(model.model.parameters(), other.model.parameters(), strict=True):
            new.copy_(
                own + size * own.std() * torch.randn(own.shape, generator=generator).to(own) if own.ndim > 1 else own
            )
    return other


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_every_layer_is_that_of_a_plain_patch_of_the_original(name: str) -> None:
    if name in RECURRENT:
        with pytest.raises(UserError, match="depth of unlearning cannot be measured"):
            unlearning_depth(
                *[tiny_family(name)] * 3, [Fact("Where was Anna Kowalska born?", "Anna Kowalska", "in 1984")]
            )
        return
    model, other = tiny_family(name), tiny_family(name)
    other = changed(model, lambda: other, 1, 0.5)
    encoded = encode_fact(
        model, Fact("Where was Anna Kowalska born?", "Anna Kowalska", " on 1984"), PromptSpec(), "log_probability"
    )
    keep, target = len(encoded.answer_ids), Target.of([encoded], 1)
    given = embed(model, encoded.input_ids)[None]
    own = float(read_off(forward(model, given, keep), target, "log_probability")[0])
    sites = [Site("resid", layer) for layer in range(model.anatomy.layers)]
    with capture(other, sites) as seen:
        forward(other, embed(other, encoded.input_ids)[None], keep)
    for scope, places in (("answer", slice(len(encoded.prompt_ids) - 1, None)), ("all", slice(0, None))):
        streams = streams_for(other, model, [encoded], PromptSpec(), "log_probability", scope)  # type: ignore[arg-type]
        found = lost_with(model, encoded, streams, "log_probability", scope)[0]  # type: ignore[arg-type]
        expected = []
        for site in sites:
            with patch(model, [Edit(site=site, value=seen[site][:, places], positions=places)]):
                score = float(read_off(forward(model, given, keep), target, "log_probability")[0])
            expected.append((own - score) / keep)
        np.testing.assert_allclose(found, expected, atol=1e-5)
        assert np.abs(found).max() > 1e-3


def test_what_is_unchanged_is_at_zero_and_what_never_learned_at_one() -> None:
    model, retain_model = tiny(seed=0), tiny(seed=4)
    facts = known(model)
    assert unlearning_depth(model, retain_model, model, facts).mean()[0] == pytest.approx(0, abs=1e-4)
    assert unlearning_depth(model, retain_model, retain_model, facts).mean()[0] == pytest.approx(1, abs=1e-4)
    near = changed(model, lambda: tiny(seed=9), 2, 0.05)
    far = changed(model, lambda: tiny(seed=9), 2, 0.6)
    little, much = (unlearning_depth(model, retain_model, one, facts).mean()[0] for one in (near, far))
    assert 0 < little < much <= 1


def test_the_formula_by_hand() -> None:
    facts = tuple(Fact("who is ada", "ada", "w1", id=str(n), group=str(n)) for n in range(2))
    found = DepthReport(
        facts=facts,
        retain_model=np.array([[0.04, 1.0, 3.0], [0.01, 0.0, -2.0]]),
        changed=np.array([[9.0, 0.5, 6.0], [1.0, 1.0, 1.0]]),
        threshold=0.05,
    )
    np.testing.assert_allclose(found.depth, [(0.5 + 3.0) / 4.0, np.nan])
    assert "1 of 2 facts" in str(found)
    assert found.to_json()["facts"][1]["depth"] is None
    assert found.to_json()["low"] is None  # one fact has a depth: no interval
    assert "cannot be told" in str(replace(found, threshold=9.0))


def test_models_that_do_not_belong_together_are_refused() -> None:
    model = tiny()
    with pytest.raises(UserError, match="models of one shape"):
        unlearning_depth(model, tiny(layers=2), model, known(model))
    with pytest.raises(UserError, match="no facts"):
        unlearning_depth(model, model, model, [])


def test_the_stage_goes_from_three_folders_to_a_file(tmp_path: Path) -> None:
    models = {
        "original": tiny(seed=0),
        "retain_model": tiny(seed=4),
        "changed": changed(tiny(), lambda: tiny(seed=9), 2, 0.3),
    }
    for name, model in models.items():
        model.model.save_pretrained(tmp_path / name)
        model.tokenizer.save_pretrained(tmp_path / name)
    specs = {name: ModelSpec(path=str(tmp_path / name), device="cpu") for name in models}
    config = DepthConfig(
        model=specs["changed"],
        original=specs["original"],
        retain_model=specs["retain_model"],
        metric="log_probability",
        out=str(tmp_path / "run"),
    )
    facts = [*known(models["original"]), Fact("w3 is ada", "ada", "w4 w4", id="unknown")]
    report = run_depth(config, facts)
    expected = unlearning_depth(*models.values(), facts[:3], metric="log_probability")
    np.testing.assert_allclose(report.depth, expected.depth, atol=1e-5)
    written = json.loads((tmp_path / "run" / "depth.json").read_text())
    assert written["sentence"] == str(report)
    assert list(written["left_out"]) == ["unknown"]
    with pytest.raises(UserError, match="threshold is -1"):
        DepthConfig(threshold=-1)
    with pytest.raises(UserError, match="already holds a run: give another folder, or --resume true"):
        run_depth(config, facts)
    assert np.array_equal(run_depth(replace(config, resume=True), facts).depth, report.depth)
    with pytest.raises(UserError, match="facts changed since it began"):
        run_depth(replace(config, resume=True), facts[:2])
