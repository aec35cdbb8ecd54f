"""The benchmark of the paper's claims, tiny: it trains, scores, tabulates, and does nothing twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
METHODS = {"topk_aux_k": "token", "feature_choice_aux_zipf": "feature", "mutual_choice_aux_zipf": "mutual"}


def changes(features: int, steps: int, **more: str) -> str:
    """The words that make the configs of the repository tiny."""
    specs = ", ".join(
        f"{{name: {name}, choice: {choice}, features: {features}, k: 4, learning_rate: 0.003}}"
        for name, choice in METHODS.items()
    )
    trainer = {
        "steps": str(steps),
        "batch_tokens": "256",
        "start_tokens": "256",
        "calibrate_tokens": "1024",
        "held_out_tokens": "512",
        "evaluate_every": str(steps // 2),
    }
    words = {"autoencoders": f"[{specs}]", **more, **{f"trainer.{name}": value for name, value in trainer.items()}}
    return json.dumps([word for name, value in words.items() for word in (f"--{name}", value)])


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "sae_claims.py"), *words]
    quiet = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.run(command, capture_output=True, text=True, env=quiet, check=False)


def test_synthetic_over_two_seeds_and_again(tmp_path: Path) -> None:
    world = {"source.features": "64", "source.hidden": "16", "source.roots": "4", "source.branching": "2"}
    words = ["--out", str(tmp_path), "--held_out_tokens", "2048", "--change", changes(64, 20, **world)]
    done = run(*words, "--seeds", "[1, 2]", "--only", "[2]")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "seed-1").exists()
    second = (tmp_path / "scores" / "seed-2-topk_aux_k.json").stat().st_mtime_ns
    done = run(*words, "--seeds", "[1, 2]")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "scores" / "seed-2-topk_aux_k.json").stat().st_mtime_ns == second
    assert done.stdout.strip().endswith((tmp_path / "table.md").read_text().strip())
    found = json.loads((tmp_path / "results.json").read_text())
    assert found.keys() == METHODS.keys()
    for name, runs in found.items():
        assert runs.keys() == {"1", "2"}
        assert f"| {name} | 2 |" in done.stdout
        for one in runs.values():
            assert one["l0"] == pytest.approx(4, abs=0.2)
            assert 0 < one["mcc"] < 1
            assert one["fvu_scored"] == pytest.approx(one["fvu_exported"], rel=0.3)
            assert one["scored_tokens"] == 2048
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_real_activations_are_harvested_once(tmp_path: Path) -> None:
    for name, start in (("train", 0), ("held", 500)):
        articles = (
            f" = Town {n} = \nThe town of {n} has {n * n} people and {n % 7} hills.\n" for n in range(start, start + 90)
        )
        (tmp_path / f"{name}.txt").write_text("".join(articles))
    words = ["--data", "real", "--model", "builtin", "--tokens", "1536", "--held_out_tokens", "512", "--contexts", "2"]
    words += ["--text", str(tmp_path / "train.txt"), "--held_out_text", str(tmp_path / "held.txt"), "--seeds", "[1]"]
    words += ["--out", str(tmp_path / "out"), "--change", changes(64, 6, sites="[resid.1]")]
    done = run(*words)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found.keys() == METHODS.keys()
    for runs in found.values():
        assert runs["1"]["scored_tokens"] == 512
        assert runs["1"]["ce_recovered"] <= 1
    assert "CE recovered" in done.stdout
    assert json.loads((tmp_path / "out" / "train" / "manifest.json").read_text())["tokens"] == 1536
