"""Membership beside the model that never knew: values by hand, which losses are taken, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
from families import TEXT, tiny
from markupsafe import escape

import unlearn
from lm.data.rows import Row
from lm.errors import UserError
from lm.model import LanguageModel, ModelSpec
from unlearn.evaluation import membership
from unlearn.evaluation.config import EvaluateConfig
from unlearn.evaluation.result import Evaluation
from unlearn.evaluation.scores import known_scores
from unlearn.evaluation.scores.base import Losses, Statistics
from unlearn.evaluation.stage import run_evaluate, table
from unlearn.report import render
from unlearn.report.runs.collect import collect

FORGET = (Row("f0qa0", TEXT[0][:12], TEXT[0][12:20], "Task2"),)
RETAIN = (Row("r0qa0", TEXT[1][:12], TEXT[1][12:20], "Task2"),)
MEMBERS, OTHERS = tuple(TEXT[:2]), (*TEXT[2:4], TEXT[0][:20])
THREE = ("mia_auc_gap", "mia_ks_p", "mia_tpr_at_5_fpr")


def model(seed: int) -> LanguageModel:
    return tiny("olmo", seed=seed, max_position_embeddings=128)


def evaluated(seed: int, **how: object) -> Evaluation:
    given = {"members": MEMBERS, "nonmembers": OTHERS, "max_new_tokens": 1, "scores": THREE, **how}
    return unlearn.evaluate(model(seed), FORGET, RETAIN, **given)  # type: ignore[arg-type]


def test_the_scores_by_hand() -> None:
    scores = known_scores()
    mine = Losses(members=(1.0, 2.0, 3.0), nonmembers=(2.5, 9.0))
    retain = Losses(members=(4.0, 5.0, 6.0), nonmembers=(4.5, 5.5))
    statistics = Statistics(losses=mine, retain_losses=retain)
    assert statistics.of(scores["mia_auc_gap"]) == pytest.approx(5 / 6 - 0.5)
    assert statistics.of(scores["mia_ks_p"]) == pytest.approx(0.1)
    assert statistics.of(scores["mia_tpr_at_5_fpr"]) == pytest.approx(2 / 3)
    assert statistics.examples_of(scores["mia_tpr_at_5_fpr"]) == {"member 0": 1, "member 1": 1, "member 2": 0}
    alone = Statistics(losses=mine)
    assert [alone.of(scores[name]) for name in THREE] == [None, None, pytest.approx(2 / 3)]
    assert math.isnan(scores["mia_ks_p"].goodness(0.9))
    assert (scores["mia_ks_p"].text(0.0004), scores["mia_ks_p"].text(0.25)) == ("<0.001", "0.250")
    assert scores["mia_auc_gap"].goodness(0.1) > scores["mia_auc_gap"].goodness(0.2)


def test_in_memory_an_evaluation_and_its_losses_say_the_same() -> None:
    retain = evaluated(2, scores=["mia_auc"])
    assert retain.statistics.losses is not None
    beside = evaluated(1, retain_scores=retain)
    assert beside.values == evaluated(1, retain_scores=retain.statistics.losses).values
    plain = Losses(members=retain.member_losses, nonmembers=retain.nonmember_losses)
    assert beside.values == evaluated(1, retain_scores=plain).values
    gap = abs(membership.auc(beside.member_losses, beside.nonmember_losses) - retain.values["mia_auc"])  # type: ignore[operator]
    assert beside.values["mia_auc_gap"] == pytest.approx(gap)
    assert evaluated(2, retain_scores=retain).values["mia_ks_p"] == 1.0


def test_losses_of_other_documents_are_refused() -> None:
    retain = evaluated(2, scores=["mia_auc"])
    with pytest.raises(UserError, match=r"losses of other documents \(2 members and 3 others; here are 1 and 3\)"):
        evaluated(1, retain_scores=retain, members=MEMBERS[:1])
    with pytest.raises(UserError, match="losses of other documents"):
        evaluated(1, retain_scores=retain, members=(MEMBERS[0], MEMBERS[1] + " now"))
    with pytest.raises(UserError, match="losses of other documents"):
        evaluated(1, retain_scores=retain, members=MEMBERS[::-1])
    with pytest.raises(UserError, match="needs losses of the retain model"):
        evaluated(1)
    with pytest.raises(UserError, match="members and non-members: give those, too"):
        evaluated(1, retain_scores=retain, members=(), nonmembers=(), scores=None)
    with pytest.raises(UserError, match="retain_scores has no losses"):
        evaluated(1, retain_scores=evaluated(2, scores=["task_aggregate"]))


@pytest.fixture
def config(tmp_path: Path) -> EvaluateConfig:
    for name, seed in (("mine", 1), ("retain", 2)):
        subject = model(seed)
        subject.model.save_pretrained(tmp_path / name / "model")
        subject.tokenizer.save_pretrained(tmp_path / name / "model")
    for name, rows in (("forget", FORGET), ("retain", RETAIN)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in rows))
    for name, texts in (("member", MEMBERS), ("other", OTHERS)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"document": text}) + "\n" for text in texts))
    return EvaluateConfig(
        model=ModelSpec(path=str(tmp_path / "mine" / "model"), device="cpu"),
        forget=str(tmp_path / "forget.jsonl"),
        retain=str(tmp_path / "retain.jsonl"),
        members=str(tmp_path / "member.jsonl"),
        nonmembers=str(tmp_path / "other.jsonl"),
        utility=None,
        max_new_tokens=1,
        out=str(tmp_path / "mine" / "scores"),
    )


def test_from_run_folders_to_the_page(config: EvaluateConfig, tmp_path: Path) -> None:
    folder = tmp_path / "retain" / "scores"
    retain = dataclasses.replace(
        config, model=dataclasses.replace(config.model, path=str(tmp_path / "retain" / "model")), out=str(folder)
    )
    beside = dataclasses.replace(config, retain_scores=str(folder))
    with pytest.raises(UserError, match="does not exist: check the path"):
        run_evaluate(beside)
    run_evaluate(retain)
    result = run_evaluate(beside)
    in_memory = evaluated(1, retain_scores=str(folder))
    assert {name: result.values[name] for name in THREE} == {name: in_memory.values[name] for name in THREE}
    written = json.loads((tmp_path / "mine" / "scores" / "scores.json").read_text())
    assert {name: written[name] for name in THREE} == {name: result.values[name] for name in THREE}
    assert "mia_ks_p" not in json.loads((folder / "scores.json").read_text()), "there was nothing to judge it beside"
    beside_it = [f"AUC gap {written['mia_auc_gap']:.3f}", f"KS p {written['mia_ks_p']:.3f}"]
    assert f" {', '.join(beside_it)}, TPR at 5% FPR " in table(result).partition("\nMembership ")[2]
    page = render(collect([tmp_path / "mine" / "scores", folder]))
    assert '<th scope="colgroup" colspan="3" class="pair">Membership</th>' in page
    for name in THREE:
        assert f'title="{escape(known_scores()[name].meaning)}">' in page
    run_evaluate(dataclasses.replace(beside, resume=True))

    losses = json.loads((folder / "membership.json").read_text())
    losses[0][0] += 1
    (folder / "membership.json").write_text(json.dumps(losses))
    with pytest.raises(UserError, match="retain_losses changed since it began"):
        run_evaluate(dataclasses.replace(beside, resume=True))
    (tmp_path / "other.jsonl").write_text("".join(json.dumps({"document": text}) + "\n" for text in OTHERS[::-1]))
    with pytest.raises(UserError, match="losses of other documents"):
        run_evaluate(dataclasses.replace(beside, out=str(tmp_path / "elsewhere")))
    assert not (tmp_path / "elsewhere").exists(), "nothing was begun"


def test_folders_without_losses_are_refused(config: EvaluateConfig, tmp_path: Path) -> None:
    beside = dataclasses.replace(config, retain_scores=str(tmp_path / "mine"))
    with pytest.raises(UserError, match="no finished evaluation"):
        run_evaluate(beside)
    (tmp_path / "mine" / "scores.json").write_text("{}")
    with pytest.raises(UserError, match="has no losses"):
        run_evaluate(beside)
    (tmp_path / "mine" / "membership.json").write_text("[[1.0, 2.0], [1.0, 2.0, 3.0]]")
    (tmp_path / "mine" / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="does not say of which documents"):
        run_evaluate(beside)
    with pytest.raises(UserError, match="there are no members"):
        dataclasses.replace(config, members=None, nonmembers=None, retain_scores="runs/retain")
