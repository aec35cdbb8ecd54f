"""The benchmark of the paper's claims, tiny: it trains, scores, tabulates, and does nothing twice."""

from __future__ import annotations

import importlib
import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lm import load
from lm.config import parse_config
from sae import SparseAutoencoder, SparseAutoencoderConfig
from sae.activations import CachedActivations, ReadSpec, open_cache
from sae.synthetic import Synthetic, SyntheticActivations
from sae.trainer import TrainSaeConfig
from tests.forked import run_forked

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
    return run_forked(ROOT / "benchmarks" / "sae_claims.py", *words)


def test_synthetic_over_two_seeds_and_again(tmp_path: Path) -> None:
    world = {"source.features": "64", "source.hidden": "16", "source.roots": "4", "source.branching": "2"}
    words = ["--out", str(tmp_path), "--held_out_tokens", "2048", "--change", changes(64, 20, **world)]
    done = run(*words, "--seeds", "[1, 2]", "--only", "[2]")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "rate-0.003" / "seed-1").exists()
    second = (tmp_path / "rate-0.003" / "scores" / "seed-2-topk_aux_k.json").stat().st_mtime_ns
    done = run(*words, "--seeds", "[1, 2]")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "rate-0.003" / "scores" / "seed-2-topk_aux_k.json").stat().st_mtime_ns == second
    assert done.stdout.strip().endswith((tmp_path / "table.md").read_text().strip())
    found = json.loads((tmp_path / "results.json").read_text())
    assert found.keys() == METHODS.keys()
    for name, runs in found.items():
        assert runs.keys() == {"1", "2"}
        assert f"| {name} | 2 |" in done.stdout
        for one in runs.values():
            assert one["l0"] == pytest.approx(4, abs=0.2)
            assert one["l0_exported"] == pytest.approx(4, abs=0.2)
            assert 0 < one["mcc"] < 1
            assert 0 < one["fvu_exported"] < 2
            assert one["scored_tokens"] == 2048
            assert 0 <= one["dead_training"] <= 1
    slower = run(*words, "--seeds", "[1, 2]", "--only", "[1]", "--rate", "0.001", "--which", "[topk_aux_k]")
    assert slower.returncode == 0, slower.stderr
    assert "| held-out NMSE at rate | 0.001 | 0.003 |" in slower.stdout
    last = slower.stdout.strip().splitlines()[-1].split("|")  # the table of rates has what both runs say of seed 1
    said = [json.loads((tmp_path / f"rate-{rate}/seed-1/results.json").read_text()) for rate in ("0.001", "0.003")]
    assert [float(cell) for cell in last[2:4]] == [round(one["topk_aux_k"]["nmse"], 4) for one in said]
    assert run(*words, "--which", "[topk_aux]").stderr.strip().endswith("(did you mean 'topk_aux_k'?)")
    again = run(
        *words, "--seeds", "[1, 2]", "--held_out_tokens", "4096"
    )  # other scoring: scored again, not trained again
    assert again.returncode == 0, again.stderr
    rescored = json.loads((tmp_path / "results.json").read_text())
    assert {one["scored_tokens"] for runs in rescored.values() for one in runs.values()} == {4096}
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_real_activations_are_harvested_once(tmp_path: Path) -> None:
    for name, start in (("train", 0), ("held", 500)):
        marks = (
            ("QQ",) if name == "train" else ("ZZ", "KK", "KK", "KK", "KK")
        )  # every fifth held-out article calibrates
        articles = (
            f" = Town {n} = \nThe {marks[n % len(marks)]} town of {n} has {n * n} people and {n % 7} hills.\n"
            for n in range(start, start + 90)
        )
        (tmp_path / f"{name}.txt").write_text("".join(articles))
    words = ["--data", "real", "--model", "builtin", "--tokens", "1536", "--held_out_tokens", "512", "--contexts", "2"]
    words += ["--calibrate_tokens", "256"]
    words += ["--text", str(tmp_path / "train.txt"), "--held_out_text", str(tmp_path / "held.txt"), "--seeds", "[1]"]
    words += ["--out", str(tmp_path / "out"), "--change", changes(64, 6, sites="[resid.1]")]
    done = run(*words)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found.keys() == METHODS.keys()
    caches = {"train": {"Q"}, "calibration": {"Z"}, "held_out": {"K"}}
    assert {name: marks_in(tmp_path / "out" / name) for name in caches} == caches
    for runs in found.values():
        assert runs["1"]["scored_tokens"] == 512
        assert runs["1"]["ce_recovered"] <= 1
    assert "CE recovered" in done.stdout
    assert json.loads((tmp_path / "out" / "train" / "manifest.json").read_text())["tokens"] == 1536
    other = run(*["builtin:retain_model" if word == "builtin" else word for word in words])
    assert other.returncode == 2
    assert "cache" in other.stderr


def marks_in(folder: Path) -> set[str]:
    """Which of the marks stand in the tokens of a cache."""
    tokenizer = load("builtin").tokenizer
    batches = CachedActivations(open_cache(folder), batch_tokens=64, reading=ReadSpec(epochs=1, keep_last=True))
    text = "".join(tokenizer.decode([token]) for batch in batches for token in batch.token_ids.tolist())
    return set("QZK") & set(text)


def test_what_is_scored_and_what_calibrates_is_never_what_was_trained_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    claims = importlib.import_module("benchmarks.sae_claims")
    base = parse_config(TrainSaeConfig, ["--config", str(ROOT / "configs/sae/claims_synthetic.yaml")])
    made = claims.Made(claims.Claims(), base)
    config = made.of_seed(7)
    assert (config.source.seed, config.held_out.seed) == (7, 7)
    drawn: list[int] = []

    class Watched(SyntheticActivations):
        def __init__(self, world: Synthetic, **more: Any) -> None:
            drawn.append(world.draw)
            super().__init__(world, **more)

    monkeypatch.setattr(claims, "SyntheticActivations", Watched)
    world = replace(config.source, features=64, hidden=16, roots=4, branching=2)
    tiny = replace(config, source=world)
    model = SparseAutoencoder(SparseAutoencoderConfig(hidden=16, features=64, k=4, choice="mutual"))
    model.start_from(next(SyntheticActivations(world, batch_tokens=64)).values)
    model.set_threshold(0.1)
    claims.Made(claims.Claims(held_out_tokens=2048, calibrate_tokens=512), base).score(model.eval(), tiny)
    assert len({config.source.draw, config.held_out.draw, *drawn}) == 4
