"""The axis of scores: what each needs, its values example by example, and a new one in a file of its own."""

from __future__ import annotations

import doctest
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import pytest
from families import TEXT, tiny

import unlearn
from lm.data.rows import Question, Row
from lm.errors import UserError
from lm.model import LanguageModel, ModelSpec
from unlearn.evaluation import evaluate as module
from unlearn.evaluation import lume
from unlearn.evaluation.config import EvaluateConfig
from unlearn.evaluation.scores import chosen_scores, known_scores, room_scores
from unlearn.evaluation.scores.base import Choices, Losses, Need, Score, Statistics, Towards, needs_of
from unlearn.evaluation.scores.lume import LUME_TERMS
from unlearn.evaluation.stage import describe, run_evaluate
from unlearn.report import render
from unlearn.report.runs.collect import collect


@dataclass(frozen=True)
class AnswerLength(Score):
    """A score that no file of the room knows: how long the answers to the forget rows are, in words."""

    name = "answer_length"
    title = "Answer length"
    meaning = "Mean number of words that the model says to a forget row."
    needs: tuple[Need, ...] = ("forget",)

    def value(self, statistics: Statistics) -> float | None:
        return fmean(self.per_example(statistics).values())

    def per_example(self, statistics: Statistics) -> Mapping[str, float]:
        return {row["id"]: float(len(row["model_output"].split())) for row in statistics.forget or ()}


def rows(side: str) -> tuple[Row, ...]:
    made = [Row(f"{side}{n}{kind}", TEXT[n][:12], TEXT[n][12:20], "Task2") for n in (0, 1) for kind in ("sc1", "qa0")]
    return tuple(made)


FORGET, RETAIN = rows("f"), rows("r")
QUESTIONS = (Question("Who?", ("Anna", "Zoë"), 1), Question("What?", ("Anna", "the fox"), 0))


@pytest.fixture(scope="module")
def subject() -> LanguageModel:
    return tiny("olmo", seed=1, max_position_embeddings=128)


def test_the_scores_of_the_room_are_the_official_ones_and_some_beside_them() -> None:
    names = [score.name for score in room_scores()]
    official = {*lume.TERMS, "task_aggregate", "mia_auc", "mia_score", "utility", "final"}
    assert set(names) == official | {"mia_auc_gap", "mia_ks_p", "mia_tpr_at_5_fpr", "general_perplexity"} | {
        f"{side}{fault}"
        for side in ("", "retain_")
        for fault in ("empty", "repeated", "scrambled", "garbled", "perplexity")
    }
    assert tuple(term.name for term in LUME_TERMS) == lume.TERMS
    everything = chosen_scores(["final"])
    assert everything[-1].name == "final"
    assert {score.name for score in everything} == official
    assert set(needs_of(everything[-1])) == {"forget", "retain", "losses", "choices"}
    assert all(score.title and score.meaning.endswith((".", "worst.")) for score in room_scores())


def test_a_direction_says_which_of_two_values_is_better() -> None:
    auc = known_scores()["mia_auc"]
    assert auc.direction == Towards(0.5)
    assert auc.goodness(0.45) > auc.goodness(0.6) > auc.goodness(0.1)
    assert AnswerLength().goodness(3.0) > AnswerLength().goodness(2.0)


def test_example_by_example_values_come_to_the_score(subject: LanguageModel) -> None:
    result = unlearn.evaluate(
        subject, FORGET, RETAIN, members=TEXT[:2], nonmembers=TEXT[2:4], questions=QUESTIONS, max_new_tokens=5
    )
    for name in ("retain Task2 knowledge", "forget Task2 regurgitation", "mia_auc", "utility"):
        assert fmean(result.examples[name].values()) == pytest.approx(result.values[name])
    assert list(result.examples["forget Task2 knowledge"]) == ["f0qa0", "f1qa0"]
    assert "final" not in result.examples
    assert repr(result).startswith("Evaluation(task_aggregate 0.")
    assert repr(result).endswith("4 forget and 4 retain rows)")


