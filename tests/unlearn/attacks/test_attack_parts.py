"""What the attacker is given and what is asked, and what a pair of curves comes to: by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lm.data.rows import Row
from lm.errors import UserError
from lm.row_files import load_rows
from unlearn.attacks.base import AttackSettings
from unlearn.attacks.comparison.curves import Comparison, mean_over_trials
from unlearn.attacks.comparison.picture import curves_picture
from unlearn.attacks.comparison.worst import worst_of
from unlearn.attacks.relearning import Relearning
from unlearn.attacks.result import AttackResult
from unlearn.attacks.splits import check_apart, check_some, other_people, same_people, without_told

FORGET = load_rows("builtin:forget")


def row(name: str, prompt: str = "Who?", answer: str = "Ada") -> Row:
    return Row(id=name, input=prompt, output=answer, task="Task2")


@pytest.mark.parametrize("share", [0.01, 0.25, 0.6])
def test_some_people_are_given_whole_and_the_others_asked(share: float) -> None:
    given, asked = other_people(FORGET, share, seed=0)
    assert sorted(row.id for row in (*given, *asked)) == sorted(row.id for row in FORGET)
    people = [{row.document for row in side} for side in (given, asked)]
    assert not people[0] & people[1]
    for task in ("Task1", "Task2", "Task3"):
        have = [len({row.document for row in side if row.task == task}) for side in (given, FORGET)]
        assert have[0] == max(1, round(share * have[1]))
    assert other_people(FORGET, share, seed=0) == (given, asked)
    assert other_people(FORGET, share, seed=1) != (given, asked)
    assert set(other_people(FORGET[::-1], share, seed=0)[0]) == set(given), "whatever the order of the rows"


@pytest.mark.parametrize(("share", "each"), [(0.01, 1), (0.4, 2), (0.99, 4)])
def test_of_the_same_people_other_questions_are_asked(share: float, each: int) -> None:
    given, asked = same_people(FORGET, share, seed=0)
    assert {row.kind for row in (*given, *asked)} == {"qa"}, "a completion holds the answers"
    assert {row.task for row in (*given, *asked)} == {"Task2"}, "the others have a single question"
    assert not {row.id for row in given} & {row.id for row in asked}
    for person in {row.document for row in FORGET if row.task == "Task2"}:
        assert [sum(row.document == person for row in side) for side in (given, asked)] == [each, 5 - each]
    assert same_people(FORGET, share, seed=1)[0] != given


def test_an_answer_that_a_given_row_tells_is_not_asked() -> None:
    given = [row("a1sc1", "Her phone number is", "064-898-6309, in Varn.")]
    asked = [row("b1qa0", answer="0648986309"), row("b1qa1", answer="VARN"), row("b1qa2", answer="Stonedale")]
    assert [one.id for one in without_told(given, asked)] == ["b1qa2"]
    assert without_told(given, [row("c1qa0", answer="?!")]), "what has neither letters nor digits is told by nothing"


def test_a_row_is_not_both_given_and_asked() -> None:
    with pytest.raises(UserError, match='row "a"qa0 is both given to the attacker'):
        check_apart([row("aqa0")], [row('"a"qa0', "Where?", "Varn")], "retain")
    with pytest.raises(UserError, match="row bqa0 is both given"):
        check_apart([row("aqa0")], [row("bqa0")], "retain")
    check_apart([row("aqa0")], [row("bqa0", answer="Bo")], "retain")
    with pytest.raises(UserError, match="no row to give"):
        check_some([], [row("aqa0")], "same_people")
    with pytest.raises(UserError, match="no row to ask for"):
        check_some([row("aqa0")], [], "same_people")


def test_every_trial_of_the_builtin_world_asks_nothing_that_was_given() -> None:
    trials = Relearning().trials(FORGET, load_rows("builtin:retain"), AttackSettings(seeds=(0, 1)))
    assert [(one.name, one.seed) for one in trials] == [
        (name, seed) for name in ("other_people", "same_people", "retain", "unrelated") for seed in (0, 1)
    ]
    for one in trials:
        assert not {row.id for row in one.given} & {row.id for row in one.asked}
        assert {row.id for row in one.asked} <= {row.id for row in FORGET}
        assert one.told == 0, "nobody shares an answer in the built-in world"


def test_levels_are_the_stated_steps() -> None:
    assert Relearning(steps=10, every=5).levels == (0, 5, 10)
    assert Relearning(steps=10, every=4).levels == (0, 4, 8, 10)


def comparison(unlearned: Any, retain_model: Any, *, documents: int = 40, margin: float = 0.1) -> Comparison:
    """Two rows a document, two levels; each argument (rows, 2) or a pair that holds for all rows."""
    rows = 2 * documents
    values = [np.broadcast_to(np.asarray(one, dtype=float), (rows, 2)) for one in (unlearned, retain_model)]
    return Comparison(
        name="other_people",
        levels=(0, 10),
        ids=tuple(f"{place}" for place in range(rows)),
        documents=tuple(f"p{place // 2}" for place in range(rows)),
        kinds=("qa", "sc") * documents,
        unlearned=values[0],
        retain_model=values[1],
        unlearned_log=values[0] - 3,
        retain_model_log=values[1] - 5,
        given=4,
        told=0,
        margin=margin,
    )


def test_verdicts() -> None:
    split = np.repeat([[0.0, 1.0], [0.0, 0.0]], 40, axis=0)  # half of the people say everything
    assert comparison((0, 0.5), (0, 0)).verdict == "more"
    assert comparison((0, 0), (0, 0.5)).verdict == "less"
    assert comparison((0, 0.3), (0, 0.3)).verdict == "as much"
    small = comparison((0, 0.33), (0, 0.3))
    assert small.verdict == "a little more", "below the margin, but not by chance"
    assert comparison((0, 0.33), (0, 0.3), documents=20).verdict == "a little more", "which few people show too"
    assert comparison((0, 0.3), (0, 0.33)).verdict == "as much", "a little less is no sign of anything"
    assert comparison((0, 0.3), (0, 0.3)).why.endswith("less than 0.1 counts as none.")
    assert comparison(split, split[::-1]).verdict == "cannot tell"
    assert comparison(split, (0, 0)).verdict == "more"
    few = comparison((0, 0), (0, 0), documents=20)
    assert few.verdict == "cannot tell"
    assert "20 people are too few to rule out a share of 0.1" in few.why
    assert comparison((0, 0), (0, 0), documents=20, margin=0.2).verdict == "as much"
    assert comparison((0, 1), (0, 0), documents=1).verdict == "cannot tell", "of one person there is no interval"
    knew = comparison((1, 1), (0.9, 0.9))
    assert knew.verdict == "cannot tell"
    assert "which should not know them, says 0.90" in knew.why


def test_level_and_speed_are_told_apart() -> None:
    """A flat curve above the retain model's is a level that no training brought: it is not "faster"."""
    flat = comparison((0.3, 0.3), (0, 0))
    assert flat.verdict == "more"
    assert flat.gain == (0, 0, 0)
    assert flat.speed.startswith("From before the attack on it gains as much as the retain model (+0.000")
    assert "faster" not in flat.sentence(Relearning.words)
    rising = comparison((0.25, 0.5), (0.0, 0.125))
    assert rising.gain == (0.125, 0.125, 0.125)
    assert rising.speed in rising.sentence(Relearning.words)
    assert rising.speed.startswith("From before the attack on it gains more than the retain model (+0.125")
    assert "gains less" in comparison((0.3, 0.3), (0, 0.3)).speed
    assert rising.to_json()["gain"] == {"mean": 0.125, "low": 0.125, "high": 0.125}
    split = np.repeat([[0.0, 1.0], [0.0, 0.0]], 40, axis=0)
    assert comparison(split, split[::-1]).speed.startswith("Whether it gains more")
    assert comparison((0, 1), (0, 0), documents=1).speed == ""


