"""From a list of methods and a world to the configs of every stage, each read by the stage's own parser. Nothing runs here."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lm.config import parse_config
from lm.errors import UserError, did_you_mean
from palimpsest.shipped import is_path, shipped_path
from tracing.stages.trace.config import TraceConfig
from unlearn.attacks.config import AttackConfig
from unlearn.config import UnlearnConfig
from unlearn.evaluation.config import EvaluateConfig
from unlearn.export import MODEL
from unlearn.search.plan import words

BUILTIN_ROWS = ("forget", "retain", "calibration", "held_out", "forget_paraphrase", "retain_paraphrase")
BUILTIN_ROWS += ("forget_reworded", "retain_reworded", "utility")
RESERVED = ("base", "retain_model", "trace", "table")
"""Folders beside those of the methods."""
SOURCES = "sources.json"
"""In a world's folder: what it takes from elsewhere, role -> path."""


@dataclass(frozen=True, kw_only=True)
class StageSettings:
    """One stage: where its settings begin, and those that differ. `{role}` in a text stands for what the world has under it."""

    config: str | None = None
    """A YAML file, or the name of one that is shipped for the stage. Null: its defaults."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Dotted settings."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of the table."""

    name: str
    """Of its row and its folder."""
    config: str | None = None
    """A YAML file of its own, in the place of the list's."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Dotted settings of the unlearning stage, over those of the list."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w[\w.+-]*", self.name) or self.name in RESERVED:
            raise UserError(
                f"a method is called {self.name!r}: take letters, digits, _ . + - and none of {', '.join(RESERVED)}"
            )


@dataclass(frozen=True, kw_only=True)
class MethodList:
    """What is compared, and what is the same for all."""

    sources: dict[str, str] = field(default_factory=dict)
    """Role -> path or built-in name, over those of the world."""
    trace: StageSettings = field(default_factory=StageSettings)
    """How the plan is drawn that `{plan}` stands for; traced once, and only if some method asks for it."""
    unlearn: StageSettings = field(default_factory=StageSettings)
    """What every method has."""
    evaluate: StageSettings = field(default_factory=StageSettings)
    """How every model is scored."""
    attack: StageSettings = field(default_factory=StageSettings)
    """How every model is attacked."""
    methods: tuple[Method, ...] = ()
    """The rows."""

    def __post_init__(self) -> None:
        names = [method.name for method in self.methods]
        if not names:
            raise UserError("the list has no methods: name at least one under methods")
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"{names.count(name)} methods are called {name}: give each a name of its own")


@dataclass(frozen=True, kw_only=True)
class Made:
    """The three stages of one method with one seed; no attack if none was asked for."""

    name: str
    folder: Path
    unlearning: UnlearnConfig
    evaluation: EvaluateConfig
    attack: AttackConfig | None


def world_sources(world: str) -> dict[str, str]:
    """The roles of a world, and what stands in them: `memorized`, `retain_model`, and rows by their names.

    Args:
        world: `builtin`; a folder with `memorized`, `retain_model` and `data/NAME.jsonl` as `tools.builtin_model.build` writes
            it, or with a file `sources.json` of roles; `none`: the list has them all.

    Raises:
        UserError: a folder that is not there or holds neither.
    """
    if world == "none":
        return {}
    if world == "builtin":
        return {"memorized": "builtin", "retain_model": "builtin:retain_model"} | {
            name: f"builtin:{name}" for name in BUILTIN_ROWS
        }
    folder = Path(world)
    found: dict[str, str] = {}
    if (folder / SOURCES).is_file():
        found |= json.loads((folder / SOURCES).read_text(encoding="utf-8"))
    found |= {name: str(folder / name) for name in ("memorized", "retain_model") if (folder / name).is_dir()}
    found |= {path.stem: str(path) for path in sorted(folder.glob("data/*.jsonl"))}
    if not found:
        raise UserError(
            f"the world {world} holds no models and no data/*.jsonl: give builtin, or a folder that "
            "python -m tools.builtin_model.build --out FOLDER made"
        )
    return found


@dataclass(frozen=True, kw_only=True)
class Configs:
    """Makes the configs of every stage.

    Attributes:
        methods: the list.
        roles: what `{role}` stands for, the world's and the list's; `plan` and `out` are added.
        out: the folder of everything.
        attack: a YAML file or a shipped name, over the list's; `none` for no attack; None as the list has it.
        settings: of the unlearning stage, over all others.
    """

    methods: MethodList
    roles: Mapping[str, str]
    out: Path
    attack: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        methods: MethodList,
        world: str,
        out: Path,
        *,
        attack: str | None = None,
        sources: Mapping[str, str] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> Configs:
        """Of a list on a world; `sources` over those of both."""
        roles = {"plan": str(out / "trace" / "plan.json"), "out": str(out)}
        roles |= world_sources(world) | methods.sources | dict(sources or {})
        roles = {name: _filled(value, roles) for name, value in roles.items()}  # a source may name another
        return cls(methods=methods, roles=roles, out=out, attack=attack, settings=settings or {})

    @property
    def needs_plan(self) -> bool:
        """Whether some method asks for a plan that is not given."""
        own = self.roles["plan"] == str(self.out / "trace" / "plan.json")
        given = [self.methods.unlearn.settings, *(method.settings for method in self.methods.methods)]
        return own and any("{plan}" in json.dumps(settings) for settings in given)

    def trace(self) -> TraceConfig:
        """Of the tracing that draws the plan."""
        stage, sides = self.methods.trace, [self._role("forget"), self._role("retain")]
        fixed = {"model.path": self._role("memorized"), "facts.sources": sides}
        return self._parse(TraceConfig, "trace", stage.config, fixed, stage.settings, self.out / "trace")

    def unlearning(self, method: Method, seed: int, folder: Path) -> UnlearnConfig:
        """Of one method with one seed."""
        common = self.methods.unlearn
        fixed = {"model.path": self._role("memorized"), **{side: self._role(side) for side in ("forget", "retain")}}
        settings = {**common.settings, **method.settings, **self.settings}
        config = self._parse(UnlearnConfig, "unlearn", method.config or common.config, fixed, settings, folder)
        return replace(config, trainer=replace(config.trainer, seed=seed))

    def evaluation(self, model: str, folder: Path) -> EvaluateConfig:
        """Of a model; beside the retain model unless it is that."""
        stage = self.methods.evaluate
        fixed: dict[str, Any] = {"model.path": model, "untouched.path": self._role("memorized")}
        fixed |= {side: self._role(side) for side in ("forget", "retain")}
        unseen = self.roles.get("held_out")
        fixed |= {"members": fixed["forget"] if unseen else None, "nonmembers": unseen}
        fixed["utility"] = self.roles.get("utility")
        beside = self.out / "retain_model" / "scores"
        if (unseen or stage.settings.get("nonmembers")) and folder != beside:
            fixed["retain_scores"] = str(beside)
        return self._parse(EvaluateConfig, "evaluate", stage.config, fixed, stage.settings, folder)

    def attacking(self, model: str, folder: Path) -> AttackConfig | None:
        """Of a model; what the retain model answers is read where the base was attacked. None if none is to be."""
        if self.attack == "none":
            return None
        stage = self.methods.attack
        fixed: dict[str, Any] = {"model.path": model, "retain_model.path": self._role("retain_model")}
        fixed |= {side: self._role(side) for side in ("forget", "retain")}
        fixed["unseen"] = self.roles.get("held_out")
        of_base = self.out / "base" / "attack"
        if folder != of_base:
            fixed["retain_answers"] = str(of_base)
        return self._parse(AttackConfig, "attack", self.attack or stage.config, fixed, stage.settings, folder)

    def made(self, method: Method, seed: int) -> Made:
        """All stages of one method with one seed.

        Raises:
            UserError: settings that do not exist or do not go together, with the method's name.
        """
        folder = self.out / method.name / f"seed-{seed}"
        model = str(folder / MODEL)
        try:
            return Made(
                name=f"{method.name}, seed {seed}",
                folder=folder,
                unlearning=self.unlearning(method, seed, folder),
                evaluation=self.evaluation(model, folder / "scores"),
                attack=self.attacking(model, folder / "attack"),
            )
        except UserError as error:
            raise UserError(f"the method {method.name}: {error}") from error

    def _role(self, name: str) -> str:
        if name not in self.roles:
            raise UserError(
                f"nothing stands in the role {name}{did_you_mean(name, self.roles)}: name it under sources in the list"
            )
        return self.roles[name]

    def _parse(
        self,
        cls: type[Any],
        stage: str,
        config: str | None,
        fixed: Mapping[str, Any],
        settings: Mapping[str, Any],
        folder: Path,
    ) -> Any:
        file = config if config is None or is_path(config) else str(shipped_path(f"{stage}/{config}"))
        given = _filled({**fixed, **settings}, self.roles)
        start = [] if file is None else ["--config", file]
        return parse_config(cls, [*start, *words(given), "--out", str(folder)])


def _filled(value: Any, roles: Mapping[str, str]) -> Any:
    """Plain data with what stands for `{role}` in every text of it."""
    if isinstance(value, Mapping):
        return {name: _filled(inner, roles) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_filled(inner, roles) for inner in value]
    if not isinstance(value, str):
        return value

    def role(match: re.Match[str]) -> str:
        if match[1] not in roles:
            near = did_you_mean(match[1], roles)
            raise UserError(
                f"{value!r} names the role {match[1]}, and nothing stands in it{near}: name it under sources"
            )
        return roles[match[1]]

    return re.sub(r"\{(\w+)\}", role, value)