def test_only_what_a_score_needs_is_asked(subject: LanguageModel, tmp_path: Path) -> None:
    result = unlearn.evaluate(subject, FORGET, RETAIN, questions=QUESTIONS, scores=["utility"], store=tmp_path)
    assert list(result.values) == ["utility"]
    assert (result.statistics.forget, result.statistics.losses) == (None, None)
    assert {path.name for path in tmp_path.iterdir()} == {"utility.json", "seconds.json"}
    assert result.to_json()["terms"] == [None] * 12
    with pytest.raises(
        UserError, match="the score mia_auc needs documents of members and non-members and there are none: give"
    ):
        unlearn.evaluate(subject, FORGET, RETAIN, scores=["mia_score"])
    with pytest.raises(UserError, match=r"no score 'utilty' \(did you mean 'utility'\?\)"):
        unlearn.evaluate(subject, FORGET, RETAIN, scores=["utilty"])
    strangers = (replace(FORGET[0], task="privacy"),)
    with pytest.raises(UserError, match='task "privacy"'):
        unlearn.evaluate(subject, strangers, RETAIN)
    assert unlearn.evaluate(subject, strangers, RETAIN, scores=[AnswerLength()], max_new_tokens=2).values


def test_an_accuracy_without_its_answers_is_still_read(subject: LanguageModel, tmp_path: Path) -> None:
    (tmp_path / "utility.json").write_text("0.75\n")
    result = unlearn.evaluate(subject, FORGET, RETAIN, questions=QUESTIONS, scores=["utility"], store=tmp_path)
    assert result.utility == 0.75
    assert result.statistics.choices == Choices(accuracy=0.75)
    assert not result.examples


def test_a_score_that_applies_to_nothing_has_no_value() -> None:
    empty = Statistics(forget=(), losses=Losses(members=(1.0,), nonmembers=(2.0,)))
    assert empty.of(LUME_TERMS[0]) is None
    assert empty.of(LUME_TERMS[-1]) is None
    assert empty.of(known_scores()["mia_auc"]) == 1.0
    assert Statistics(losses=empty.losses).of(known_scores()["final"]) is None
    with pytest.raises(UserError, match="no row to score"):
        empty.of(known_scores()["task_aggregate"])


def test_a_new_score_is_one_class(subject: LanguageModel, tmp_path: Path) -> None:
    """It stands in scores.json, in examples.json, in the table of the command and on the page of a report."""
    subject.model.save_pretrained(tmp_path / "model")
    subject.tokenizer.save_pretrained(tmp_path / "model")
    for name, side in (("forget", FORGET), ("retain", RETAIN)):
        lines = [json.dumps({"id": r.id, "input": r.input, "output": r.output, "task": r.task}) for r in side]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    config = EvaluateConfig(
        model=ModelSpec(path=str(tmp_path / "model"), device="cpu"),
        forget=str(tmp_path / "forget.jsonl"),
        retain=str(tmp_path / "retain.jsonl"),
        members=None,
        nonmembers=None,
        utility=None,
        scores=("task_aggregate", "answer_length"),
        max_new_tokens=5,
        out=str(tmp_path / "run"),
    )
    result = run_evaluate(config)
    written = json.loads((tmp_path / "run" / "scores.json").read_text())
    length = result.values["answer_length"]
    assert length is not None
    assert length > 0
    assert written["answer_length"] == length
    assert written["final"] is None
    examples = json.loads((tmp_path / "run" / "examples.json").read_text())
    assert list(examples["answer_length"]) == [row.id for row in FORGET]
    assert f"answer length {length:>16.4f}" in describe(config, result)
    assert describe(config, result).endswith(f"wrote {tmp_path}/run/scores.json")
    page = render(collect([tmp_path / "run"]))
    assert f'title="{AnswerLength.meaning}">Answer length</th>' in page
    assert f">{length:.3f}</td>" in page


def test_the_example_of_the_docstring_runs() -> None:
    found = doctest.DocTestFinder().find(unlearn.evaluate, "evaluate", globs={})
    assert sum(len(test.examples) for test in found) >= 4
    runner = doctest.DocTestRunner()
    for test in found:
        runner.run(test)
    assert runner.failures == 0
    assert unlearn.evaluate is module.evaluate
