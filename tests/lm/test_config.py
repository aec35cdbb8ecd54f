"""Configs: files, dotted overrides, axes; and mistakes refused with the nearest right name."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import pytest
import yaml

from lm.config import _attribute_docs, _fields, dump_yaml, known_or_near, parse_config
from lm.errors import UserError
from lm.old_configs import subclasses
from tests.forked import run_forked

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class Flavor:
    """An axis."""

    config_axis: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class Sweet(Flavor):
    """Sweet."""

    sugar: float = 1.0
    """Spoons."""
    strength: float | None = None
    """A setting of both, with another default."""


@dataclass(frozen=True, kw_only=True)
class Sour(Flavor):
    """Sour."""

    lemons: int = 2
    """Whole lemons."""
    strength: float | None = 8.0
    """A setting of both, with another default."""


@dataclass(frozen=True, kw_only=True)
class Cup:
    """A cup."""

    size: Literal["small", "large"] = "small"
    """How large."""


@dataclass(frozen=True, kw_only=True)
class Tea:
    """A tea."""

    cup: Cup = field(default_factory=Cup)
    """The cup."""
    flavor: Flavor = field(default_factory=Sour)
    """The flavor."""
    minutes: int = 3
    """How long."""
    layers: tuple[int, ...] | None = None
    """Some layers."""

    def __post_init__(self) -> None:
        if self.minutes < 1:
            raise UserError(f"minutes is {self.minutes}; give at least 1")


def test_defaults_file_and_overrides_in_that_order(tmp_path: Path) -> None:
    assert parse_config(Tea, []) == Tea()
    file = tmp_path / "tea.yaml"
    file.write_text("minutes: 5\ncup: {size: large}\nflavor: {class_path: Sweet, init_args: {sugar: 3}}\n")
    read = parse_config(Tea, ["--config", str(file), "--minutes", "7", "--layers", "[1, 2]"])
    assert read == Tea(cup=Cup(size="large"), flavor=Sweet(sugar=3.0), minutes=7, layers=(1, 2))


@dataclass(frozen=True, kw_only=True)
class Basket:
    """A basket."""

    layers: tuple[int, ...] | None = None
    """What is on what."""


@dataclass(frozen=True, kw_only=True)
class Picnic:
    """A picnic."""

    places: tuple[str, ...] = ("park",)
    """Where."""
    days: tuple[int, ...] | Literal["all"] | None = None
    """When."""
    cups: tuple[Literal["small", "large"], ...] | None = None
    """Of what."""
    price: float | tuple[float, ...] = 1.0
    """One, or several."""
    basket: Basket = field(default_factory=Basket)
    """With it."""


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--places", "resid.4"], Picnic(places=("resid.4",))),
        (["--places=a, b"], Picnic(places=("a, b",))),
        (["--places", "[a, b]"], Picnic(places=("a", "b"))),
        (["--days", "1"], Picnic(days=(1,))),
        (["--days", "all"], Picnic(days="all")),
        (["--days", "null"], Picnic()),
        (["--cups", "large"], Picnic(cups=("large",))),
        (["--price", "2"], Picnic(price=2.0)),
        (["--basket.layers", "3"], Picnic(basket=Basket(layers=(3,)))),
    ],
)
def test_a_list_of_one_needs_no_brackets(words: list[str], expected: Picnic, tmp_path: Path) -> None:
    assert parse_config(Picnic, words) == expected
    file = tmp_path / "picnic.yaml"
    name, _, value = " ".join(words).removeprefix("--").replace("=", " ", 1).partition(" ")
    value = f'"{value}"' if value == "a, b" else value
    file.write_text(f"basket: {{layers: {value}}}\n" if name == "basket.layers" else f"{name}: {value}\n")
    assert parse_config(Picnic, ["--config", str(file)]) == expected


def test_a_list_of_what_does_not_fit_is_still_refused() -> None:
    with pytest.raises(UserError, match="days"):
        parse_config(Picnic, ["--days", "monday"])


def test_an_axis_is_chosen_by_name_and_its_fields_by_dots() -> None:
    assert parse_config(Tea, ["--flavor", "Sweet", "--flavor.sugar", "0.5"]).flavor == Sweet(sugar=0.5)
    assert parse_config(Tea, ["--flavor.lemons", "9"]).flavor == Sour(lemons=9)


def test_another_class_does_not_inherit_the_settings_of_the_first(tmp_path: Path) -> None:
    assert parse_config(Tea, ["--flavor", "Sweet"]).flavor == Sweet(strength=None)
    (tmp_path / "sweet.yaml").write_text("flavor: {class_path: Sweet}\n")
    assert parse_config(Tea, ["--config", str(tmp_path / "sweet.yaml")]).flavor == Sweet(strength=None)
    (tmp_path / "sour.yaml").write_text("flavor: {class_path: Sour, init_args: {strength: 3}}\n")
    sour = ["--config", str(tmp_path / "sour.yaml")]
    assert parse_config(Tea, [*sour, "--flavor.lemons", "5"]).flavor == Sour(lemons=5, strength=3.0)
    assert parse_config(Tea, [*sour, "--flavor", "Sweet", "--flavor.sugar", "4"]).flavor == Sweet(sugar=4.0)
    assert parse_config(Tea, [f"--config={tmp_path / 'sour.yaml'}", "--flavor", "Sweet"]).flavor == Sweet()


def test_what_is_dumped_is_read_back(tmp_path: Path) -> None:
    tea = Tea(cup=Cup(size="large"), flavor=Sweet(sugar=2.5), layers=(3,))
    (tmp_path / "t.yaml").write_text(dump_yaml(tea))
    assert parse_config(Tea, ["--config", str(tmp_path / "t.yaml")]) == tea


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--minuts", "4"], "did you mean 'minutes'"),
        (["--cup.sise", "large"], "did you mean 'cup.size'"),
        (["--flavor", "Swet"], "did you mean 'Sweet'"),
        (["--flavor.lemon", "1"], "did you mean 'flavor.lemons'"),
        (["--cup.size", "larg"], "did you mean 'large'"),
        (["--minutes", "soon"], "minutes"),
        (["--minutes", "0"], "minutes is 0"),
        (["--config", "no/such.yaml"], "no/such.yaml"),
    ],
)
def test_mistakes_name_the_thing_and_the_remedy(words: list[str], says: str) -> None:
    with pytest.raises(UserError) as refused:
        parse_config(Tea, words)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("minuts: 3", "did you mean 'minutes'"),
        ("flavor: {class_path: Sour, init_args: {lemon: 3}}", "lemons"),
        ("cup: [", "bad.yaml"),
    ],
)
def test_mistakes_in_a_file(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "bad.yaml").write_text(text + "\n")
    with pytest.raises(UserError, match=says):
        parse_config(Tea, ["--config", str(tmp_path / "bad.yaml")])


def test_suggestions_stay_silent_when_nothing_is_near() -> None:
    assert known_or_near("zzz", ["alpha"] * 20) == ""
    assert known_or_near("alhpa", ["alpha", "beta"]) == " (did you mean 'alpha'?)"


@pytest.mark.parametrize("script", sorted(path.stem for path in (ROOT / "scripts").glob("*.py")))
def test_every_script_has_help_that_names_its_settings(script: str) -> None:
    done = run_forked(ROOT / "scripts" / f"{script}.py", "--help")
    assert done.returncode == 0, done.stderr
    assert "--out" in done.stdout
    assert "usage:" in done.stdout


def test_every_setting_has_a_sentence() -> None:
    from sae.trainer import TrainSaeConfig
    from tracing.stages.localize.config import LocalizeConfig
    from tracing.stages.trace.config import TraceConfig
    from unlearn.attacks import AttackConfig
    from unlearn.config import UnlearnConfig
    from unlearn.demo.config import DemoConfig
    from unlearn.evaluation.config import EvaluateConfig

    silent: list[str] = []

    def look(cls: type, prefix: str) -> None:
        said = _attribute_docs(cls)
        for item, hint in _fields(cls):
            if not said.get(item.name):
                silent.append(prefix + item.name)
            for part in (hint, *typing.get_args(hint)):
                inner = [part, *subclasses(part).values()] if getattr(part, "config_axis", False) else [part]
                for one in inner:
                    if dataclasses.is_dataclass(one) and isinstance(one, type):
                        look(one, f"{prefix}{item.name}.")

    for cls in (TraceConfig, LocalizeConfig, UnlearnConfig, DemoConfig, EvaluateConfig, TrainSaeConfig, AttackConfig):
        look(cls, f"{cls.__name__}.")
    assert silent == []


def test_every_shipped_config_is_read_by_its_script() -> None:
    from sae.activations.config import HarvestConfig
    from sae.trainer import TrainSaeConfig
    from tracing.stages.localize.config import LocalizeConfig
    from tracing.stages.trace.config import TraceConfig
    from unlearn.alternates.config import AlternatesConfig
    from unlearn.attacks import AttackConfig
    from unlearn.config import UnlearnConfig
    from unlearn.demo.config import DemoConfig
    from unlearn.evaluation.config import EvaluateConfig
    from unlearn.merging.config import MergeConfig
    from unlearn.search.config import SearchConfig

    kinds = {
        "alternates": AlternatesConfig,
        "merge": MergeConfig,
        "trace": TraceConfig,
        "localize": LocalizeConfig,
        "unlearn": UnlearnConfig,
        "evaluate": EvaluateConfig,
        "sae": TrainSaeConfig,
        "harvest": HarvestConfig,
        "search": SearchConfig,
        "attack": AttackConfig,
    }
    read = 0
    for file in sorted((ROOT / "configs").rglob("*.yaml")):
        if file.parent.name == "accelerate":
            assert yaml.safe_load(file.read_text())["num_processes"] >= 1
            continue
        cls = DemoConfig if file.parent.name == "configs" else kinds[file.parent.name]
        parse_config(cls, ["--config", str(file)])
        read += 1
    assert read >= 4


def test_out_may_begin_at_home_in_a_file_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from unlearn.config import UnlearnConfig

    monkeypatch.setenv("HOME", "/home/ada")
    (tmp_path / "c.yaml").write_text("out: ~/runs/mine\n")
    assert parse_config(UnlearnConfig, ["--config", str(tmp_path / "c.yaml")]).out == "/home/ada/runs/mine"
    assert parse_config(UnlearnConfig, ["--out=~/x"]).out == "/home/ada/x"


def test_a_word_for_an_axis_or_a_mapping_gets_the_setting_and_the_remedy() -> None:
    from unlearn.config import UnlearnConfig

    with pytest.raises(
        UserError, match=r"^objective is 'Jiont' \(did you mean 'Joint'\?\): choose one of .*Joint, .*NPO"
    ):
        parse_config(UnlearnConfig, ["--objective", "Jiont"])
    with pytest.raises(UserError, match=r"^columns is 'question' and takes names with values: write --columns '\{"):
        parse_config(UnlearnConfig, ["--columns", "question"])
