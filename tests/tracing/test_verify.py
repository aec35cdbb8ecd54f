"""Chosen cells on the wave are the reference's, and what is said of cells that were not computed is what may be said."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES
from families import tiny as tiny_family
from tiny_tracing import known, tiny

from lm import UserError
from lm.anatomy import Kind
from lm.load import LanguageModel
from lm.prompts import PromptSpec
from tracing import Fact, GaussianNoise
from tracing.probe import Probe, make_probe
from tracing.reference import score_cells
from tracing.sweep import Sweep
from tracing.wavefront import Wavefront

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
    model = tiny_family(name, dtype=torch.float64)
    if name == "olmoe":
        model.model.set_experts_implementation("eager")  # the grouped product has no float64
    return model


def probe_of(model: LanguageModel, sweep: Sweep) -> Probe:
    probe = make_probe(model, FACT, PromptSpec(), sweep.metric)
    assert probe.span == (2, 4)
    assert len(probe.prompt_ids) == 6
    return probe


@pytest.mark.parametrize("name", FAMILIES)
def test_chosen_cells_are_the_reference_s(name: str) -> None:
    model = double(name)
    questions: tuple[dict[str, Any], ...] = (
        {"window": 1},
        {"window": 5},
        {"window": 5, "sever": "mlp"},
        {"sever": "attn"},
    )
    for question in questions:
        sweep = Sweep(metric="log_probability", **question)
        probe = probe_of(model, sweep)
        batch = NOISE.bind(model, [probe]).batch(probe)
        expected = score_cells(model, probe, batch, sweep, ASKED)
        for rows in (10**6, 3, 1):
            found = Wavefront(model, sweep, rows).score_cells(probe, batch, ASKED)
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10, err_msg=f"{question} {rows}")
        assert np.ptp(expected) > 1e-3


def test_a_cell_that_does_not_exist_is_refused() -> None:
    model = tiny("llama")
    probe = make_probe(model, known(model)[0], PromptSpec(), "log_probability")
    batch = NOISE.bind(model, [probe]).batch(probe)
    wave = Wavefront(model, Sweep(kinds=("mlp",)), 100)
    for cell in (("attn", 2, 0), ("mlp", 99, 0), ("mlp", 2, 4)):
        with pytest.raises(UserError, match=r"no cell of .*choose of mlp, \d+ tokens and 4 layers"):
            wave.score_cells(probe, batch, [cell])  # type: ignore[list-item]
    assert wave.score_cells(probe, batch, []) == []