def test_numbers_by_hand() -> None:
    one = comparison((0.25, 0.5), (0.0, 0.125))
    assert one.excess == (0.375, 0.375, 0.375), "the level before the attack does not count"
    mean, low, high = one.difference()
    assert mean.tolist() == low.tolist() == high.tolist() == [0.25, 0.375]
    assert one.people == 40
    told = one.to_json()
    assert told["curves"]["unlearned"] == {"qa": [0.25, 0.5], "sc": [0.25, 0.5], "all": [0.25, 0.5]}
    assert one.sentence(Relearning.words).endswith(
        "Under it the true answers are 2.25 nats a token more likely than under the other before the attack, and 2.38 nats a "
        "token more likely at its end."
    )
    assert "are 2.00 nats a token less likely" in comparison((0, 0), (4, 0)).likelihood
    assert one.sentence(Relearning.words).startswith(
        "other_people: the unlearned model says more in training than the retain model"
    )
    assert one.table("steps").splitlines()[-1].split()[:3] == ["10", "0.500", "0.125"]
    assert curves_picture([one, one], "steps").startswith(b"\x89PNG")


def test_every_rate_is_tried_with_everything_that_is_given() -> None:
    both = Relearning(given=("other_people", "retain"), learning_rate=(3e-4, 6e-4), steps=120, every=40)
    trials = both.trials(FORGET, load_rows("builtin:retain"), AttackSettings(seeds=(0, 1)))
    assert [one.folder for one in trials] == [
        f"{name}/rate-{rate}/seed-{seed}"
        for name in ("other_people", "retain")
        for rate in ("0.0003", "0.0006")
        for seed in (0, 1)
    ]
    for one in trials:
        told = both.at(one.learning_rate).trainer(one.seed)
        assert (told.learning_rate, told.seed, told.schedule) == (one.learning_rate, one.seed, "constant")
    alone = replace(both, learning_rate=3e-4).trials(FORGET, load_rows("builtin:retain"), AttackSettings(seeds=(0,)))
    assert [one.folder for one in alone] == ["other_people/seed-0", "retain/seed-0"], "where runs of one rate have them"
    assert [one.learning_rate for one in alone] == [3e-4, 3e-4]
    with pytest.raises(UserError, match="a trial names none"):
        both.at(None)


