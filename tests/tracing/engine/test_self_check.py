"""The wavefront's first fact is checked against the reference: no more is let pass than rounding explains."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_tracing import known, tiny

from lm import UserError
from tracing import trace
from tracing.engine import engines
from tracing.engine.engines import _rounding
from tracing.engine.reference import Traced
from tracing.engine.wavefront import Wavefront
from tracing.question.metrics import MetricName, metric_of


def test_an_engine_that_does_nothing_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    facts = known(model, answer_tokens=1)

    def nothing(self: Any, *args: Any, **more: Any) -> list[Traced]:
        found = real(self, *args, **more)
        return [
            Traced(
                clean=one.clean,
                corrupted=one.corrupted,
                restored={kind: np.full_like(cells, one.corrupted) for kind, cells in one.restored.items()},
            )
            for one in found
        ]

    real = Wavefront.trace
    monkeypatch.setattr(engines.Wavefront, "trace", nothing)
    with pytest.raises(UserError, match=r"disagree on tiny llama .*engine: reference"):
        trace(model, facts, progress=False)


def test_long_answers_in_low_precision_may_lie_further_apart_and_others_not() -> None:
    low, single = torch.bfloat16, torch.float32

    def refused(dtype: torch.dtype, tokens: int, metric: MetricName, got: float, value: float) -> bool:
        return abs(got - value) > metric_of(metric).tolerance(_rounding(dtype, tokens), abs(value))

    twelve = 1e-8 * np.exp(12 * 0.05)  # each token 0.05 nats off
    assert not refused(low, 12, "probability", twelve, 1e-8)
    assert refused(low, 2, "probability", twelve, 1e-8)
    assert not refused(low, 12, "log_probability", -18.4, -19.0)
    assert refused(low, 12, "log_probability", -18.4, -20.0)
    assert refused(single, 12, "probability", 0.201, 0.200)
    assert not refused(single, 1, "negative_kl", -3.001, -3.0)
    assert refused(single, 1, "reciprocal_rank", 0.5, 1.0)
