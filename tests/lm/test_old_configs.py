"""Configs of before: every kind of old word is read as the one of today, with a notice where a name has changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest

from lm.config import as_dict, as_of_today, parse_config
from lm.errors import UserError
from lm.model import ModelSpec
from lm.old_configs import class_name, say, upgraded, upgraded_words
from unlearn.attacks.relearning import Relearning
from unlearn.objectives import NPO
from unlearn.report.runs.models import model_names


class Drink:
    """An axis."""

    config_axis: ClassVar[bool] = True


@dataclass(frozen=True)
class Tea(Drink):
    """Was called Infusion, and its `minutes` were `time`."""

    formerly: ClassVar[tuple[str, ...]] = ("Infusion",)
    old_keys: ClassVar[Mapping[str, str]] = {"time": "minutes"}

    minutes: int = 3
    """How long."""


@dataclass(frozen=True)
class Water(Drink):
    """Was always called that."""


@dataclass(frozen=True, kw_only=True)
class Cup:
    """What was a flat key of the table is nested here."""

    old_values: ClassVar[Mapping[str, Mapping[str, str]]] = {"color": {"grey": "gray"}}
    short_keys: ClassVar[Mapping[str, str]] = {}

    color: str = "white"
    """Of the glaze."""
    count: int = 1
    """How many."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A config."""

    old_keys: ClassVar[Mapping[str, str]] = {"number": "cups.count", "beverage": "drink"}

    cups: Cup = field(default_factory=Cup)
    """The cups."""
    drink: Drink = Tea()
    """What is in them."""
    others: tuple[Cup, ...] = ()
    """More cups."""


def test_keys_classes_and_values_of_before_are_those_of_today_with_a_notice_each() -> None:
    old = {
        "number": 4,
        "cups": {"color": "grey"},
        "beverage": {"class_path": "lm.drinks.Infusion", "init_args": {"time": 5}},
        "others": [{"color": "grey"}, {"color": "red"}],
    }
    notices: list[str] = []
    assert upgraded(old, Table, notices) == {
        "cups": {"color": "gray", "count": 4},
        "drink": {"class_path": "Tea", "init_args": {"minutes": 5}},
        "others": [{"color": "gray"}, {"color": "red"}],
    }
    for before, now in (("number", "cups.count"), ("beverage", "drink"), ("grey", "gray"), ("Infusion", "Tea")):
        assert f"{before} is called {now} now; the old name is still read" in notices
    assert "drink.time is called drink.minutes now; the old name is still read" in notices


def test_what_was_given_is_left_alone_and_what_is_of_today_gives_no_notice() -> None:
    old = {"number": 4, "cups": {}}
    upgraded(old, Table)
    assert old == {"number": 4, "cups": {}}
    today = {"cups": {"count": 2}, "drink": {"class_path": "Water"}}
    notices: list[str] = []
    assert upgraded(today, Table, notices) == today
    assert notices == []


def test_the_key_of_today_wins_over_the_old_one() -> None:
    assert upgraded({"number": 4, "cups": {"count": 2}}, Table) == {"cups": {"count": 2}}


def test_what_is_not_understood_is_left_for_the_parser_to_refuse() -> None:
    odd = {"drink": {"class_path": "mine.Juice"}, "cups": 3, "colour": "red"}
    assert upgraded(odd, Table) == odd
    assert upgraded("no mapping", Table) == "no mapping"


def test_words_of_the_command_line_are_read_alike() -> None:
    notices: list[str] = []
    words = ["--number", "4", "--cups.color=grey", "--beverage", "lm.drinks.Infusion", "--beverage.time", "5"]
    assert upgraded_words(words, Table, notices) == [
        "--cups.count", "4", "--cups.color=gray", "--drink", "Tea", "--drink.minutes", "5",
    ]  # fmt: skip
    assert "beverage is called drink now; the old name is still read" in notices


def test_a_file_and_words_of_before_make_the_config_of_today(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "old.yaml"
    path.write_text("number: 4\nbeverage: {class_path: Infusion, init_args: {time: 5}}\n")
    config = parse_config(Table, ["--config", str(path), "--cups.color", "grey"])
    assert config == Table(cups=Cup(color="gray", count=4), drink=Tea(minutes=5))
    notices = capsys.readouterr().err.splitlines()
    assert "notice: number is called cups.count now; the old name is still read" in notices
    assert len(notices) == len(set(notices)) == 4 + 1
    with pytest.raises(UserError, match="numbr"):
        parse_config(Table, ["--numbr", "4"])


def test_what_a_saved_config_is_too_young_for_has_its_default_at_any_depth() -> None:
    saved = {
        "cups": {"count": 2},
        "drink": {"class_path": class_name(Tea), "init_args": {}},
        "others": [{"color": "grey"}, {}],
    }
    today = Table(cups=Cup(count=2), drink=Tea(), others=(Cup(color="gray"), Cup()))
    assert as_of_today(saved, Table) == as_dict(today)
    assert as_of_today({}, Table) == as_dict(Table())
    assert as_of_today(as_dict(today), Table) == as_dict(today)
    odd = {"drink": {"class_path": "mine.Juice"}, "cups": 3, "colour": "red"}
    assert as_of_today(odd, Table) == {**odd, "others": []}, "what is not understood stays"


def test_one_choice_that_was_saved_with_its_class_is_read_alike() -> None:
    saved = {"class_path": "unlearn.attacks.relearning.Relearning", "init_args": {"steps": 30}}
    assert as_of_today(saved, Relearning) == as_dict(Relearning(steps=30))
    assert upgraded({"class_path": "lm.drinks.Infusion", "init_args": {"time": 5}}, NPO)["class_path"] != "Tea"


def test_the_built_in_models_of_before_are_those_of_today(capsys: pytest.CaptureFixture[str]) -> None:
    for before, now in (("retain_only", "retain_model"), ("memorised", "memorized")):
        assert parse_config(ModelSpec, ["--path", f"builtin:{before}"]).path == f"builtin:{now}"
        assert f"notice: builtin:{before} is called builtin:{now} now" in capsys.readouterr().err
    assert model_names("builtin:memorised") == model_names("builtin:memorized") == model_names("builtin")


def test_a_notice_is_said_once_each(capsys: pytest.CaptureFixture[str]) -> None:
    say(["a", "b", "a"])
    assert capsys.readouterr().err == "notice: a\nnotice: b\n"


def test_own_classes_are_named_bare_and_others_with_their_module() -> None:
    assert class_name(NPO) == "NPO"
    assert class_name(Path) == f"{Path.__module__}.Path"
