"""The trainer: the published recipe step by step, exact resume, independence of autoencoders, and the model it exports."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made import OTHER, SITE, Made
from small_training import ALL, BATCH, FEATURES, K, equal, recipe, spec

from lm import UserError
from lm.run_folder import RunFolder
from sae import SparseAutoencoder, SparseAutoencoderConfig, aux_k_loss, decode, geometric_median, token_choice
from sae.activations import ActivationBatch
from sae.sharding import Mesh
from sae.trainer import (
    ZipfSpec,
    crossed,
    named,
    train_on_stream,
)
from sae.trainer.loop import Loop
from sae.trainer.step import learning_rate
from sae.trainer.zipf_fit import Law


def lines(folder: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in entry.items() if not key.startswith("ms/") and key != "tokens_per_second"}
        for entry in RunFolder(folder).metrics()
    ]


def test_a_few_steps_equal_the_recipe_written_out() -> None:
    """Dense autograd, `aux_k_loss`, Multi-TopK, projection, Adam, unit norm and a moving average, by hand."""
    steps, k_aux, window = 12, 4, 40
    settings = recipe(
        auxiliary={"k_aux": k_aux, "window": window},
        steps=steps,
        warmup=4,
        decay=0.5,
        ema=0.9,
        clip=0.5,
        start_tokens=60,
    )
    (found,) = (
        train_on_stream(Made(batch=BATCH), named([spec("token", multi_topk=True)], [SITE]), settings, show=False) or []
    )

    stream = Made(batch=BATCH)
    sample = torch.cat([next(stream).values, next(stream).values])
    scale = float((sample - sample.mean(0)).square().mean().sqrt())
    model = SparseAutoencoder(SparseAutoencoderConfig(hidden=8, features=FEATURES, k=K))
    model.b_dec.data.copy_(geometric_median(sample) / scale)
    centered = sample[:BATCH] / scale - model.b_dec.data
    first = decode(token_choice(centered @ model.w_enc.data.T, K), model.w_dec.data)
    model.w_enc.data *= (centered * first).sum() / first.square().sum()
    adam = torch.optim.Adam(model.parameters(), lr=1e-3, eps=6.25e-10)
    silent, average = torch.zeros(FEATURES), [torch.zeros_like(p) for p in model.parameters()]
    met_dead = clipped = False
    for step in range(steps):
        x = next(stream).values / scale
        z = model.affinity(x)
        hats = [decode(token_choice(z, size), model.w_dec, model.b_dec) for size in (K, 4 * K)]
        loss = (x - hats[0]).square().mean() + (x - hats[1]).square().mean() / 8
        dead = silent > window
        met_dead |= bool(dead.any())
        loss = loss + aux_k_loss(x - hats[0], z, dead, model.w_dec, k_aux=k_aux) / 32 * float(dead.any())
        adam.zero_grad()
        loss.backward()
        model.project_gradient()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        clipped |= bool(norm > 0.5)
        factor = min(1.0, (step + 1) / 4) * min(1.0, (steps - step) / 6)
        adam.param_groups[0]["lr"] = 1e-3 * factor
        adam.step()
        model.normalize_decoder()
        code = token_choice(z.detach(), K)
        fired = torch.zeros(FEATURES, dtype=torch.bool)
        fired[code.indices[code.values > 1e-3]] = True
        silent = torch.where(fired, 0, silent + BATCH)
        average = [0.9 * old + 0.1 * p.detach() for old, p in zip(average, model.parameters(), strict=True)]
    assert met_dead
    assert clipped
    w_dec, w_enc, b_enc, b_dec = (total / (1 - 0.9**steps) for total in average)
    lengths = w_dec.norm(dim=1, keepdim=True)
    wanted = {
        "w_dec": w_dec / lengths,
        "w_enc": w_enc * lengths,
        "b_enc": b_enc * lengths[:, 0] * scale,
        "b_dec": b_dec * scale,
    }
    for name, value in wanted.items():
        torch.testing.assert_close(getattr(found.autoencoder, name).data, value, rtol=1e-5, atol=2e-6, msg=name)


@pytest.mark.parametrize("stop", [10, 13])
def test_twenty_steps_equal_ten_and_ten(tmp_path: Path, stop: int) -> None:
    settings = recipe(ema=0.99, evaluate_every=5)
    members = named(ALL, [SITE, OTHER])
    held_out = next(Made(batch=80, seed=3, sites=(SITE, OTHER))).by_site
    runs = {}
    for name in ("whole", "parts"):
        run = RunFolder(tmp_path / name)
        run.path.mkdir()
        if name == "parts":
            stream = Made(batch=BATCH, sites=(SITE, OTHER))
            assert (
                train_on_stream(stream, members, settings, run=run, held_out=held_out, stop_at=stop, show=False) is None
            )
            run.log(stop + 1, {"lost": 1.0})  # what an interrupted run may have written after its checkpoint
        stream = Made(batch=BATCH, sites=(SITE, OTHER))
        runs[name] = train_on_stream(
            stream, members, settings, run=run, held_out=held_out, resume=name == "parts", show=False
        )
    assert runs["whole"] is not None
    assert runs["parts"] is not None
    for one, other in zip(runs["whole"], runs["parts"], strict=True):
        equal(one, other)
        assert one.measures == other.measures
        assert one.fitted == other.fitted
    assert any(one.fitted for one in runs["whole"])
    whole, parts = lines(tmp_path / "whole"), lines(tmp_path / "parts")
    kept = [entry for entry in parts if entry["step"] != stop or stop % 5 == 0]
    assert kept == whole
    assert [step for step, _ in RunFolder(tmp_path / "whole").checkpoints()] == [14, 20]


def test_many_at_once_equal_one_at_a_time() -> None:
    together = train_on_stream(
        Made(batch=BATCH, sites=(SITE, OTHER)), named(ALL, [SITE, OTHER]), recipe(steps=8), show=False
    )
    assert together is not None
    for one in together:
        stream = Made(batch=BATCH, sites=(SITE, OTHER))
        (alone,) = train_on_stream(stream, {one.name: (one.site, one.spec)}, recipe(steps=8), show=False) or []
        equal(one, alone)


def test_evaluation_leaves_training_alone() -> None:
    held_out = {SITE: next(Made(batch=70, seed=3)).values}
    members, fixed = named(ALL, [SITE]), {"steps": 8, "calibrate_on": "training"}
    without = train_on_stream(Made(batch=BATCH), members, recipe(**fixed), show=False)
    often = train_on_stream(
        Made(batch=BATCH), members, recipe(**fixed, evaluate_every=1), held_out=held_out, show=False
    )
    assert without is not None
    assert often is not None
    for one, other in zip(without, often, strict=True):
        equal(one, other)
        assert set(other.measures) >= {"fvu", "l0", "dead", "fvu_exported", "l0_exported"}
        assert other.densities is not None
        assert float(other.densities.sum()) == pytest.approx(other.measures["l0_exported"])


def test_zipf_budgets_follow_demand() -> None:
    """After the mutual steps a law is fitted to demand; budgets go by its ranks and sum to k times the batch over a cycle."""
    zipf = ZipfSpec(mutual_share=0.5, fit_every=100, window=100_000, least_firings=0, measure_every=2)
    law = Law(spec("feature"), zipf, Mesh(), batch=6400, steps=10, device=torch.device("cpu"))
    assert [law.due(step) for step in range(8)] == [True] * 5 + [False, True, False]
    demand = (6400 * 0.5 / (torch.arange(FEATURES).flip(0) + 1.5)).round().long()  # the last feature is the most wanted
    from sae import Firings

    for step in range(5):
        law.measure(demand)
        law.refit(step + 1, Firings.start(FEATURES))
    assert law.fitted is not None
    assert law.fitted["step"] == 5
    assert law.budgets is not None
    budgets = law.budgets.sum(0)
    assert bool((budgets.diff() >= 0).all())
    assert int(budgets.sum()) == K * 6400 * len(law.budgets)
    uniform = Law(spec("feature"), ZipfSpec(budgets="uniform"), Mesh(), batch=64, steps=10, device=torch.device("cpu"))
    assert uniform.own_budgets(3).tolist() == [K * 64 // FEATURES] * FEATURES
    assert uniform.mutual_steps == 0


def test_times_of_all_phases_are_logged(tmp_path: Path) -> None:
    train_on_stream(Made(batch=BATCH), named(ALL[:1], [SITE]), recipe(steps=5), run=RunFolder(tmp_path), show=False)
    (entry,) = RunFolder(tmp_path).metrics()
    phases = {name.removeprefix("ms/"): value for name, value in entry.items() if name.startswith("ms/")}
    assert set(phases) == {"harvest", "encode", "select", "decode", "loss", "backward", "optimizer"}
    assert all(value > 0 for value in phases.values())
    assert sum(phases.values()) * 5 / 1e3 == pytest.approx(5 * BATCH / entry["tokens_per_second"], rel=0.3)


def test_bad_data_end_in_one_sentence(tmp_path: Path) -> None:
    members = named(ALL[:1], [SITE])

    def run(stream: Any, **settings: Any) -> None:
        folder = RunFolder(tmp_path / str(len(list(tmp_path.iterdir()))))
        folder.path.mkdir()
        train_on_stream(stream, members, recipe(**settings), run=folder, show=False)

    with pytest.raises(
        UserError, match=r"resid.* hold NaN, infinity or numbers beyond float32 in the batch after step 3"
    ):
        run(Made(batch=BATCH, bad=5))
    with pytest.raises(UserError, match="ended after 7 of 20 steps"):
        run(Made(batch=BATCH, length=9))
    assert [step for step, _ in RunFolder(tmp_path / "1").checkpoints()] == [7]
    with pytest.raises(UserError, match="ended before training began"):
        run(Made(batch=BATCH, length=0))
    with pytest.raises(UserError, match=r"64 tokens a batch and trainer.batch_tokens is 32"):
        run(Made(batch=64))
    with pytest.raises(UserError, match="diverged at step"):
        train_on_stream(Made(batch=BATCH), named([spec("token", learning_rate=1e30)], [SITE]), recipe(), show=False)
    with pytest.raises(UserError, match="the stream has no"):
        train_on_stream(Made(batch=BATCH), named(ALL[:1], [OTHER]), recipe(), show=False)
    with pytest.raises(UserError, match="held_out lacks"):
        train_on_stream(Made(batch=BATCH), members, recipe(), held_out={OTHER: torch.ones(3, 8)}, show=False)


def test_a_log_that_cannot_be_written_ends_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise UserError("cannot write metrics.jsonl: the disk is full")

    monkeypatch.setattr(RunFolder, "log", full)
    for steps in (20, 5):  # at the next step, and after the last one
        with pytest.raises(UserError, match="the disk is full"):
            train_on_stream(
                Made(batch=BATCH), named(ALL[:1], [SITE]), recipe(steps=steps), run=RunFolder(tmp_path), show=False
            )


def test_a_checkpoint_of_other_autoencoders_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    train_on_stream(Made(batch=BATCH), named(ALL[:1], [SITE]), recipe(), run=run, stop_at=3, show=False)
    folder = run.checkpoints()[-1][1]
    with pytest.raises(UserError, match="holds no"):
        train_on_stream(Made(batch=BATCH), named(ALL[1:2], [SITE]), recipe(), run=run, resume=True, show=False)
    facts = json.loads((folder / "state.json").read_text())
    (name,) = facts["members"]
    wider = {name: (SITE, spec("token", features=2 * FEATURES, multi_topk=True))}
    with pytest.raises(UserError, match="another autoencoder"):
        train_on_stream(Made(batch=BATCH), wider, recipe(), run=run, resume=True, show=False)
    (folder / f"{name}.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match=rf"no checkpoint is whole.*{name}\.safetensors is not as it was written"):
        train_on_stream(Made(batch=BATCH), named(ALL[:1], [SITE]), recipe(), run=run, resume=True, show=False)


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before_and_results_stand_in_the_log_once(
    tmp_path: Path,
) -> None:
    """As after a kill during the export, and a bit that flipped since."""
    run, held_out = RunFolder(tmp_path), {SITE: next(Made(batch=BATCH))[SITE]}
    settings = recipe(save_every=2)

    def train(*, resume: bool) -> list[Any] | None:
        return train_on_stream(
            Made(batch=BATCH), named(ALL[:1], [SITE]), settings, run=run, held_out=held_out, resume=resume, show=False
        )

    whole, log = train(resume=False), run.metrics()
    newest = run.checkpoints()[-1][1]
    path = next(newest.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1] + b"\0\0")
    again = train(resume=True)
    assert whole is not None
    assert again is not None
    assert torch.equal(whole[0].autoencoder.w_enc, again[0].autoencoder.w_enc)
    names = [tuple(line) for line in run.metrics()]
    assert names == [tuple(line) for line in log]
    assert [line for line in run.metrics() if any("/result/" in name for name in line)] == [
        line for line in log if any("/result/" in name for name in line)
    ]


@pytest.mark.parametrize("choice", ["token", "mutual", "feature"])
def test_the_encoder_starts_at_the_scale_that_is_best(tmp_path: Path, choice: str) -> None:
    """The error of the first batch is not above that of any other scale."""
    errors = {}
    for factor in (None, 0.8, 1.0, 1.25):
        loop = Loop(Made(batch=BATCH), named([spec(choice)], [SITE]), recipe(), Mesh(), torch.device("cpu"))
        loop._start()
        member = loop.members[0]
        member.weights["w_enc"].data *= factor or 1.0
        loop.stream = Made(batch=BATCH)  # the batch that the scale was found on
        errors[factor] = loop._one_step()[f"{member.name}/nmse"]
    assert errors[None] == errors[1.0] < min(errors[0.8], errors[1.25])


def test_the_learning_rate_rises_and_falls() -> None:
    rates = [learning_rate(step, 10, warmup=2, decay=0.4) for step in range(10)]
    assert rates == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])
    assert [learning_rate(step, 3, warmup=0, decay=0.0) for step in range(3)] == [1, 1, 1]


def test_sweeps_are_crossed_and_names_are_unique() -> None:
    specs = crossed([spec("token"), spec("mutual")], {"k": [2, 4], "seed": [0, 1]})
    assert len(specs) == 8
    assert len(named(specs, [SITE, OTHER])) == 16
    assert "resid.0-mutual-k4-f24-s1" in named(specs, [SITE])
    with pytest.raises(UserError, match="two autoencoders are called"):
        named([spec("token"), spec("token")], [SITE])
    with pytest.raises(UserError, match=r"sites has resid\.0 2 times: name each site once"):
        named([spec("token")], [SITE, SITE])
    with pytest.raises(UserError, match=r"sweep\.kk"):
        crossed([spec("token")], {"kk": [1]})
    with pytest.raises(UserError, match="k from 1"):
        crossed([spec("token")], {"k": [0]})


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: spec("tokn"), "choice is 'tokn'"),
        (lambda: spec("token", auxiliary="aux_zip"), "auxiliary is 'aux_zip'"),
        (lambda: spec("token", multi_topk="false"), "multi_topk is 'false'"),
        (lambda: spec("token", learning_rate=float("inf")), "learning_rate is inf"),
        (lambda: recipe(betas=(1.5, 0.9)), "betas"),
        (lambda: recipe(eps=0.0), "eps 0.0"),
        (lambda: recipe(ema=0.9, thresholds="running"), "use calibrated"),
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong: Callable[[], object], says: str) -> None:
    with pytest.raises(UserError, match=says):
        wrong()


def test_numbers_that_overflow_when_scaled_are_bad_data_too() -> None:
    class Huge(Made):
        def __next__(self) -> ActivationBatch:
            batch = super().__next__()
            if self.batches > 4:
                batch.values[0, 0] = 3e38
            return batch

    settings = recipe(steps=9)
    stream = Huge(batch=BATCH)
    stream.directions *= 1e-3
    with pytest.raises(UserError, match="beyond float32 in the batch after step"):
        train_on_stream(stream, named([spec("token")], [SITE]), settings, show=False)
