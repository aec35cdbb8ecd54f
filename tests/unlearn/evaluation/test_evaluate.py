"""The whole evaluation: its parts put together, its files, its command, on one process and on two."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import TEXT, tiny

import unlearn
from lm.config import parse_config
from lm.data.rows import Question, Row
from lm.errors import UserError
from lm.model import LanguageModel
from lm.prompts import PromptSpec
from tests.forked import run_forked
from unlearn.evaluation import lume, membership
from unlearn.evaluation.config import EvaluateConfig
from unlearn.evaluation.evaluation_set import EvaluationSet
from unlearn.evaluation.result import Evaluation
from unlearn.evaluation.stage import first_of_each_subject, read_set, run_evaluate, table
from unlearn.evaluation.utility import multiple_choice
from unlearn.generation.generate import generate

ROOT = Path(__file__).resolve().parents[3]


def rows(side: str, tasks: tuple[str, ...] = ("Task1", "Task2", "Task3")) -> tuple[Row, ...]:
    words = " ".join(TEXT).split()
    made = []
    for number, task in enumerate(tasks):
        for place, suffix in enumerate(("sc1", "qa0")):
            start = 3 * number + place + (7 if side == "retain" else 0)
            made.append(Row(f"{side}{number}{suffix}", " ".join(words[start : start + 3]), words[start + 3], task))
    return tuple(made)


QUESTIONS = tuple(Question(f"{word}?", ("Anna", "Zoë", "the fox"), 1, word) for word in ("Who", "What", "Where"))
ASKED = EvaluationSet(
    forget=rows("forget"),
    retain=rows("retain"),
    members=(TEXT[0], TEXT[1]),
    nonmembers=(TEXT[2], TEXT[3], TEXT[0][:20]),
    questions=QUESTIONS,
)


def evaluate(model: LanguageModel, asked: EvaluationSet, **how: object) -> Evaluation:
    """Ask a whole set at once."""
    given = {field.name: getattr(asked, field.name) for field in dataclasses.fields(asked)}
    given["retain_scores"] = given.pop("retain_losses")
    given["untouched"] = model if given["untouched"] else None
    return unlearn.evaluate(model, **given, **how)  # type: ignore[arg-type]


def model(seed: int = 1) -> LanguageModel:
    return tiny("olmo", seed=seed, max_position_embeddings=128)


def test_it_is_its_parts_put_together() -> None:
    subject = model()
    found = evaluate(subject, ASKED, max_new_tokens=6, batch_size=4)
    sides = []
    for side in (ASKED.forget, ASKED.retain):
        said = generate(subject, [row.input for row in side], prompt=PromptSpec(), max_new_tokens=6)
        sides.append(
            [
                {"id": row.id, "task": row.task, "expected_output": row.output, "model_output": text}
                for row, text in zip(side, said, strict=True)
            ]
        )
    losses = [membership.document_losses(subject, texts) for texts in (ASKED.members, ASKED.nonmembers)]
    utility = multiple_choice(subject, QUESTIONS).accuracy
    expected = lume.score(*sides, mia_auc=membership.auc(*losses), mmlu=utility)
    assert found.scores == expected
    assert found.utility == utility
    assert [dict(each) | {"input": ""} for each in found.forget] == [each | {"input": ""} for each in sides[0]]
    assert found.member_losses == pytest.approx(losses[0], abs=1e-6)
    assert set(found.seconds) == {"forget", "retain", "membership", "utility"}
    values = found.to_json()
    faults = {f"{side}{fault}" for side in ("", "retain_") for fault in ("empty", "repeated", "scrambled", "garbled")}
    official = {"terms", "task_aggregate", "mia_auc", "mia_score", "utility", "final", "seconds"}
    assert set(values) == official | faults | {"mia_tpr_at_5_fpr"}
    assert values["final"] == pytest.approx((values["task_aggregate"] + values["mia_score"] + utility) / 3)


def test_what_was_not_asked_is_null() -> None:
    asked = EvaluationSet(forget=rows("forget", ("Task2",)), retain=rows("retain", ("Task2",)))
    found = evaluate(model(), asked, max_new_tokens=3)
    values = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert [place for place, term in enumerate(values["terms"]) if term is not None] == [2, 3, 8, 9]
    assert (values["mia_auc"], values["mia_score"], values["utility"], values["final"]) == (None,) * 4
    assert len([line for line in table(found).splitlines()[1:] if "-" in line.split()]) == 7


def test_questions_through_lm_eval_give_the_same_utility() -> None:
    ours = evaluate(model(), ASKED, max_new_tokens=2).utility
    theirs = evaluate(model(), dataclasses.replace(ASKED, lm_eval="builtin_utility"), max_new_tokens=2).utility
    assert ours == theirs


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"lm_eval": "mmlu_abstract_algebr", "questions": ()}, "no task .mmlu_abstract_algebr.*did you mean"),
        ({"forget": (Row("0001sc1", "Anna lives", "в Москве", "Task1"),)}, "row 0001sc1 has no word that the official"),
    ],
)
def test_what_could_not_be_scored_is_refused_before_anything_is_asked(asked: dict[str, Any], says: str) -> None:
    subject = model()
    calls: list[int] = []
    subject.model.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(UserError, match=says):
        evaluate(subject, dataclasses.replace(ASKED, **asked), max_new_tokens=2)
    assert calls == []


def test_words_of_every_script_and_questions_that_were_cut_are_told() -> None:
    forget = (Row("0001sc1", "Anna lives", "в Москве", "Task1"),)
    long = Question("Anna Kowalska " * 200, ("Zoë", "again"), 0)
    asked = dataclasses.replace(ASKED, forget=forget, words="every_script", questions=(long, *ASKED.questions))
    found = evaluate(model(), asked, max_new_tokens=2)
    assert found.values["forget Task1 regurgitation"] == 1.0
    assert found.to_json()["words"] == "every_script"
    assert found.to_json()["truncated_questions"] == 1
    assert f"1 of {len(asked.questions)} questions were longer than the model reads" in table(found)


def test_finished_parts_are_kept_and_not_computed_again(tmp_path: Path) -> None:
    subject = model()
    calls = []
    subject.model.register_forward_pre_hook(lambda *_: calls.append(1))
    first = evaluate(subject, ASKED, max_new_tokens=4, store=tmp_path)
    count = len(calls)
    again = evaluate(subject, ASKED, max_new_tokens=4, store=tmp_path)
    assert len(calls) == count > 0
    assert again == first
    (tmp_path / "utility.json").unlink()
    assert evaluate(subject, ASKED, max_new_tokens=4, store=tmp_path).scores == first.scores
    assert len(calls) > count
    assert (tmp_path / "forget.jsonl").stat().st_mode & 0o777 == 0o600, "what was said may name people"
    lines = (tmp_path / "forget.jsonl").read_text(encoding="utf-8").splitlines()
    assert list(json.loads(lines[0])) == ["id", "task", "input", "expected_output", "model_output"]
    with pytest.raises(UserError, match="answers to other rows"):
        evaluate(subject, dataclasses.replace(ASKED, forget=ASKED.forget[1:]), store=tmp_path)
    with pytest.raises(UserError, match="losses of other documents"):
        evaluate(subject, dataclasses.replace(ASKED, members=(TEXT[1],)), store=tmp_path)


def test_impossible_sets_are_refused() -> None:
    with pytest.raises(UserError, match="in both the forget and the retain"):
        dataclasses.replace(ASKED, retain=ASKED.forget)
    with pytest.raises(UserError, match="both members and non-members"):
        dataclasses.replace(ASKED, members=())
    with pytest.raises(UserError, match="both a member and a non-member"):
        dataclasses.replace(ASKED, members=ASKED.nonmembers)
    with pytest.raises(UserError, match="sentence style only"):
        dataclasses.replace(ASKED, style="letter", lm_eval="builtin_utility")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"members": None}, "belong together"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"utility": "lm_eval:mmlu", "utility_style": "letter"}, "its own style"),
        ({"utility": "lm_eval:mmlu", "utility_per_subject": 3}, "all questions"),
    ],
)
def test_impossible_configs_are_refused(wrong: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        EvaluateConfig(**wrong)  # type: ignore[arg-type]


def test_the_first_questions_of_each_subject() -> None:
    questions = tuple(Question(str(n), ("a", "b"), 0, "even" if n % 2 == 0 else "odd") for n in range(7))
    assert [each.question for each in first_of_each_subject(questions, 2)] == ["0", "1", "2", "3"]
    assert first_of_each_subject(questions, None) == questions


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny model and everything it is asked, as files."""
    folder = tmp_path_factory.mktemp("files")
    subject = model()
    subject.model.save_pretrained(folder / "model")
    subject.tokenizer.save_pretrained(folder / "model")
    for name, side in (("forget", ASKED.forget), ("retain", ASKED.retain)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in side))
    for name, texts in (("member", ASKED.members), ("nonmember", ASKED.nonmembers)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"document": text}) + "\n" for text in texts))
    (folder / "questions.jsonl").write_text("".join(json.dumps(dataclasses.asdict(each)) + "\n" for each in QUESTIONS))
    return folder


