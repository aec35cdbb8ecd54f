"""One search as data: methods, what may vary in each, how many trials, and what a result may cost the rest of the model.

A method is a name, some fixed settings and some ranges, all of them dotted settings of the unlearning config: what it may
hold is checked by that config's own parser (`unlearn.search.plan`), before anything runs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from lm.errors import UserError

HELP = """Which method is better at the same effort? Equal trials, a budget of utility, seeds; a table, a picture, every run kept.

palimpsest search --config builtin --out runs/search
"""
Sampler = Literal["tpe", "random", "grid"]
Quality = Literal["forget_terms", "task_aggregate"]
Keeping = Literal["utility", "retain_terms"]
Value = int | float | bool | str | None
TAKEN = ("base", "retain_model")
"""Folders of the search that are no method's."""


@dataclass(frozen=True, kw_only=True)
class Range:
    """Where one setting is looked for: exactly one of the three."""

    log_uniform: tuple[float, float] | None = None
    """From a positive low to high, even on a logarithmic scale."""
    uniform: tuple[float, float] | None = None
    """From low to high, even."""
    choice: tuple[Value, ...] | None = None
    """One of these; a list, of layers say, is written as text: "[0, 1]"."""

    def __post_init__(self) -> None:
        kinds = [name for name in ("log_uniform", "uniform", "choice") if getattr(self, name) is not None]
        if len(kinds) != 1:
            raise UserError(
                f"a range has {' and '.join(kinds) or 'nothing'}: give one of log_uniform: [low, high], "
                "uniform: [low, high], choice: [...]"
            )
        if self.choice is not None:
            if len({(type(value), value) for value in self.choice}) < max(len(self.choice), 1):
                raise UserError(f"choice is {list(self.choice)}: give at least one value, and none twice")
            return
        low, high = self.bounds
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise UserError(f"{kinds[0]} is [{low:g}, {high:g}]: give two numbers, the lower first")
        if self.log_uniform is not None and low <= 0:
            raise UserError(f"log_uniform is [{low:g}, {high:g}]: a logarithmic scale begins above 0")

    @property
    def bounds(self) -> tuple[float, float]:
        """Low and high of a range of numbers."""
        ends = self.log_uniform or self.uniform
        assert ends is not None
        return ends

    @property
    def ends(self) -> tuple[Value, ...]:
        """The values that a check of the range tries: all choices, or low and high."""
        return self.bounds if self.choice is None else self.choice


@dataclass(frozen=True, kw_only=True)
class Method:
    """One method: what makes it what it is, and what is tuned."""

    name: str
    """A short name: its folder and its row."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Dotted settings of the unlearning config, e.g. {objective: NPO, retain_weight: Fixed, retain_weight.factor: 2.0}."""
    space: dict[str, Range] = field(default_factory=dict)
    """Dotted setting -> where it is looked for."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]*", self.name) or self.name in TAKEN:
            raise UserError(
                f"a method is named {self.name!r}: give letters, digits, _ . + -, and not {' or '.join(TAKEN)}: "
                "it names a folder"
            )
        if not self.space:
            raise UserError(
                f"the method {self.name} has an empty space: give at least one setting to search, e.g. "
                "trainer.learning_rate: {log_uniform: [1.0e-5, 1.0e-3]}"
            )
        refuse_own(self.settings, f"the settings of {self.name}")
        refuse_own(self.space, f"the space of {self.name}")
        if "trainer.seed" in self.space:
            raise UserError(f"the space of {self.name} has trainer.seed: a seed is not tuned; list more seeds instead")


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Methods on equal terms: the same rows, trials, seeds and budget."""

    old_keys: ClassVar[Mapping[str, str]] = {"twin": "retain_model"}
    old_values: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "retain_model": {"builtin:retain_only": "builtin:retain_model"}
    }

    unlearn: str = "configs/unlearn/builtin.yaml"
    """The unlearning config that every method starts from: model, rows, scope, trainer."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Dotted settings of it, for every method: the same steps and batch, say."""
    evaluate: str = "configs/evaluate/builtin.yaml"
    """The evaluation config by which every result is scored."""
    methods: tuple[Method, ...] = ()
    """What is compared."""
    trials: int = 20
    """Trials a method, failed ones among them."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Each method's best trial is run again with these; the table shows those runs alone."""
    repeat: int | None = None
    """Only so many methods, those whose best trials are best, are run again with the seeds; null: all of them."""
    budget: float = 0.05
    """Share of the base model's utility that a result may cost; a trial that costs more does not count."""
    quality: Quality = "forget_terms"
    """What is sought: the mean of the forget terms, or the harmonic mean of all terms."""
    keeping: Keeping = "utility"
    """What the budget is counted in: accuracy on the utility questions, or the mean of the retain terms."""
    sampler: Sampler = "tpe"
    """Tree-structured Parzen estimators, or all trials drawn at random, or every combination of the choices of each space."""
    startup: int = 10
    """Trials of a method that are drawn at random before the estimators are used."""
    seed: int = 0
    """Of the sampler."""
    retain_model: str | None = None
    """The model that never saw the forget rows, scored beside the base model: the ceiling."""
    out: str = "runs/search"
    """The folder: search.json, table.md, pareto.png, and a run folder a trial."""
    resume: bool = False
    """Go on with the search in `out`."""

    def __post_init__(self) -> None:
        if not self.methods:
            raise UserError("methods is empty: give at least one, each with a name and a space")
        names = [method.name for method in self.methods]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"methods has {name} {names.count(name)} times: name each once")
        for name in ("trials", "startup", "repeat"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name} is {value}: give at least 1")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise UserError(f"seeds is {list(self.seeds)}: give at least one, 0 or more, and none twice")
        if not 0 <= self.budget < 1:
            raise UserError(f"budget is {self.budget}: give the share of utility that may be lost, from 0 to below 1")
        if self.seed < 0:
            raise UserError(f"seed is {self.seed}: give 0 or more")
        refuse_own(self.settings, "settings")
        if self.sampler == "grid":
            for method in self.methods:
                self._check_grid(method)

    def _check_grid(self, method: Method) -> None:
        for name, where in method.space.items():
            if where.choice is None:
                raise UserError(f"sampler is grid, but {name} of {method.name} is a range: give it as choice: [...]")
        points = math.prod(len(where.choice or ()) for where in method.space.values())
        if points != self.trials:
            raise UserError(
                f"sampler is grid, and {method.name} has {points} combinations, but trials is {self.trials}: every method has as "
                "many trials as the others, so give each as many combinations"
            )


def refuse_own(settings: Mapping[str, object], where: str) -> None:
    """Refuse what the search sets itself."""
    for name in ("out", "resume"):
        if name in settings:
            raise UserError(f"{where} has {name}, which the search sets for every run: leave it out")
