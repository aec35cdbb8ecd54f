"""Synthetic activations: what is drawn follows the law that was asked for, and a matching finds what is there."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lm import Site, UserError
from lm.config import as_dict, parse_config
from sae import SparseAutoencoder, SparseCode, unit_rows
from sae.activations import open_activations
from sae.synthetic import (
    Detection,
    Synthetic,
    SyntheticActivations,
    Truth,
    chance_cosine,
    firing_law,
    match_features,
    truth_of,
)
from sae.trainer import AutoencoderSpec, AuxiliarySpec, TrainerConfig, TrainSaeConfig, ZipfSpec, run_train_sae

PLAIN = Synthetic(features=64, hidden=16, roots=0, rank=0, most=0.4, least=0.02, spread=0.0, bias=0.0)
TREE = Synthetic(features=64, hidden=16, roots=4, branching=2, depth=2, rank=4, most=0.5, least=0.05)


def counted(spec: Synthetic, tokens: int = 20_000) -> tuple[Truth, SparseCode]:
    truth = truth_of(spec)
    return truth, truth.codes(tokens, "test")


# ------------------------------------------------------------------------------------------------------------ world


def test_the_law_meets_both_ends_and_is_a_stretched_power() -> None:
    law = firing_law(1000, exponent=0.5, most=0.4, least=5e-4)
    assert float(law[0]) == pytest.approx(0.4, abs=1e-12)
    assert float(law[-1]) == pytest.approx(5e-4, abs=1e-12)
    powers = torch.arange(1, 1001, dtype=torch.float64) ** -0.5
    assert torch.allclose((law[3] - law[8]) / (law[0] - law[-1]), (powers[3] - powers[8]) / (powers[0] - powers[-1]))
    assert torch.equal(firing_law(3, exponent=0.0, most=0.3, least=0.1), torch.full((3,), 0.3, dtype=torch.float64))


def test_independent_features_fire_as_often_as_the_law_says() -> None:
    truth, code = counted(PLAIN)
    density = code.feature_counts().double() / code.tokens
    deviation = (truth.law * (1 - truth.law) / code.tokens).sqrt()
    assert float(((density - truth.law) / deviation).abs().max()) < 4.5
    pairs = code.to_dense()[:, :8].gt(0).double().T.corrcoef() - torch.eye(8)
    assert float(pairs.abs().max()) < 5 / math.sqrt(code.tokens)


def test_a_copula_keeps_densities_and_makes_features_fire_together() -> None:
    spec = replace(PLAIN, features=40, rank=2, correlation=0.5, least=0.2)
    truth, code = counted(spec)
    density = code.feature_counts().double() / code.tokens
    assert torch.allclose(density, truth.law, atol=0.02)
    fires = code.to_dense().gt(0).double().T.corrcoef()
    due = truth.factors @ truth.factors.T
    off = ~torch.eye(40, dtype=torch.bool)
    together = torch.stack([fires[off], due[off].double()]).corrcoef()[0, 1]
    assert float(together) > 0.95
    assert bool((fires[off].sign() == due[off].sign())[due[off].abs() > 0.2].all())


def test_children_fire_only_with_their_parent_and_exclude_each_other() -> None:
    truth, code = counted(TREE)
    fires = code.to_dense() > 0
    held = sum(TREE.levels)
    assert TREE.levels == (4, 8, 16)
    assert truth.parents[:4].tolist() == [-1] * 4
    assert truth.parents[4:8].tolist() == [0, 0, 1, 1]
    assert truth.parents[12:16].tolist() == [4, 4, 5, 5]
    assert bool((truth.parents[held:] == -1).all())
    children = torch.nonzero(truth.parents >= 0).squeeze(1)
    assert not bool((fires[:, children] & ~fires[:, truth.parents[children]]).any())
    siblings = fires[:, children].unflatten(1, (-1, TREE.branching)).sum(2)
    assert int(siblings.max()) == 1
    assert int(siblings.sum()) > 1000


def test_without_exclusion_children_keep_the_density_of_the_law() -> None:
    truth, code = counted(replace(TREE, exclusive=False, rank=0))
    density = code.feature_counts().double() / code.tokens
    assert torch.allclose(density, truth.law, atol=0.02)


def test_magnitudes_have_the_means_asked_for_and_follow_the_parent() -> None:
    truth, code = counted(replace(PLAIN, spread=0.5))
    dense = code.to_dense()
    mean = dense.sum(0) / (dense > 0).sum(0)
    assert float(truth.means[0]) == 5
    assert float(truth.means[-1]) == 4
    assert torch.allclose(mean, truth.means, atol=0.15)
    truth, code = counted(replace(TREE, spread=0.0))
    assert torch.allclose(code.values, truth.means[code.indices])  # no deviation: parents are at their mean
    truth, code = counted(TREE)
    dense = code.to_dense()
    both = dense[:, 4] > 0
    assert float(torch.stack([dense[both, 0], dense[both, 4]]).corrcoef()[0, 1]) > 0.2
    alone = counted(replace(TREE, follow=False))[1].to_dense()
    both = alone[:, 4] > 0
    assert abs(float(torch.stack([alone[both, 0], alone[both, 4]]).corrcoef()[0, 1])) < 0.15


def test_activations_are_the_sum_of_directions_and_bias() -> None:
    spec = replace(TREE, bias=2.0)
    truth, code = counted(spec, 50)
    assert torch.allclose(truth.directions.norm(dim=1), torch.ones(64))
    assert float(truth.bias.norm()) == pytest.approx(2.0, rel=1e-5)
    assert torch.allclose(truth.activations(code), code.to_dense() @ truth.directions + truth.bias, atol=1e-5)


def test_another_world_needs_another_seed_and_another_draw_does_not() -> None:
    assert truth_of(TREE) is truth_of(replace(TREE, draw=3, site="mlp.2"))
    assert not torch.equal(truth_of(TREE).directions, truth_of(replace(TREE, seed=1)).directions)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"features": 10}, "hierarchy holds"),
        ({"most": 0.01}, "least <= most"),
        ({"weakest": 0.0}, "magnitudes"),
        ({"hidden": 0}, "cannot be"),
    ],
)
def test_impossible_worlds_are_refused(change: dict[str, float], words: str) -> None:
    with pytest.raises(UserError, match=words):
        replace(TREE, **change)  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------------------- stream


def test_the_stream_resumes_exactly_and_deals_out_one_batch() -> None:
    spec = replace(TREE, noise=0.3)
    one = SyntheticActivations(spec, batch_tokens=30)
    batches = [next(one).values for _ in range(4)]
    again = SyntheticActivations(spec, batch_tokens=30)
    next(again)
    state = json.loads(json.dumps(again.state_dict()["facts"]))
    resumed = SyntheticActivations(spec, batch_tokens=30)
    resumed.load_state_dict({"facts": state, "tensors": {}})
    assert torch.equal(next(resumed).values, batches[1])
    assert not torch.equal(batches[0], batches[1])
    parts = [SyntheticActivations(spec, batch_tokens=30, rank=rank, world=4) for rank in range(4)]
    for whole in batches:
        for rank, part in enumerate(parts):
            values, code = part.with_truth()
            assert torch.equal(values.values, whole[rank::4])
            assert code.tokens == len(values) == len(whole[rank::4])
    other = SyntheticActivations(replace(spec, draw=1), batch_tokens=30)
    assert not torch.equal(next(other).values, batches[0])
    with pytest.raises(UserError, match="draw"):
        other.load_state_dict({"facts": state, "tensors": {}})


def test_noise_has_the_deviation_asked_for() -> None:
    loud, quiet = (SyntheticActivations(replace(TREE, noise=noise), batch_tokens=2000) for noise in (0.5, 0.0))
    difference = next(loud).values - next(quiet).values
    assert float(difference.std()) == pytest.approx(0.5, rel=0.02)
    assert abs(float(difference.mean())) < 0.02


def test_it_is_a_source_like_any_other() -> None:
    stream = open_activations(replace(TREE, site="mlp.3"), [Site("mlp", 3)], batch_tokens=8)
    assert (stream.sites, stream.hidden, stream.batch_tokens) == ((Site("mlp", 3),), 16, 8)
    assert next(iter(stream))[Site("mlp", 3)].shape == (8, 16)
    assert stream.facts()["kind"] == "Synthetic"
    with pytest.raises(UserError, match="set its site"):
        open_activations(TREE, [Site("mlp", 3)], batch_tokens=8)
    words = ["--source", "sae.synthetic.Synthetic", "--source.hidden", "99", "--held_out", "NoSource"]
    config = parse_config(TrainSaeConfig, words)
    assert config.source == Synthetic(hidden=99)
    assert as_dict(config.source)["init_args"]["hidden"] == 99
    with pytest.raises(UserError, match="int"):  # a field that Synthetic has from World is typed too
        parse_config(TrainSaeConfig, ["--source", "Synthetic", "--source.features", "many"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The project's own trainer on a small world with half as many features again as dimensions."""
    return run_train_sae(training(tmp_path_factory.mktemp("synthetic") / "run", steps=300))


