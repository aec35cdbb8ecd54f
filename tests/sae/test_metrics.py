"""Every measure against what it must be: the mean, the perfect, the zero, the whole, the dense, the synthetic law."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lm import EMBEDDING, LanguageModel, Site, UserError, load
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
    Recovered,
    Usage,
    decoder_cosines,
    density_histogram,
    fitted_densities,
    recovered_on,
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
    assert result.normalised_mse == result.fvu
    assert measured(x, x_hat).result(variance=2.0).normalised_mse == pytest.approx(result.mse / 2, rel=1e-12)
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


def test_gamma_is_zero_for_centred_data_and_the_ratio_of_norms_otherwise() -> None:
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
    with pytest.raises(UserError, match="one boolean"):
        Usage.start(4).update(code, mask=torch.ones(2, dtype=torch.bool))
    for read in (Usage.start(4).result, Usage.start(4).density, Usage.start(4).zipf):
        with pytest.raises(UserError, match="no token"):
            read()
    with pytest.raises(UserError, match="merged"):
        Usage.start(4).merge(Usage.start(4, least=0))


# --- the language model ---


@pytest.fixture(scope="module")
def model(tiny: Path) -> LanguageModel:
    return load(str(tiny / "model"))


def batch(model: LanguageModel) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.anatomy.vocabulary, (3, 9), generator=generator)
    real = torch.ones_like(ids)
    real[1, 6:] = 0
    return ids, real


@pytest.mark.parametrize("site", [Site("resid", 1), Site("mlp", 2), EMBEDDING])
def test_the_perfect_recovers_all_and_zero_nothing(model: LanguageModel, site: Site) -> None:
    ids, real = batch(model)
    perfect = recovered_on(model, site, lambda x: x, ids, attention_mask=real).result()
    assert (perfect.ce_recovered, perfect.kl, perfect.kl_recovered) == (1, 0, 1)
    assert perfect.kl_zero > 0
    nothing = recovered_on(model, site, torch.zeros_like, ids, attention_mask=real).result()
    assert (nothing.ce_recovered, nothing.kl_recovered) == (0, 0)
    assert perfect.tokens == nothing.tokens == 8 + 5 + 8
    half = recovered_on(model, site, lambda x: x + 0.1 * x.norm(dim=1, keepdim=True) * rand(1, x.shape[1]), ids)
    assert 0 < half.result().kl < half.result().kl_zero


def test_cross_entropy_is_the_models_own_loss_and_only_what_training_saw_is_replaced(model: LanguageModel) -> None:
    ids, real = batch(model)
    labels = ids.masked_fill(real == 0, -100)
    with torch.no_grad():
        loss = float(model.model(input_ids=ids, attention_mask=real, labels=labels).loss)
    seen: list[Tensor] = []

    def reconstruct(x: Tensor) -> Tensor:
        seen.append(x)
        return x

    found = recovered_on(model, Site("resid", 0), reconstruct, ids, attention_mask=real)
    assert found.result().ce_clean == pytest.approx(loss, rel=1e-5)
    assert seen[0].shape == (int(real.sum()), model.anatomy.hidden)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 0] = False
    masked = recovered_on(model, Site("resid", 0), reconstruct, ids, attention_mask=real, mask=mask)
    assert seen[1].shape[0] == int(real.sum()) - 3
    assert masked.tokens == found.tokens - 3
    with pytest.raises(UserError, match="nothing to replace"):
        recovered_on(model, Site("resid", 0), reconstruct, ids, mask=torch.zeros_like(mask))
    with pytest.raises(UserError, match="not finite"):
        recovered_on(model, Site("resid", 0), lambda x: x * math.nan, ids)


def test_recovered_sums_are_the_same_for_any_split_and_equal_torch() -> None:
    clean, patched, zero = (rand(30, 11, seed=seed) * 3 for seed in range(3))
    targets, mask = torch.arange(30) % 11, torch.arange(30) % 5 != 0
    whole = Recovered().update(clean, patched, zero, targets, mask=mask)
    split = Recovered()
    for rows in (slice(0, 4), slice(4, 5), slice(5, 30)):
        split = split.merge(Recovered().update(clean[rows], patched[rows], zero[rows], targets[rows], mask=mask[rows]))
    result = whole.result()
    for name in ("ce_clean", "ce_patched", "ce_zero", "kl", "kl_zero"):
        assert getattr(split.result(), name) == pytest.approx(getattr(result, name), rel=1e-12)
    logs = [logits[mask].double().log_softmax(-1) for logits in (clean, patched, zero)]
    kl = torch.nn.functional.kl_div(logs[1], logs[0], reduction="batchmean", log_target=True)
    assert result.kl == pytest.approx(float(kl), rel=1e-5)
    assert result.ce_zero == pytest.approx(float(torch.nn.functional.nll_loss(logs[2], targets[mask])), rel=1e-5)
    assert result.ce_recovered == pytest.approx(
        (result.ce_zero - result.ce_patched) / (result.ce_zero - result.ce_clean)
    )
    with pytest.raises(UserError, match="no token"):
        Recovered().result()
    with pytest.raises(UserError, match="not finite"):
        Recovered().update(clean, patched * math.nan, zero, targets)
    with pytest.raises(UserError, match="equal shapes"):
        Recovered().update(clean, patched[:4], zero, targets)
    assert math.isnan(Recovered().update(clean, patched, clean, targets).result().ce_recovered)


# --- the decoder ---


def test_decoder_cosines_are_those_of_the_whole_table_in_any_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from sae.metrics import decoder

    w_dec = rand(50, 8) * torch.linspace(0.1, 9, 50).unsqueeze(1)
    rows = w_dec.double() / w_dec.double().norm(dim=1, keepdim=True)
    table = rows @ rows.T
    pairs = table[torch.triu(torch.ones(50, 50, dtype=torch.bool), 1)]
    table.fill_diagonal_(0)
    nearest = table.abs().amax(1)
    for chunk in (1 << 24, 50 * 7, 1):
        monkeypatch.setattr(decoder, "_CHUNK", chunk)
        found = decoder_cosines(w_dec, twin=0.8)
        assert found.c_dec == pytest.approx(float(pairs.abs().mean()), rel=1e-6)
        assert found.mean == pytest.approx(float(pairs.mean()), rel=1e-5)
        assert found.largest == pytest.approx(float(nearest.max()), rel=1e-6)
        assert found.mean_nearest == pytest.approx(float(nearest.mean()), rel=1e-6)
        assert found.twins == pytest.approx(float((nearest > 0.8).double().mean()))


def test_an_orthonormal_decoder_has_none_and_twins_are_seen() -> None:
    found = decoder_cosines(torch.eye(6, 9) * 3)
    assert (found.c_dec, found.mean, found.largest, found.mean_nearest, found.twins) == (0, 0, 0, 0, 0)
    twice = decoder_cosines(torch.cat([torch.eye(4, 9), -2 * torch.eye(1, 9)]))
    assert (twice.c_dec, twice.mean, twice.largest, twice.twins) == (pytest.approx(0.1), pytest.approx(-0.1), 1, 0.4)
    assert decoder_cosines(torch.cat([torch.eye(4, 9), torch.zeros(1, 9)])).c_dec == 0
    for bad in (torch.full((3, 2), math.nan), torch.ones(1, 2), torch.ones(4)):
        with pytest.raises(UserError, match="decoder"):
            decoder_cosines(bad)


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
    root = Path(__file__).resolve().parents[2]
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
