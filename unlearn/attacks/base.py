"""The axis "attack": what somebody does to an unlearned model to bring the forgotten back.

An attack has levels (steps of training, shots, bits): 0 is no attack at all. It makes trials from the rows, and for a trial
and a model it gives what is answered at each level. Comparing with the retain model is `unlearn.attacks.comparison.curves`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from lm.data.rows import Row
from lm.errors import UserError
from lm.loading import load
from lm.model import LanguageModel, ModelSpec
from lm.prompts import PromptSpec
from lm.row_files import data_hash
from unlearn.attacks.answers import Answer
from unlearn.attacks.comparison.curves import Verdict


@dataclass(frozen=True, kw_only=True)
class AttackSettings:
    """What every attack is told beside its own settings.

    Attributes:
        seeds: every trial is made once with each.
        prompt: how rows are rendered: as they were trained.
        max_new_tokens: the longest answer, in tokens.
        batch_size: prompts at once on each process.
        columns: for rows that the attack reads from files with other column names: our field -> their column.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    prompt: PromptSpec = field(default_factory=PromptSpec)
    max_new_tokens: int = 64
    batch_size: int = 64
    columns: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        if not self.seeds or min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"seeds is {list(self.seeds)}: give at least one, all different and none below 0")
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: give at least 1")


@dataclass(frozen=True)
class Attacked:
    """A model that is attacked again and again, each time as it was at first.

    Attributes:
        fresh: gives a model of its own, whole, to train or edit.
        cpu: it is attacked on the CPU although a GPU is there.
    """

    fresh: Callable[[], LanguageModel]
    cpu: bool

    @classmethod
    def from_spec(cls, spec: ModelSpec) -> Attacked:
        """Loaded anew each time."""
        return cls(lambda: load(spec, device="cpu"), cpu=spec.device == "cpu")


@dataclass(frozen=True)
class Trial:
    """One way of attacking.

    Attributes:
        name: what the attacker has, such as `other_people`.
        seed: of the draw, and of whatever the attack draws itself.
        given: the rows that the attacker has.
        asked: the forget rows that are asked for; none of them is given.
        told: how many more would have been asked, but a given row tells their answer.
        variant: which of several ways with the same rows, such as `rate 0.0006`; empty where there is one way. Trials of one
            name and variant are averaged over their seeds.
        learning_rate: the rate of an attack that trains.
        beside: rows of others (kept, or never seen) that are asked beside `asked` at the last level; none of them is given.
    """

    name: str
    seed: int
    given: tuple[Row, ...]
    asked: tuple[Row, ...]
    told: int = 0
    variant: str = ""
    learning_rate: float | None = None
    beside: tuple[Row, ...] = ()

    @property
    def folder(self) -> str:
        """Where its answers are kept, inside the run folder."""
        ways = [self.variant.replace(" ", "-")] if self.variant else []
        return "/".join([self.name, *ways, f"seed-{self.seed}"])

    @property
    def data(self) -> dict[str, str]:
        """The hashes of its rows: given, asked, and beside these."""
        rows = {"given": self.given, "asked": self.asked, "beside": self.beside}
        return {name: data_hash(each) for name, each in rows.items() if each or name != "beside"}


@dataclass(frozen=True, kw_only=True)
class Attack:
    """What is done to bring the forgotten back.

    The axis "attack".
    """

    config_axis: ClassVar[bool] = True
    unit: ClassVar[str]
    """What a level counts."""
    words: ClassVar[Mapping[Verdict, str]]
    """What each verdict means of this attack, to stand after "The unlearned model"."""

    @property
    def levels(self) -> tuple[int, ...]:
        """The levels at which the model is asked, rising; 0 is first."""
        raise NotImplementedError

    def trials(self, forget: Sequence[Row], retain: Sequence[Row], settings: AttackSettings) -> list[Trial]:
        """What is tried, each once for each of `settings.seeds`. Raises UserError where the rows do not allow it."""
        raise NotImplementedError

    def of_trial(self, trial: Trial) -> Attack:
        """This attack with only what one of its trials depends on: two attacks that agree in it give the same answers."""
        return self

    def finished(self, folder: Path) -> bool:
        """Whether a trial's folder holds all answers already, so that `run` would only read them."""
        return False

    def run(self, trial: Trial, subject: Attacked, settings: AttackSettings, folder: Path) -> dict[int, list[Answer]]:
        """Attack a model and ask it `trial.asked` at every level above 0; at the last one `trial.beside` too.

        `folder` is this trial's and model's own: what is in it already is not done again. All processes call it.
        """
        raise NotImplementedError