WORLD = Synthetic(features=48, hidden=32, roots=0, rank=0, most=0.2, least=0.02, spread=0.2)


def training(out: Path, steps: int) -> TrainSaeConfig:
    return TrainSaeConfig(
        source=WORLD,
        held_out=replace(WORLD, draw=1),
        sites=("resid.0",),
        autoencoders=(
            AutoencoderSpec(choice="token", features=48, k=3, learning_rate=3e-3),
            AutoencoderSpec(choice="mutual", features=48, k=3, learning_rate=3e-3),
        ),
        auxiliary=AuxiliarySpec(k_aux=8, window=20_000),
        zipf=ZipfSpec(window=50_000, fit_every=100),
        trainer=TrainerConfig(
            steps=steps,
            batch_tokens=512,
            warmup=10,
            start_tokens=1024,
            calibrate_tokens=4096,
            held_out_tokens=4096,
            save_every=10_000,
        ),
        out=str(out),
    )


def test_the_trainer_finds_the_features_of_a_world(trained: dict[str, Path]) -> None:
    truth = truth_of(WORLD)
    assert len(trained) == 2
    for folder in trained.values():
        model = SparseAutoencoder.from_pretrained(folder)
        matching = match_features(model.w_dec, truth.directions)
        start = match_features(SparseAutoencoder(model.config).w_dec, truth.directions)
        assert matching.mcc > 0.75
        assert start.mcc < 0.5
        assert matching.found() > 0.5
        batch, code = SyntheticActivations(replace(WORLD, draw=2), batch_tokens=2000).with_truth()
        with torch.no_grad():
            found = Detection.start(matching).update(model.encode(batch.values), code).result()
        assert found.f1 > 0.5


