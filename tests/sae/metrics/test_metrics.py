"""Every measure against what it must be: the mean, the perfect, the zero, the whole, the dense, the synthetic law."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lm import UserError
from sae import (
    SparseAutoencoder,
    SparseAutoencoderConfig,
    SparseCode,
    ZipfLaw,
    calibrate_mutual,
    feature_choice,
    mutual_choice,
    token_choice,
)
from sae.metrics import (
    Moments,
    Reconstruction,
    Usage,
    density_histogram,
    fitted_densities,
)

HIDDEN = 5


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sample(tokens: int = 60, seed: int = 0) -> Tensor:
    return rand(tokens, HIDDEN, seed=seed) * torch.tensor([0.1, 1, 2, 3, 10.0]) + 100


def pooled(x: Tensor, x_hat: Tensor) -> float:
    """FVU in one go, two passes, float64."""
    x, x_hat = x.double(), x_hat.double()
    return float((x - x_hat).square().sum() / (x - x.mean(0)).square().sum())


def measured(x: Tensor, x_hat: Tensor, **more: float) -> Reconstruction:
    return Reconstruction.start(HIDDEN, **more).update(x, x_hat)


# --- reconstruction ---


def test_the_mean_explains_nothing_and_the_perfect_all() -> None:
    x = sample()
    mean = x.double().mean(0).expand(len(x), -1)
    assert measured(x.double(), mean).result().explained_variance == pytest.approx(0, abs=1e-12)
    assert measured(x, x).result().explained_variance == 1
    worse = measured(x, mean.float() + 50).result()
    assert worse.explained_variance < 0
    x_hat = x + rand(*x.shape, seed=1)
    result = measured(x, x_hat).result()
    assert result.fvu == pytest.approx(pooled(x, x_hat), rel=1e-12)
    assert result.mse == pytest.approx(float((x.double() - x_hat.double()).square().mean()), rel=1e-12)
    assert result.normalized_mse == result.fvu
    assert measured(x, x_hat).result(variance=2.0).normalized_mse == pytest.approx(result.mse / 2, rel=1e-12)
    assert result.tokens == 60


def test_no_split_changes_the_result_and_a_merge_is_the_whole() -> None:
    x = sample(97)
    x_hat = x + rand(*x.shape, seed=1)
    whole = measured(x, x_hat)
    for size in (1, 7, 50):
        split = Reconstruction.start(HIDDEN)
        for part, hat in zip(x.split(size), x_hat.split(size), strict=True):  # type: ignore[no-untyped-call]
            split = split.update(part, hat)
        for name in ("fvu", "mse", "gamma"):
            assert getattr(split.result(), name) == pytest.approx(getattr(whole.result(), name), rel=1e-12)
    left, right = measured(x[:13], x_hat[:13]), measured(x[13:], x_hat[13:])
    empty = Reconstruction.start(HIDDEN)
    for merged in (left.merge(right), right.merge(left), empty.merge(left).merge(empty).merge(right)):
        assert merged.result().tokens == 97
        assert merged.result().fvu == pytest.approx(whole.result().fvu, rel=1e-12)
    assert left.all_reduce().result() == left.result()
    assert left.result().fvu != pytest.approx(right.result().fvu, rel=1e-2)


def test_the_mean_is_that_of_the_stream_and_not_of_a_batch() -> None:
    near, far = sample(30), sample(30, seed=1) + 1000
    found = measured(near, near + 1).update(far, far + 1).result()
    assert found.fvu == pytest.approx(1 / float(torch.cat([near, far]).double().var(0, correction=0).mean()), rel=1e-4)
    assert found.fvu < measured(near, near + 1).result().fvu / 100


def test_a_mean_far_above_the_deviation_costs_no_digits() -> None:
    x = rand(500, HIDDEN).double() + 1e7
    x_hat = x + 0.1 * rand(500, HIDDEN, seed=1)
    found = Reconstruction.start(HIDDEN)
    for part, hat in zip(x.split(9), x_hat.split(9), strict=True):  # type: ignore[no-untyped-call]
        found = found.update(part, hat)
    exact = (
        0.01
        * float(rand(500, HIDDEN, seed=1).double().square().mean())
        / float(rand(500, HIDDEN).double().var(0, correction=0).mean())
    )
    assert found.result().fvu == pytest.approx(exact, rel=1e-7)
    by_squares = float((x.square().mean(0) - x.mean(0).square()).mean())
    assert abs(by_squares / found.inputs.variance() - 1) > 1e-4  # what the formulation avoids, in float64 already


def test_masked_rows_count_for_nothing_whatever_they_hold() -> None:
    x = sample()
    x_hat = x + rand(*x.shape, seed=1)
    mask = torch.arange(60) % 3 != 0
    dirty, dirty_hat = x.clone(), x_hat.clone()
    dirty[~mask], dirty_hat[~mask] = math.nan, math.inf
    found = Reconstruction.start(HIDDEN).update(dirty, dirty_hat, mask=mask)
    assert found.result() == measured(x[mask], x_hat[mask]).result()
    nothing = found.update(dirty, dirty_hat, mask=torch.zeros(60, dtype=torch.bool))
    assert nothing.result() == found.result()


def test_mse_is_in_the_units_before_scaling() -> None:
    x = sample()
    x_hat = x + rand(*x.shape, seed=1)
    plain, scaled = measured(x, x_hat).result(), measured(0.01 * x, 0.01 * x_hat, scale=0.01).result()
    assert scaled.mse == pytest.approx(plain.mse, rel=1e-4)
    assert scaled.fvu == pytest.approx(plain.fvu, rel=1e-4)
    assert measured(0.01 * x, 0.01 * x_hat).result().mse == pytest.approx(plain.mse * 1e-4, rel=1e-4)


def test_gamma_is_zero_for_centered_data_and_the_ratio_of_norms_otherwise() -> None:
    x = sample().double()
    assert Moments.start(HIDDEN).update(x - x.mean(0)).gamma() == pytest.approx(0, abs=1e-12)
    ratio = float(x.mean(0).norm() / x.std(0, correction=0).norm())
    assert Moments.start(HIDDEN).update(x).gamma() == pytest.approx(ratio, rel=1e-12)
    assert Moments.start(HIDDEN).update(torch.ones(4, HIDDEN)).gamma() == math.inf
    assert Moments.start(HIDDEN).update(x).variance() == pytest.approx(float(x.var(0, correction=0).mean()), rel=1e-12)


def test_a_reconstruction_that_cannot_be_measured_is_refused() -> None:
    x, start = sample(), Reconstruction.start(HIDDEN)
    bad = x.clone()
    bad[3, 1] = math.nan
    with pytest.raises(UserError, match="1 of 60 rows of the activations"):
        start.update(bad, x)
    with pytest.raises(UserError, match="1 of 60 rows of the reconstructions"):
        start.update(x, bad)
    with pytest.raises(UserError, match="no token"):
        start.result()
    with pytest.raises(UserError, match="no token"):
        Moments.start(HIDDEN).gamma()
    with pytest.raises(UserError, match="do not differ"):
        start.update(torch.ones(4, HIDDEN), torch.ones(4, HIDDEN)).result()
    with pytest.raises(UserError, match="equal shapes"):
        start.update(x, x[:3])
    with pytest.raises(UserError, match="one boolean"):
        start.update(x, x, mask=torch.ones(60))
    with pytest.raises(UserError, match="flattened"):
        start.update(x.view(6, 10, HIDDEN), x.view(6, 10, HIDDEN))
    with pytest.raises(UserError, match="scales"):
        measured(x, x).merge(measured(x, x, scale=2.0))


# --- usage ---


def test_l0_is_what_each_allocation_promises() -> None:
    affinity = rand(40, 24).abs() + 0.1
    for code in (token_choice(affinity, 6), mutual_choice(affinity, 6 * 40), feature_choice(affinity, 10)):
        usage = Usage.start(24).update(code)
        assert usage.result().l0 == 6
        assert float(usage.density().sum()) == pytest.approx(6, rel=1e-12)
        assert torch.equal(usage.counts, (code.to_dense() != 0).sum(0))
    assert Usage.start(24).update(feature_choice(affinity, 10)).counts.tolist() == [10] * 24
    few = torch.where(torch.arange(24) < 4, affinity, -1.0)
    assert Usage.start(24).update(token_choice(few, 6)).result().l0 == 4


def test_l0_by_exported_thresholds_is_told_beside_that_of_training() -> None:
    model = SparseAutoencoder(SparseAutoencoderConfig(hidden=HIDDEN, features=24, k=4, choice="mutual"))
    x, held_out = rand(400, HIDDEN), rand(80, HIDDEN, seed=3)
    model.set_threshold(calibrate_mutual(model.affinity(x).detach(), k=4))
    training, exported = model.train().encode(held_out), model.eval().encode(held_out)
    result = Usage.start(24).update(training, exported=exported).result()
    assert (result.l0, result.l0_exported) == (4, exported.matches / 80)
    assert result.l0_gap == pytest.approx(exported.matches / 80 - 4)
    assert Usage.start(24).update(training).result().l0_gap is None


def test_usage_is_the_same_for_any_split_merge_and_mask() -> None:
    dense = rand(50, 12).relu() * (rand(50, 12, seed=1) > 0.5)
    mask = torch.arange(50) % 4 != 1
    whole = Usage.start(12).update(SparseCode.from_dense(dense[mask]), exported=SparseCode.from_dense(dense[mask] * 0))
    parts = [
        Usage.start(12).update(
            SparseCode.from_dense(dense[rows]), exported=SparseCode.from_dense(dense[rows] * 0), mask=mask[rows]
        )
        for rows in (slice(0, 9), slice(9, 10), slice(10, 50))
    ]
    merged = parts[0].merge(parts[2]).merge(parts[1])
    assert torch.equal(merged.counts, whole.counts)
    assert torch.equal(merged.firings, whole.firings)
    assert merged.result() == whole.result() == merged.all_reduce().result()
    assert merged.result().l0_exported == 0


def test_dead_are_those_below_the_firing_bound_and_tau_zero_gives_them() -> None:
    dense = torch.zeros(100, 5)
    dense[:, 0], dense[:10, 1], dense[5, 2], dense[7, 3] = 1.0, 2.0, 1e-3, 1.1e-3
    usage = Usage.start(5).update(SparseCode.from_dense(dense))
    assert usage.result().dead_share == pytest.approx(2 / 5)
    assert Usage.start(5, least=0).update(SparseCode.from_dense(dense)).result().dead_share == pytest.approx(1 / 5)
    law = torch.tensor([0.9, 0.2, 0.1, 0.05, 0.02], dtype=torch.float64)
    shares = [usage.result(expected=law, tau=tau).under_used_share for tau in (0.0, 0.15, 0.6, 1.0)]
    assert shares == pytest.approx([1 / 5, 2 / 5, 4 / 5, 4 / 5])
    with pytest.raises(UserError, match="count more"):
        usage.result(least_tokens=101)


def test_a_zipf_law_is_found_again_and_stands_beside_the_histogram() -> None:
    law = ZipfLaw(features=3000, k=20, alpha=1.1, beta=12.0)
    tokens = 1_000_000
    counts = (law.densities() * tokens).round().long()[torch.randperm(3000, generator=torch.Generator().manual_seed(0))]
    usage = Usage(tokens, counts, counts)
    fit = usage.zipf()
    assert (fit.alpha, fit.beta) == (pytest.approx(1.1, abs=0.01), pytest.approx(12, rel=0.05))
    torch.testing.assert_close(fitted_densities(fit), law.densities(), rtol=0.02, atol=0)
    assert usage.result(expected=fitted_densities(fit), tau=0.5).under_used_share == 0
    histogram = density_histogram(usage, bins=20)
    assert int(histogram.measured.sum()) + histogram.silent == int(histogram.expected.sum()) + histogram.below == 3000
    assert int((histogram.measured - histogram.expected).abs().sum()) < 60
    assert (len(histogram.edges), float(histogram.edges[-1])) == (21, 0)
    starved = counts.clone()
    starved[counts < 1000] = 0
    found = density_histogram(Usage(tokens, starved, starved), bins=20)
    assert found.silent == int((counts < 1000).sum())
    assert int(found.measured.sum()) == 3000 - found.silent


def test_codes_that_cannot_be_counted_are_refused() -> None:
    code = SparseCode.from_dense(torch.ones(3, 4))
    with pytest.raises(UserError, match="NaN"):
        Usage.start(4).update(code.with_values(code.values * math.nan))
    with pytest.raises(UserError, match="start the counts anew"):
        Usage.start(5).update(code)
    with pytest.raises(UserError, match="same tokens"):
        Usage.start(4).update(code, exported=SparseCode.from_dense(torch.ones(2, 4)))
    for first, then in ((code, None), (None, code)):
        with pytest.raises(UserError, match="all or none"):
            Usage.start(4).update(code, exported=first).update(code, exported=then)
    with pytest.raises(UserError, match="one boolean"):
        Usage.start(4).update(code, mask=torch.ones(2, dtype=torch.bool))
    for read in (Usage.start(4).result, Usage.start(4).density, Usage.start(4).zipf):
        with pytest.raises(UserError, match="no token"):
            read()
    with pytest.raises(UserError, match="merged"):
        Usage.start(4).merge(Usage.start(4, least=0))


# --- several processes ---

TWO = """
import sys, torch
from sae import SparseCode
from sae.metrics import Moments, Reconstruction, Recovered, Usage
rank, file = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
g = torch.Generator().manual_seed(0)
x = torch.randn(41, 5, generator=g) * 3 + 1000
x_hat, dense = x + torch.randn(41, 5, generator=g), torch.randn(41, 7, generator=g).relu()
logits = [torch.randn(41, 6, generator=g) for _ in range(3)]
targets = torch.arange(41) % 6
def all_of(rows):
    code = SparseCode.from_dense(dense[rows])
    return (
        Reconstruction.start(5).update(x[rows], x_hat[rows]),
        Usage.start(7).update(code, exported=code),
        Recovered().update(*(part[rows] for part in logits), targets[rows]),
    )
for rows in (slice(rank, None, 2), slice(0, 41 * (1 - rank))):  # interleaved; then one process has nothing
    for whole, mine in zip(all_of(slice(None)), all_of(rows)):
        want, got = vars(whole.result()), vars(mine.all_reduce().result())
        for name, value in want.items():
            assert value is got[name] or abs(got[name] - value) <= 1e-12 * abs(value), (name, value, got[name])
torch.distributed.destroy_process_group()
print("equal")
"""


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[3]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", TWO, str(rank), str(tmp_path / "meet")],
            cwd=root,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in started:
        out, error = process.communicate(timeout=120)
        assert out.strip() == "equal", error