def words(files: Path, out: Path) -> list[str]:
    given = {
        "model.path": files / "model",
        "model.device": "cpu",
        "forget": files / "forget.jsonl",
        "retain": files / "retain.jsonl",
        "members": files / "member.jsonl",
        "nonmembers": files / "nonmember.jsonl",
        "utility": files / "questions.jsonl",
        "max_new_tokens": 5,
        "batch_size": 2,
        "out": out,
    }
    return [part for name, value in given.items() for part in (f"--{name}", str(value))]


def test_the_command_on_two_processes_gives_what_one_gives(files: Path, tmp_path: Path) -> None:
    one = run_evaluate(parse_config(EvaluateConfig, words(files, tmp_path / "one")))
    two = run_forked(ROOT / "scripts" / "evaluate.py", *words(files, tmp_path / "two"), launch="cpu2_ddp")
    assert two.returncode == 0, two.stderr[-2000:]
    results = [json.loads((tmp_path / name / "scores.json").read_text()) for name in ("one", "two")]
    for result in results:
        result.pop("seconds")
    assert results[0] == results[1]
    for name in ("forget.jsonl", "retain.jsonl"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    direct = evaluate(model(), ASKED, max_new_tokens=5, batch_size=2)
    assert direct.scores == one.scores
    assert two.stdout.count(table(one)) == 1  # one process prints
    with pytest.raises(UserError, match="already holds a run"):
        run_evaluate(parse_config(EvaluateConfig, words(files, tmp_path / "one")))


def test_what_was_calibrated_on_is_no_nonmember(files: Path, tmp_path: Path) -> None:
    texts = (files / "nonmember.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "calibration.jsonl").write_text(texts[1])
    plain = parse_config(EvaluateConfig, words(files, tmp_path / "plain"))
    less = parse_config(
        EvaluateConfig, [*words(files, tmp_path / "less"), "--calibration", str(tmp_path / "calibration.jsonl")]
    )
    every, some = (run_evaluate(config).nonmember_losses for config in (plain, less))
    assert some == pytest.approx((*every[:1], *every[2:]), rel=1e-5)


def test_a_broken_run_goes_on(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = EvaluateConfig(
        model=dataclasses.replace(EvaluateConfig().model, path=str(files / "model"), device="cpu"),
        forget=str(files / "forget.jsonl"),
        retain=str(files / "retain.jsonl"),
        members=str(files / "member.jsonl"),
        nonmembers=str(files / "nonmember.jsonl"),
        utility=None,
        max_new_tokens=3,
        out=str(tmp_path / "run"),
    )
    with monkeypatch.context() as patch:
        patch.setattr(membership, "document_losses", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("power cut")))
        with pytest.raises(RuntimeError, match="power cut"):
            run_evaluate(config)
    before = (tmp_path / "run" / "retain.jsonl").stat().st_mtime_ns
    result = run_evaluate(dataclasses.replace(config, resume=True))
    assert (tmp_path / "run" / "retain.jsonl").stat().st_mtime_ns == before
    assert not math.isnan(result.scores.task_aggregate)
    assert (tmp_path / "run" / "scores.json").exists()


def test_other_documents_or_questions_behind_the_same_names_are_refused(files: Path, tmp_path: Path) -> None:
    moved = {}
    for name in ("nonmember", "questions"):
        moved[name] = tmp_path / f"{name}.jsonl"
        moved[name].write_text((files / f"{name}.jsonl").read_text())
    given = words(files, tmp_path / "run")
    given[given.index("--nonmembers") + 1], given[given.index("--utility") + 1] = map(str, moved.values())
    config = parse_config(EvaluateConfig, given)
    run_evaluate(config)
    for path, field in zip(moved.values(), ("document", "question"), strict=True):
        kept = path.read_text()
        first, *others = (json.loads(line) for line in kept.splitlines())
        first[field] += " now"
        path.write_text("".join(json.dumps(each) + "\n" for each in (first, *others)))
        with pytest.raises(UserError, match="data changed since it began"):
            run_evaluate(dataclasses.replace(config, resume=True))
        path.write_text(kept)
    run_evaluate(dataclasses.replace(config, resume=True))


def test_a_missing_file_is_one_line_before_the_model_loads(files: Path, tmp_path: Path) -> None:
    config = EvaluateConfig(
        forget=str(files / "forgte.jsonl"),
        retain=str(files / "retain.jsonl"),
        members=None,
        nonmembers=None,
        utility=None,
        out=str(tmp_path / "out"),
    )
    with pytest.raises(UserError, match=r"did you mean 'forget\.jsonl'"):
        read_set(config)
    with pytest.raises(UserError, match=r"forgte\.jsonl does not exist"):
        run_evaluate(config)
    assert not (tmp_path / "out").exists()


def test_built_in_parts_are_not_mixed_with_other_data(files: Path) -> None:
    with pytest.raises(UserError, match="retain is builtin:retain but forget is"):
        EvaluateConfig(forget=str(files / "forget.jsonl"))
    with pytest.raises(UserError, match="null to leave it out"):
        EvaluateConfig(forget=str(files / "forget.jsonl"), retain=str(files / "retain.jsonl"))


def test_tasks_are_checked_before_anything_is_generated(tmp_path: Path) -> None:
    for side in ("forget", "retain"):
        row = {"id": f"{side}1qa0", "input": "Who?", "output": "Ada", "task": "privacy"}
        (tmp_path / f"{side}.jsonl").write_text(json.dumps(row) + "\n")
    config = EvaluateConfig(
        forget=str(tmp_path / "forget.jsonl"),
        retain=str(tmp_path / "retain.jsonl"),
        members=None,
        nonmembers=None,
        utility=None,
    )
    with pytest.raises(UserError, match='task "privacy"'):
        read_set(config)


def test_nan_losses_end_in_a_sentence() -> None:
    subject = model()
    with torch.no_grad():
        subject.model.lm_head.weight[5] = np.inf
    with pytest.raises(UserError, match="NaN: the model is broken"):
        evaluate(subject, ASKED, max_new_tokens=1)
