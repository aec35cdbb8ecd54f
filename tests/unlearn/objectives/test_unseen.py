"""Targets of calibrated objectives by hand, and as the trainer measures them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import log_softmax

from lm.data.rows import Row
from lm.errors import UserError
from lm.loading import load
from lm.row_files import load_rows
from lm.run_folder import RunFolder
from sae.activations.sources import Texts
from tests.unlearn.helpers import SMALL, small_config, unseen_rows
from unlearn.forward.calibration import groups_of
from unlearn.objectives import LookUnseen
from unlearn.scope.scope import Scope
from unlearn.stage import run_unlearn
from unlearn.training import checkpoint


def test_targets_are_the_mean_or_the_quantiles_in_the_rows_own_order() -> None:
    forget, unseen = torch.tensor([0.3, 9.0, 0.1, 4.0]).double(), torch.tensor([3.0, 1.0, 2.0, 5.0]).double()
    assert LookUnseen().targets(forget, unseen).tolist() == [2.75] * 4
    got = LookUnseen(match="quantiles").targets(forget, unseen)
    wanted = torch.quantile(unseen, torch.tensor([0.375, 0.875, 0.125, 0.625]).double())
    torch.testing.assert_close(got, wanted)


def test_a_shift_is_the_difference_of_the_means_beyond_chance() -> None:
    forget, unseen = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([4.0, 6.0]).double()
    error = (forget.var() / 3 + unseen.var() / 2) ** 0.5
    got = LookUnseen(match="shift", errors=1.5).targets(forget, unseen)
    torch.testing.assert_close(got, forget + (3.0 - 1.5 * error))
    assert torch.equal(LookUnseen(match="shift", errors=3.0).targets(forget, unseen), forget), "few rows cannot tell"
    one = LookUnseen(match="shift").targets(torch.tensor([1.0]).double(), torch.tensor([0.0]).double())
    assert one.tolist() == [0.0], "one row has no error that is known"


def test_rows_are_held_against_their_own_kind() -> None:
    forget = [Row("a1sc1", "a", "b", "Task1"), Row("a1qa0", "a", "b", "Task1"), Row("b1sc1", "a", "b", "Task2")]
    unseen = [Row("c1qa0", "a", "b", "Task1"), Row("d1sc1", "a", "b", "Task2"), Row("e1sc1", "a", "b", "Task1")]
    assert groups_of(LookUnseen(), forget, unseen) == {
        "completions of Task1": ([0], [2]),
        "questions of Task1": ([1], [0]),
        "completions of Task2": ([2], [1]),
    }
    assert groups_of(LookUnseen(groups="kind"), forget, unseen) == {
        "completions": ([0, 2], [1, 2]),
        "questions": ([1], [0]),
    }
    assert groups_of(LookUnseen(questions=0.0), forget, unseen[1:]).keys() == {
        "completions of Task1",
        "completions of Task2",
    }
    with pytest.raises(UserError, match="no calibration rows that are questions of Task1"):
        groups_of(LookUnseen(), forget, unseen[1:])


def test_the_trainer_measures_whole_documents_and_answers(tiny: Path, tmp_path: Path) -> None:
    """After one step at no rate the targets in the checkpoint are the untouched model's losses on the calibration rows."""
    unseen_rows(tiny, tmp_path / "unseen.jsonl")
    objective = LookUnseen(cap=5.0)
    config = small_config(
        tiny,
        tmp_path / "run",
        objective=objective,
        scope=Scope(layers="model"),
        calibration=str(tmp_path / "unseen.jsonl"),
        general=Texts(texts=("a text of the world",)),
        trainer=replace(
            SMALL,
            pairing="streams",
            batch=30,
            forget_share=0.4,
            general_share=0.1,
            steps=2,
            learning_rate=1e-12,
            save_every=1,
        ),
    )
    kept = {}
    usual = checkpoint.save

    def save(acc, run, name, model, optimizer, facts):  # type: ignore[no-untyped-def]
        kept[name] = facts
        usual(acc, run, name, model, optimizer, facts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", save)
        run_unlearn(config)
    model = load(config.model, device="cpu")

    def loss(row: Row) -> float:
        ids = [*model.tokenizer(f"{row.input} {row.output}")["input_ids"], model.tokenizer.eos_token_id]
        first = 1 if row.kind == "sc" else len(model.tokenizer(row.input)["input_ids"])
        with torch.no_grad():
            logprob = log_softmax(model.model(torch.tensor([ids])).logits[0].double(), dim=-1)
        return float(
            torch.stack([(-logprob[place - 1, ids[place]]).clamp(max=5.0) for place in range(first, len(ids))]).mean()
        )

    unseen, forget = load_rows(tmp_path / "unseen.jsonl"), load_rows(config.forget)
    means = {kind: torch.tensor([loss(row) for row in unseen if row.kind == kind]).double() for kind in ("sc", "qa")}
    (facts,) = {json.dumps(each["targets"]) for name, each in kept.items()}
    targets = json.loads(facts)
    for row, value, spread in zip(forget, targets["value"], targets["spread"], strict=True):
        assert value == pytest.approx(float(means[str(row.kind)].mean()), rel=1e-4)
        assert spread == pytest.approx(float(means[str(row.kind)].std(correction=0)), rel=1e-3)
    expected = 0.0
    for row in forget:
        away = abs(float(means[str(row.kind)].mean()) + 0.1 - loss(row))
        spread = float(means[str(row.kind)].std(correction=0))
        expected += 0.4 * (away**2 / (2 * spread) if away < spread else away - spread / 2) / len(forget)
    assert RunFolder(config.out).metrics()[0]["forget_loss"] == pytest.approx(expected, rel=1e-4)


def test_what_does_not_go_together_is_refused(tiny: Path, tmp_path: Path) -> None:
    unseen_rows(tiny, tmp_path / "unseen.jsonl")
    with pytest.raises(UserError, match="LookUnseen holds forget rows against calibration rows and there are none"):
        run_unlearn(small_config(tiny, tmp_path / "a", objective=LookUnseen()))
    with pytest.raises(UserError, match="Joint reads none"):
        run_unlearn(small_config(tiny, tmp_path / "b", calibration=str(tmp_path / "unseen.jsonl")))
    with pytest.raises(UserError, match="is also a forget or retain row"):
        run_unlearn(small_config(tiny, tmp_path / "c", objective=LookUnseen(), calibration=str(tiny / "retain.jsonl")))
    with pytest.raises(UserError, match=r"set trainer\.pairing to streams"):
        run_unlearn(small_config(tiny, tmp_path / "d", general=Texts(texts=("a text of the world",))))
    streams = replace(SMALL, pairing="streams")
    with pytest.raises(UserError, match="there is no general text"):
        run_unlearn(small_config(tiny, tmp_path / "e", trainer=streams))
    with pytest.raises(UserError, match="no forget row would come in"):
        run_unlearn(small_config(tiny, tmp_path / "f", trainer=replace(SMALL, forget_from=0.99)))
    with pytest.raises(UserError, match=r"objective\.renew is 0"):
        LookUnseen(renew=0)
    with pytest.raises(UserError, match="nothing would be forgotten"):
        LookUnseen(documents=0.0, questions=0.0)
