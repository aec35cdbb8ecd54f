"""Forgotten, retained and never-seen people beside each other: who is asked, and what it comes to, by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import unlearn
from lm.data.rows import Row
from lm.errors import UserError
from lm.model import ModelSpec
from lm.row_files import load_rows
from tests.unlearn.attacks.test_attack import FEW, people
from tests.unlearn.attacks.test_attack_parts import comparison, row
from unlearn.attacks import AttackConfig, Relearning, run_attack
from unlearn.attacks.base import Trial
from unlearn.attacks.comparison.audit import Audit, Group, People
from unlearn.attacks.others import others_of
from unlearn.attacks.result import AttackResult

Cell = tuple[str, str]
QA, SC = ("Task2", "qa"), ("Task2", "sc")


def group(rows: list[tuple[str, Cell, float, float]]) -> People:
    """Each row: person, cell, the log-probability of the unlearned model after the attack, that of the retain model."""

    def values(model: int) -> dict[Any, Any]:
        after = np.array([each[2 + model] for each in rows], dtype=float)
        both = np.stack([after - 1, after], axis=1)
        return {"log_probability": both, "score": np.exp(both)}

    return People(
        documents=tuple(each[0] for each in rows),
        cells=tuple(each[1] for each in rows),
        values={"unlearned": values(0), "retain_model": values(1)},
    )


def audit(retain_model: bool = True) -> Audit:
    """Three forgotten questions and a completion; never-seen people have both; a forgotten story has no counterpart."""
    told = 1.0 if retain_model else np.nan
    groups: dict[Group, People] = {
        "forgotten": group(
            [
                ("a", QA, -1.0, -4.0 * told),
                ("a", QA, -2.0, -5.0 * told),
                ("b", QA, -3.0, -6.0 * told),
                ("b", SC, -1.0, -2.0 * told),
                ("c", ("Task1", "sc"), 50.0, 50.0 * told),
            ]
        ),
        "retained": group([("d", QA, -0.5, -0.5 * told)]),
        "unseen": group([("e", QA, -5.0, -5.0 * told), ("f", QA, -7.0, -6.0 * told), ("f", SC, -3.0, -2.5 * told)]),
    }
    return Audit(title="other_people", groups=groups)


def test_groups_are_weighed_by_the_forgotten_rows_of_each_task_and_kind() -> None:
    one = audit()
    assert one.weights == {QA: 3, SC: 1}
    assert one.left_out == 1
    assert one.mean("forgotten", "unlearned", "log_probability", 1)[0] == pytest.approx((3 * -2 + -1) / 4)
    assert one.mean("unseen", "unlearned", "log_probability", 1)[0] == pytest.approx((3 * -6 + -3) / 4)
    retained = one.mean("retained", "unlearned", "log_probability", 1)
    assert retained[0] == pytest.approx(-0.5), "it has no completion, so its questions are all"
    assert np.isnan(retained[1:]).all(), "of one person there is no interval"
    assert one.mean("unseen", "retain_model", "score", 0)[0] == pytest.approx(
        (3 * (np.exp(-6.0) + np.exp(-7.0)) / 2 + np.exp(-3.5)) / 4
    )


def test_the_residue_is_what_the_retain_model_does_not_explain() -> None:
    after = audit().residue(1)
    assert after.unlearned == pytest.approx((3 * (-2 + 6) + (-1 + 3)) / 4)
    assert after.retain_model == pytest.approx((3 * (-5 + 5.5) + (-2 + 2.5)) / 4)
    assert after.mean == pytest.approx(after.unlearned - after.retain_model)
    assert after.low <= after.mean < after.high, "of two people on a side"
    assert audit().residue(0).mean == pytest.approx(after.mean), "both are one nat lower before"
    assert audit().sentence.startswith(
        "After the attack (other people) forgotten answers are 3.50 nats a token likelier than those of people it never saw "
        "(the retain model: +0.50): a residue of +3.00 (95% interval "
    )


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    held = 0
    for seed in range(200):
        draw = np.random.default_rng(seed)
        groups: dict[Group, People] = {}
        for name, mean, count in (("forgotten", 1.0, 25), ("retained", 0.0, 2), ("unseen", 0.0, 30)):
            own = draw.normal(mean, 1, count)  # what a person's rows have in common
            rows = [
                (f"{place}", cell, own[place] + draw.normal(0, 0.3), 0.0) for place in range(count) for cell in (QA, SC)
            ]
            groups[name] = group(rows)  # type: ignore[index]
        found = Audit(title="", groups=groups, seed=seed).residue(1)
        held += found.low <= 1.0 <= found.high
    assert 176 <= held <= 198


def test_without_a_retain_model_there_is_no_residue() -> None:
    alone = audit(retain_model=False)
    assert np.isnan(alone.residue(1).mean)
    assert "only a retain model could tell" in alone.sentence
    assert "retain model" not in alone.table()
    assert json.loads(json.dumps(alone.to_json()))["residue"]["after"]["mean"] is None


def test_who_is_asked_beside_the_forgotten() -> None:
    forget, retain, unseen = (load_rows(f"builtin:{part}") for part in ("forget", "retain", "held_out"))
    few = tuple(one for one in forget if one.document in {each.document for each in forget[:60]})
    others = others_of(few, retain, unseen)
    assert {(one.task, one.kind) for one in others.rows} == {(one.task, one.kind) for one in few}
    for task in {one.task for one in few}:
        have = [len({one.document for one in rows if one.task == task}) for rows in (few, others.retained)]
        assert have[0] == have[1]
    assert others_of(few, retain, unseen) == others
    assert others_of(few, retain, unseen, seed=1) != others
    assert others_of(few, retain, ()).rows == ()
    trial = others.beside(Trial("retain", 0, given=retain, asked=few))
    assert trial.beside == others.unseen, "what the attacker was given is not asked"
    told = others.beside(Trial("other_people", 0, given=(row("x1qa0", answer=others.unseen[0].output),), asked=few))
    assert others.unseen[0] not in told.beside, "nor what a given row tells"


@pytest.mark.parametrize(
    ("unseen", "said"),
    [
        ((row("aqa0", "Where?", "Varn"),), "row aqa0 of unseen is a forget row too"),
        ((row("xqa0", "Who?", "Bo"),), "row xqa0 of unseen is a retain row too"),
        (
            (Row(id="xsc0", input="a", output="b", task="Task1"),),
            r"a task and kind of the forget rows \(Task2 \(qa\)\)",
        ),
    ],
)
def test_who_was_seen_is_not_unseen(unseen: tuple[Row, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        others_of([row("aqa0")], [row("bqa0", "Who?", "Bo")], unseen)


@pytest.fixture
def world(tiny: Path, tmp_path: Path) -> AttackConfig:
    for name, first, count in (("forget", 10, 6), ("retain", 40, 8), ("unseen", 70, 5)):
        rows = people(first, count)
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    spec = ModelSpec(path=str(tiny / "model"), device="cpu")
    return AttackConfig(
        model=spec,
        retain_model=spec,
        forget=str(tmp_path / "forget.jsonl"),
        retain=str(tmp_path / "retain.jsonl"),
        unseen=str(tmp_path / "unseen.jsonl"),
        attack=replace(FEW, given=("other_people", "retain")),
        seeds=(0, 1),
        max_new_tokens=4,
        out=str(tmp_path / "run"),
    )


def test_an_attack_asks_the_unseen_before_and_at_its_end(world: AttackConfig, tmp_path: Path) -> None:
    result = run_attack(world)
    forget, unseen = load_rows(world.forget), load_rows(str(world.unseen))
    first = result.audits[0]
    assert first is not None
    assert {name: len(each.cells) for name, each in first.groups.items()} == {
        "forgotten": 24,
        "retained": 24,
        "unseen": 20,
    }
    assert first.residue(1).mean == 0.0, "both models are the same one"
    given_retain = result.audits[1]
    assert given_retain is not None
    assert given_retain.people("retained") == 0
    for seed in world.seeds:
        folder = tmp_path / f"run/retain/seed-{seed}/unlearned"
        counts = [len(json.loads((folder / f"answers-00000{step}.json").read_text())) for step in (2, 4)]
        assert counts == [len(forget), len(forget) + len(unseen)]
    said = {
        answer["id"]: answer["log_probability"]
        for answer in json.loads((tmp_path / "run/before-unlearned-others.json").read_text())
    }
    before = given_retain.mean("unseen", "unlearned", "log_probability", 0)[0]
    by_kind = [
        np.mean([said[each.id] for each in unseen if each.kind == kind]) * share
        for kind, share in (("qa", 0.75), ("sc", 0.25))
    ]
    assert before == pytest.approx(sum(by_kind))
    told = json.loads((tmp_path / "run/attack.json").read_text())
    assert told["residue"]["after"]["mean"] == 0.0
    assert told["trials"][0]["audit"]["groups"]["unseen"]["people"] == 5
    assert result.residue_sentence in str(result)
    again = run_attack(replace(world, resume=True))
    assert again.to_json() == result.to_json()


def test_the_same_in_memory(world: AttackConfig) -> None:
    staged = run_attack(world)
    held = unlearn.attack(
        world.model.path,
        world.forget,
        world.retain,
        unseen=str(world.unseen),
        retain_model=world.retain_model.path,
        method=world.attack,
        seeds=world.seeds,
        max_new_tokens=4,
    )
    assert held.to_json() == staged.to_json()


def test_the_unseen_are_not_given(world: AttackConfig) -> None:
    attack = replace(FEW, given=("unrelated",), unrelated=str(world.unseen))
    with pytest.raises(UserError, match=r"row p70sc1 of unseen is given to the attacker \(unrelated\)"):
        run_attack(replace(world, attack=attack))
    assert not Path(world.out).exists()


def test_the_residue_is_that_of_the_attack_that_leaves_most() -> None:
    mild = audit()
    forgotten = mild.groups["forgotten"]
    ahead = {measure: values + 1 for measure, values in forgotten.values["unlearned"].items()}
    harsher = replace(forgotten, values={**forgotten.values, "unlearned": ahead})
    harsh = replace(mild, title="retain", groups={**mild.groups, "forgotten": harsher})
    curves = comparison((0, 0), (0, 0))
    named = (curves, replace(curves, name="retain", learning_rate=3e-4))
    result = AttackResult(Relearning(), named, (mild, harsh))
    assert result.residue is not None
    assert result.residue[1].mean == pytest.approx(4.0)
    told = result.to_json()["residue"]
    assert (told["given"], told["learning_rate"]) == ("retain", 3e-4)
    assert told["after"]["mean"] == pytest.approx(4.0)
