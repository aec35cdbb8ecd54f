"""What training gives: thresholds that keep k, models that are their files, features that are brought back."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from made import SITE, Made
from small_training import ALL, BATCH, FEATURES, K, equal, recipe, spec

from lm import UserError
from sae import SparseAutoencoder
from sae.activations import ActivationBatch
from sae.sharding import Mesh
from sae.trainer import (
    named,
    train_on_stream,
)
from sae.trainer.config import AutoencoderSpec
from sae.trainer.loop import Loop


@pytest.mark.parametrize("name", ["results.json", "config.yaml", "metrics.jsonl", "checkpoints"])
def test_an_autoencoder_is_not_called_like_a_file_of_the_run(name: str) -> None:
    with pytest.raises(UserError, match="as the run's own files are called: give another name"):
        AutoencoderSpec(name=name, choice="token", features=FEATURES, k=K)


def test_the_exported_model_is_the_trained_one(tmp_path: Path) -> None:
    """For activations as they are, token by token: the measures again, from the file; L0 within 3 % of k."""
    held_out = {SITE: next(Made(batch=4096, seed=0, length=9)).values}
    settings = recipe(steps=100, batch_tokens=256, calibrate_tokens=8192, start_tokens=512, auxiliary={"window": 5000})
    results = train_on_stream(Made(batch=256), named(ALL, [SITE]), settings, held_out=held_out, show=False)
    assert results is not None
    x = held_out[SITE][2048:]  # the first half set the thresholds
    for result in results:
        result.autoencoder.save_pretrained(tmp_path / result.name)
        model = SparseAutoencoder.from_pretrained(tmp_path / result.name)
        error = (x - model(x)).square().sum() / (x - x.mean(0)).square().sum()
        assert float(error.detach()) == pytest.approx(result.measures["fvu_exported"], rel=1e-4)
        alone = sum(model.encode(row.unsqueeze(0)).matches for row in x[:200]) / 200
        together = model.encode(x).matches / len(x)
        assert together == pytest.approx(result.measures["l0_exported"], rel=1e-3)
        assert alone == pytest.approx(float(model.encode(x[:200]).token_counts().double().mean()), abs=0.02)
        assert together == pytest.approx(K, rel=0.03), result.name
        assert float(model.variance) == pytest.approx(float((x - x.mean(0)).square().mean()), rel=0.2)
        assert result.measures["fvu_exported"] < 0.6
        torch.testing.assert_close(model.w_dec.norm(dim=1), torch.ones(FEATURES))


class Repeated(Made):
    """The same few batches again and again."""

    def __next__(self) -> ActivationBatch:
        self.batches %= 3
        return super().__next__()


def test_thresholds_from_held_out_tokens_keep_k_where_training_tokens_were_learned_by_heart() -> None:
    held_out = {SITE: next(Made(batch=8192, seed=0)).values}
    found = {}
    for choice in ("mutual", "feature"):
        for where in ("held_out", "training"):
            settings = recipe(steps=400, batch_tokens=64, calibrate_tokens=4096, calibrate_on=where)
            (result,) = (
                train_on_stream(
                    Repeated(batch=64), named([spec(choice)], [SITE]), settings, held_out=held_out, show=False
                )
                or []
            )
            found[choice, where] = result.measures["l0_exported"]
        assert found[choice, "held_out"] == pytest.approx(K, rel=0.03)
        assert abs(found[choice, "training"] - K) > 0.06 * K
        assert result.measures["l0"] == pytest.approx(K)  # whole batches have training's budgets exactly


def test_running_thresholds_are_there_too() -> None:
    settings = recipe(steps=60, batch_tokens=256, thresholds="running", threshold_rate=0.1)
    results = train_on_stream(Made(batch=256), named([spec("mutual")], [SITE]), settings, show=False)
    assert results is not None
    x = next(Made(batch=2048, seed=0)).values
    assert results[0].autoencoder.encode(x).matches / len(x) == pytest.approx(K, rel=0.1)


@pytest.mark.parametrize("choice", ["token", "mutual", "feature"])
def test_bfloat16_and_unscaled_train_too(choice: str) -> None:
    """Products in bfloat16 come near float32 ones; scaling changes the result only through rates and Adam's epsilon."""
    errors = []
    for settings in ({}, {"precision": "bfloat16", "backend": "torch"}, {"scale": False}, {"precision": "tf32"}):
        held_out = {SITE: next(Made(batch=512, seed=0)).values}
        one = recipe(steps=40, batch_tokens=128, decay=0.0, **settings)
        (result,) = (
            train_on_stream(Made(batch=128), named([spec(choice)], [SITE]), one, held_out=held_out, show=False) or []
        )
        assert result.autoencoder.w_dec.dtype == torch.float32
        errors.append(result.measures["fvu_exported"])
    assert errors[1] == pytest.approx(errors[0], abs=0.05)
    assert errors[2] == pytest.approx(errors[0], abs=0.15)
    assert errors[3] == pytest.approx(errors[0], abs=0.02)
    assert torch.get_float32_matmul_precision() == "highest"


def test_aux_zipf_with_tau_0_trains_as_aux_k_does() -> None:
    """Also where features died: their densities are averages and do not come back to exactly 0."""
    found = {}
    for loss in ("none", "aux_k", "aux_zipf"):
        settings, one = recipe(steps=40, auxiliary={"tau": 0.0, "window": 64}), spec("mutual", k=1, auxiliary=loss)
        (found[loss],) = train_on_stream(Made(batch=BATCH), named([one], [SITE]), settings, show=False) or []
    equal(found["aux_k"], found["aux_zipf"])
    assert not torch.equal(found["aux_k"].autoencoder.w_enc, found["none"].autoencoder.w_enc)