# --------------------------------------------------------------------------------------------------------- matching


def directions(count: int, hidden: int, seed: int = 0) -> Tensor:
    return unit_rows(torch.randn(count, hidden, generator=torch.Generator().manual_seed(seed)))


def test_a_perfect_dictionary_matches_perfectly_permuted_negated_and_scaled() -> None:
    truth = directions(30, 20)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    signs = torch.where(torch.arange(30) % 2 == 0, 3.0, -0.5)
    matching = match_features(truth[order] * signs.unsqueeze(1), truth)
    assert matching.mcc == pytest.approx(1, abs=1e-6)
    assert matching.found(0.999) == 1
    assert torch.equal(matching.true, order)
    assert torch.equal(matching.cosines.sign(), signs.double().sign())
    assert matching.of_common(10) == pytest.approx(1, abs=1e-6)


def test_fewer_or_more_features_than_truths_match_as_many_as_there_can_be() -> None:
    truth = directions(30, 20)
    narrow = match_features(truth[:12], truth)
    assert len(narrow.true) == 12
    assert narrow.mcc == pytest.approx(1, abs=1e-6)
    assert narrow.found() == pytest.approx(12 / 30)
    assert narrow.of_common(24) == pytest.approx(0.5, abs=1e-6)
    wide = match_features(torch.cat([directions(40, 20, seed=5), truth]), truth)
    assert wide.learned.tolist() == list(range(40, 70))
    assert wide.mcc == pytest.approx(1, abs=1e-6)


