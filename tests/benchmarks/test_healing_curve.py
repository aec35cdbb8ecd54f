"""Curves of healing, from metric logs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.comparison.healing_curve import HealingCurve, main, parts
from lm.errors import UserError


def test_parts_by_hand() -> None:
    run = parts("run", [4.0, 2.0, 1.0, 0.5, 0.25], 1000, count=2)
    assert run.divergence == (3.0, pytest.approx(1.75 / 3)), "two steps, then three"
    assert run.tokens == (200.0, 700.0), "their middles"
    assert len(parts("short", [1.0, 0.5], 100).divergence) == 2


def test_runs_that_were_perturbed_are_drawn_and_no_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, perturbed in (("moved", [{"place": "layer 0"}]), ("left", None)):
        folder = tmp_path / name / "seed-1"
        folder.mkdir(parents=True)
        lines = (json.dumps({"step": step, "retain_loss": 2.0**-step}) for step in range(20))
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        (folder / "manifest.json").write_text(json.dumps({"perturbed": perturbed, "tokens": 4000}))
    main(HealingCurve(runs=str(tmp_path), out=str(tmp_path / "curve.png")))
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    _, _, row = capsys.readouterr().out.strip().split("\n")
    assert row.startswith("| moved/seed-1 | 4,000 | 0.750 | 0.188 |")
    with pytest.raises(UserError, match="holds no finished run"):
        main(HealingCurve(runs=str(tmp_path / "left"), out=str(tmp_path / "curve.png")))
