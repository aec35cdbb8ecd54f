"""Files of effects, scores and plans end in their object or in one sentence, whatever they hold."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lm.errors import UserError
from tracing import Effects, Fact, LayerPlan
from tracing.effects.layer_scores import LayerScores

FACTS = (Fact("Anna lives in", "Anna", "Gdańsk", id="a"), Fact("Where is Zoë?", "Zoë", "here", id="b"))
EFFECTS = Effects(
    facts=FACTS,
    clean=np.array([0.9, 0.8]),
    corrupted=np.array([0.1, 0.2]),
    restored={"mlp": [np.full((3, 4), 0.5), np.full((2, 4), 0.25)]},
    tokens=(("Anna", " lives", " in"), ("Where is", " Zoë?")),
    subject_spans=((0, 1), (1, 2)),
    sigma=0.1,
    metric="probability",
    window=1,
)


@pytest.mark.parametrize(
    "wrong",
    [
        {"clean": np.array([0.9])},
        {"corrupted": np.array([[0.1, 0.2]])},
        {"restored": {"mlp": [np.full((3, 4), 0.5), np.full((3, 4), 0.25)]}},
        {"restored": {"mlp": [np.full((3, 4), 0.5), np.full((2, 5), 0.25)]}},
        {"restored": {"mlp": [np.full((3,), 0.5), np.full((2, 4), 0.25)]}},
        {"restored": {}},
        {"tokens": (("Anna",),)},
        {"subject_spans": ((0, 9), (1, 2))},
        {"clean": np.array(["a", "b"])},
    ],
)
def test_effects_of_another_shape_are_refused_when_they_are_read(tmp_path: Path, wrong: dict[str, Any]) -> None:
    path = tmp_path / "effects.npz"
    EFFECTS.save(path)
    assert Effects.load(path).tokens == EFFECTS.tokens
    replace(EFFECTS, **wrong).save(path)
    with pytest.raises(UserError, match=r"effects\.npz is not a readable effects file"):
        Effects.load(path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"version": 1, "layers": ["two"]}', "layers \\['two'\\]: give whole numbers"),
        ('{"version": 1, "layers": [1], "controls": {"all": [null]}}', "controls.all .*: give whole numbers"),
        ('{"version": 1, "layers": [1], "layers": [2]}', "has the key 'layers' twice"),
        ('{"version": 1, "layers": [1], "modules": [[]]}', "give names of modules"),
        ("[" * 100_000, "nested too deep"),
        ('{"version": ' + "1" * 5000 + "}", "too long"),
    ],
)
def test_a_plan_that_is_none_is_one_sentence(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(UserError, match=says):
        LayerPlan.load(path)


def scores(path: Path) -> None:
    LayerScores(source="x", unit="y", facts=FACTS, values={"mlp": np.ones((2, 4))}).save(path)


def plan(path: Path) -> None:
    path.write_text(json.dumps({"version": 1, "layers": [1, 2], "modules": ["mlp"], "controls": {"all": [0, 1, 2]}}))


FILES: dict[str, tuple[Callable[[Path], object], Callable[[Path], None]]] = {
    "effects.npz": (Effects.load, EFFECTS.save),
    "scores.npz": (LayerScores.load, scores),
    "plan.json": (LayerPlan.load, plan),
}


@pytest.mark.parametrize("name", FILES)
def test_bytes_at_random_end_in_the_object_or_in_one_sentence(tmp_path: Path, name: str) -> None:
    load, write = FILES[name]
    path = tmp_path / name
    write(path)
    content, draw = path.read_bytes(), random.Random(name)
    refused: list[str] = []
    load(path)
    for _ in range(100):
        data = bytearray(content)
        for _ in range(draw.randint(1, 3)):
            start = draw.randrange(len(data))
            data[start : start + draw.randint(1, 8)] = draw.randbytes(draw.randint(0, 8))
        path.write_bytes(bytes(data))
        try:
            load(path)
        except UserError as error:
            refused.append(str(error))
    assert refused
    assert [said for said in refused if name not in said] == []