def test_the_matching_is_the_best_and_not_the_greedy_one() -> None:
    near = math.sqrt(1 - 0.9**2)
    truth = torch.eye(3)[:2]
    # The first takes 0.9 of truth 0 greedily; then the second, with nothing of truth 1, would get 0.
    w_dec = torch.tensor([[0.9, near, 0.0], [0.8, 0.0, 0.6]])
    matching = match_features(w_dec, truth)
    assert matching.true.tolist() == [1, 0]
    assert matching.mcc == pytest.approx((near + 0.8) / 2, abs=1e-6)


def test_random_directions_match_as_chance_says() -> None:
    assert chance_cosine(2) == pytest.approx(2 / math.pi)
    assert chance_cosine(256) == pytest.approx(math.sqrt(2 / (math.pi * 256)), rel=5e-3)
    one, other = directions(4000, 24), directions(4000, 24, seed=1)
    alone = [match_features(one[i : i + 1], other[i : i + 1]).mcc for i in range(4000)]
    assert sum(alone) / 4000 == pytest.approx(chance_cosine(24), rel=0.05)
    # With a choice among 100, each reaches more; never more than the largest cosine it has.
    many = match_features(one[:100], other[:100])
    best = (one[:100] @ other[:100].T).abs().amax(1)
    assert chance_cosine(24) < many.mcc <= float(best.mean())


def test_dead_rows_match_nothing_and_bad_ones_are_refused() -> None:
    truth = directions(4, 8)
    matching = match_features(torch.cat([truth[:2], torch.zeros(2, 8)]), truth)
    assert matching.mcc == pytest.approx(0.5, abs=1e-6)
    with pytest.raises(UserError, match="finite"):
        match_features(truth * math.nan, truth)
    with pytest.raises(UserError, match="one width"):
        match_features(directions(4, 7), truth)


def test_detection_counts_what_a_dense_comparison_counts() -> None:
    make = torch.Generator().manual_seed(0)
    truth = torch.rand(500, 6, generator=make) * (torch.rand(500, 6, generator=make) < 0.3)
    learned = torch.rand(500, 9, generator=make) * (torch.rand(500, 9, generator=make) < 0.3)
    learned[:, 4] = truth[:, 1]  # a perfect one
    learned[:, 7] = 0  # one that never fires
    rows = torch.eye(9)
    matching = match_features(rows, rows[[8, 4, 7, 0, 1, 2]])
    assert matching.learned.tolist() == [0, 1, 2, 4, 7, 8]
    found = Detection.start(matching)
    for part in range(0, 500, 125):
        both = (SparseCode.from_dense(side[part : part + 125]) for side in (learned, truth))
        found = found.update(*both)
    fires, there = learned[:, matching.learned] > 0, truth[:, matching.true] > 0
    assert torch.equal(found.both, (fires & there).sum(0))
    assert torch.equal(found.fired, fires.sum(0))
    assert torch.equal(found.present, there.sum(0))
    result = found.result()
    f1 = 2 * found.both / (found.fired + found.present)
    assert float(f1[3]) == 1
    assert result.f1 == pytest.approx(float(f1.double().mean()))
    assert result.recall == pytest.approx(float((found.both / found.present).double().mean()))
    assert result.pairs == 6
    with pytest.raises(UserError, match="count more"):
        Detection.start(matching).result()