def test_the_worst_is_the_largest_gap_of_any_level() -> None:
    mild = replace(comparison((0, 0.2), (0, 0.1)), learning_rate=3e-4)
    harsh = replace(comparison((0.9, 0.5), (0.0, 0.1)), learning_rate=6e-4, variant="rate 0.0006")
    result = AttackResult(Relearning(), (mild, harsh))
    assert result.worst is not None
    told = result.to_json()["worst"]
    assert told["gap"] == pytest.approx(0.4), "not the 0.9 before any attack"
    assert told["low"] == pytest.approx(0.4)
    assert (told["given"], told["learning_rate"], told["steps"]) == ("other_people", 6e-4, 10)
    assert result.worst_sentence == (
        "At worst (other people given at rate 0.0006, after 10 steps) the unlearned model scores +0.400 beyond the retain model "
        "(95% interval +0.400 to +0.400)."
    )
    assert str(result).endswith(result.worst_sentence)
    assert [one["title"] for one in result.to_json()["trials"]] == ["other_people", "other_people, rate 0.0006"]
    assert curves_picture(result.comparisons, "steps", result.worst).startswith(b"\x89PNG")
    alone, knew = comparison((0, 1), (np.nan, np.nan)), comparison((0, 1), (0.9, 0.9))
    assert worst_of([alone, knew]) is None, "no retain model, or one that knew the answers"
    nobody = AttackResult(Relearning(), (alone,))
    assert nobody.to_json()["worst"] is None
    assert nobody.worst_sentence == ""


def test_rows_of_a_person_are_drawn_together() -> None:
    alike = np.repeat(np.arange(40) % 2, 2)[:, None] * [0.0, 1.0]
    mixed = (np.arange(80) % 2)[:, None] * [0.0, 1.0]
    widths = [one.excess[2] - one.excess[1] for one in (comparison(alike, (0, 0)), comparison(mixed, (0, 0)))]
    assert widths[0] > 0.1
    assert widths[1] == 0, "every person says half"


def test_a_row_counts_in_the_trials_that_asked_it() -> None:
    trials = [{"a": [0.0, 1.0], "b": [0.0, 0.5]}, {"a": [1.0, 1.0]}]
    assert mean_over_trials(trials, ["a", "b"]).tolist() == [[0.5, 1.0], [0.0, 0.5]]