def test_the_dead_are_always_among_the_under_used() -> None:
    settings = recipe(auxiliary={"window": 64, "tau": 1e-9, "coefficient": 0.0}, zipf={"expected": "fixed"})
    loop = Loop(Made(batch=BATCH), named([spec("mutual", k=1)], [SITE]), settings, Mesh(), torch.device("cpu"))
    loop.sample, loop.held_out = {}, {}
    loop.train(resume=False, stop_at=19, show=False)
    (member,) = loop.members
    dead = member.firings.dead(window=64)
    assert member.law.expected is not None
    assert bool((member.firings.density()[dead] > 0).any())  # so that under-use alone would miss them
    idle, use = member.idle()
    assert bool((use[dead] == 1).all())
    assert bool(idle[dead].all())


def test_thresholds_are_said_to_be_running_ones_where_activations_ended() -> None:
    settings = recipe(steps=4, calibrate_tokens=64)
    with pytest.warns(UserWarning, match="ended before thresholds were calibrated"):
        results = train_on_stream(Made(batch=BATCH, length=7), named(ALL, [SITE]), settings, show=False) or []
    assert [one.thresholds for one in results] == ["none", "running", "running"]
    held_out = {SITE: next(Made(batch=80)).values}
    results = (
        train_on_stream(Made(batch=BATCH), named(ALL, [SITE]), recipe(steps=2), held_out=held_out, show=False) or []
    )
    assert [one.thresholds for one in results] == ["none", "held_out", "held_out"]
    assert {one.backend for one in results} == {"cpu"}


def test_budgets_are_carried_where_a_batch_is_smaller_than_the_dictionary() -> None:
    for budgets in ("uniform", "zipf"):
        settings = recipe(steps=6, batch_tokens=4, zipf={"budgets": budgets, "mutual_share": 0.0})
        (result,) = train_on_stream(Made(batch=4), named([spec("feature")], [SITE]), settings, show=False) or []
        assert result.autoencoder.w_dec.isfinite().all()


def test_measures_in_bfloat16_are_those_of_the_file() -> None:
    held_out = {SITE: next(Made(batch=512, seed=0)).values}
    settings = recipe(steps=30, batch_tokens=64, precision="bfloat16", backend="torch")
    (result,) = (
        train_on_stream(Made(batch=64), named([spec("mutual")], [SITE]), settings, held_out=held_out, show=False) or []
    )
    scored = held_out[SITE][64:]
    used = scored[: len(scored) // 64 * 64]
    assert result.autoencoder.encode(used).matches / len(used) == pytest.approx(
        result.measures["l0_exported"], rel=1e-3
    )


def test_uniform_budgets_below_a_token_a_feature_keep_l0() -> None:
    """96 features with k 1, scored on 24 tokens: a quarter of a token is due to each."""
    settings = recipe(
        steps=6,
        batch_tokens=96,
        held_out_tokens=24,
        calibrate_tokens=96,
        calibrate_on="training",
        zipf={"budgets": "uniform"},
    )
    held_out = {SITE: next(Made(batch=24, seed=0)).values}
    one = spec("feature", features=96, k=1)
    results = train_on_stream(Made(batch=96), named([one], [SITE]), settings, held_out=held_out, show=False)
    assert results is not None
    assert 0.8 < results[0].measures["l0"] <= 1.0


def test_dead_features_are_counted_in_training_and_not_on_a_few_held_out_tokens() -> None:
    held_out = {SITE: next(Made(batch=70, seed=0)).values}
    settings = recipe(steps=20, calibrate_tokens=32, held_out_tokens=8, auxiliary={"window": 10**7})
    loop = Loop(Made(batch=BATCH), named([spec("token")], [SITE]), settings, Mesh(), torch.device("cpu"))
    loop.sample, loop.held_out = {}, {SITE: held_out[SITE][:8]}
    (result,) = loop.train(resume=False, stop_at=None, show=False) or []
    never = (loop.members[0].firings.silent == 20 * BATCH).double().mean()
    assert result.dead_in_training == pytest.approx(float(never))
    assert result.measures["dead"] > result.dead_in_training


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (torch.ones(64, 9), "held_out is (64, 9) at resid at layer 0 and what is trained on is 8 wide"),
        (torch.full((64, 8), torch.nan), "held_out holds NaN or infinity at resid at layer 0"),
        (torch.full((64, 8), torch.inf), "held_out holds NaN or infinity at resid at layer 0"),
    ],
)
def test_held_out_tokens_are_looked_at_before_training(bad: torch.Tensor, says: str) -> None:
    with pytest.raises(UserError, match=re.escape(says)):
        train_on_stream(Made(batch=BATCH), named(ALL, [SITE]), recipe(), held_out={SITE: bad}, show=False)


def test_a_sample_of_less_than_a_firing_a_feature_is_refused() -> None:
    settings = recipe(calibrate_tokens=20)
    with pytest.raises(UserError, match=r"cannot be calibrated on 20 tokens with k 1.*calibrate_tokens to at least 24"):
        train_on_stream(Made(batch=BATCH), named([spec("feature", k=1)], [SITE]), settings, show=False)
