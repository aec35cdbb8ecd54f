"""What a reconstruction does to the language model, and what a decoder's rows are to each other."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lm import EMBEDDING, LanguageModel, Site, UserError, load
from sae.metrics import (
    Recovered,
    decoder_cosines,
    recovered_on,
)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


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


def test_masks_are_booleans_and_outliers_stay_as_they_are(model: LanguageModel) -> None:
    ids, real = batch(model)
    site = Site("resid", 1)
    with pytest.raises(UserError, match="give booleans"):
        recovered_on(model, site, torch.zeros_like, ids, mask=real)
    with pytest.raises(UserError, match="give booleans"):
        Recovered().update(*[torch.zeros(2, 3)] * 3, torch.zeros(2, dtype=torch.int64), mask=torch.ones(2))
    kept = recovered_on(model, site, torch.zeros_like, ids, largest_norm=0.0).result()
    assert (kept.kl, kept.ce_patched) == (0, kept.ce_clean)
    gone = recovered_on(model, site, torch.zeros_like, ids, largest_norm=1e9).result()
    assert gone == recovered_on(model, site, torch.zeros_like, ids).result()
    assert gone.kl > 0


def test_targets_that_are_left_out_as_usual_are_not_counted() -> None:
    logits = [rand(4, 6, seed=seed) for seed in range(3)]
    targets = torch.tensor([1, -100, 3, -100])
    kept = Recovered().update(*(each[[0, 2]] for each in logits), targets[[0, 2]])
    assert Recovered().update(*logits, targets) == kept
    assert Recovered().update(*logits, targets, mask=torch.tensor([True, True, True, False])) == kept


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
        found = decoder_cosines(w_dec, near=0.8)
        assert found.c_dec == pytest.approx(float(pairs.abs().mean()), rel=1e-6)
        assert found.mean == pytest.approx(float(pairs.mean()), rel=1e-5)
        assert found.largest == pytest.approx(float(nearest.max()), rel=1e-6)
        assert found.mean_nearest == pytest.approx(float(nearest.mean()), rel=1e-6)
        assert found.near_duplicates == pytest.approx(float((nearest > 0.8).double().mean()))


def test_an_orthonormal_decoder_has_no_near_duplicates_and_they_are_seen() -> None:
    found = decoder_cosines(torch.eye(6, 9) * 3)
    assert (found.c_dec, found.mean, found.largest, found.mean_nearest, found.near_duplicates) == (0, 0, 0, 0, 0)
    twice = decoder_cosines(torch.cat([torch.eye(4, 9), -2 * torch.eye(1, 9)]))
    assert (twice.c_dec, twice.mean, twice.largest, twice.near_duplicates) == (
        pytest.approx(0.1),
        pytest.approx(-0.1),
        1,
        0.4,
    )
    assert decoder_cosines(torch.cat([torch.eye(4, 9), torch.zeros(1, 9)])).c_dec == 0
    for bad in (torch.full((3, 2), math.nan), torch.ones(1, 2), torch.ones(4)):
        with pytest.raises(UserError, match="decoder"):
            decoder_cosines(bad)
