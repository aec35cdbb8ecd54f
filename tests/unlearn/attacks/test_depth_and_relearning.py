"""Depth beside relearning: the correlation is that of made-up numbers, and facts are matched by their ids."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.depth_and_relearning import lines, rank_correlation
from lm.errors import UserError


def test_the_rank_correlation_of_reversed_and_of_unrelated_numbers() -> None:
    groups = [f"p{place // 2}" for place in range(40)]
    rising = list(range(40))
    assert rank_correlation(rising, rising[::-1], groups) == pytest.approx((-1, -1, -1))
    mean, low, high = rank_correlation(rising, list(np.random.default_rng(0).permutation(40)), groups)
    assert low < 0 < high
    assert low < mean < high
    assert np.isnan(rank_correlation(rising, [0] * 39 + [1], groups)[1]), "many a resample has nothing but zeros"


def test_facts_are_matched_by_id_and_one_without_a_depth_is_left_out() -> None:
    facts = [{"id": f"p{n}qa0", "depth": n / 10} for n in range(8)] + [{"id": "p8qa0", "depth": None}]
    rows = [
        {
            "id": f"p{n}qa0",
            "document": f"p{n}",
            "unlearned": [0, 8 - n],
            "retain_model": [0, 0],
            "unlearned_log": [0, n],
            "retain_model_log": [0, 0],
        }
        for n in reversed(range(10))
    ]
    trial = {"name": "retain", "rows": rows, "excess": {"mean": 0.5, "low": 0.4, "high": 0.6}, "verdict": "more"}
    depth = {"depth": 0.35, "low": 0.3, "high": 0.4, "facts": facts}
    (line,) = lines("joint", depth, {"trials": [trial]})
    assert line.startswith("| joint | 0.35 (0.30 to 0.40) | retain | 0.500 (0.400 to 0.600) | more | 8 |")
    assert line.endswith("| -1.00 (-1.00 to -1.00) | 1.00 (1.00 to 1.00) |")
    with pytest.raises(UserError, match="no fact in common"):
        lines("joint", {**depth, "facts": []}, {"trials": [trial]})
