"""Whose people the benchmark on a real model memorizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.real_model import Benchmark, tofu_authors
from lm.errors import UserError


def test_tofu_authors_are_documents_of_twenty_completions(tmp_path: Path) -> None:
    for name, authors in (("forget10", 2), ("retain90", 3), ("holdout10", 2)):
        rows = ({"question": f"{name} {row}?", "answer": f"It is {row}."} for row in range(20 * authors))
        (tmp_path / f"{name}.json").write_text("\n".join(map(json.dumps, rows)))
    forget, retain, unseen = tofu_authors(tmp_path, 2)
    assert (len(forget), len(retain), len(unseen)) == (40, 40, 40), "every author that no model saw"
    assert [forget[20].input, forget[20].output, forget[20].kind] == ["forget10 20?", "It is 20.", "sc"]
    assert len({row.id for row in forget}) == 40
    assert list(dict.fromkeys(row.document for row in forget)) == ["forget10-000", "forget10-001"]
    with pytest.raises(UserError, match="has 2 authors"):
        tofu_authors(tmp_path, 3)


def test_one_set_of_people_is_named() -> None:
    for given in ({}, {"lume": "x", "tofu": "y"}):
        with pytest.raises(UserError, match="one of them"):
            Benchmark(model="x", **given)
