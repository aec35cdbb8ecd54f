"""One attack as data: an unlearned model, the retain model, the rows, and what is done to bring them back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from lm.errors import UserError
from lm.model import ModelSpec
from lm.prompts import PromptSpec
from tracing.bootstrap import check_confidence
from unlearn.attacks.base import Attack, AttackSettings
from unlearn.attacks.relearning import Relearning

HELP = """Does it come back? Attack an unlearned model, and beside it the retain model, and compare what they say.

palimpsest attack --config builtin --model.path runs/mine/model --out runs/mine-attack
accelerate launch -m palimpsest attack --model.path MODEL --retain_model.path RETAIN_MODEL --forget … --retain …
"""


@dataclass(frozen=True, kw_only=True)
class AttackConfig:
    """Which model is attacked, how, and beside which other."""

    old_keys: ClassVar[Mapping[str, str]] = {"never": "retain_model"}

    model: ModelSpec = field(default_factory=ModelSpec)
    """The unlearned model."""
    retain_model: ModelSpec = field(default_factory=lambda: ModelSpec(path="builtin:retain_model"))
    """One of the same shape that never learned the forget rows (trained on what is to be kept alone), attacked alike."""
    forget: str = "builtin:forget"
    """The rows that it should have forgotten: a JSONL or Parquet file, a folder of them, or a part of the built-in world."""
    retain: str = "builtin:retain"
    """The rows that it kept: likewise. An attacker may have them."""
    unseen: str | None = None
    """Rows of people whom neither model saw, of the forget rows' tasks and kinds: likewise. They are asked as well, before the
    attack and at its end, and retain rows too: forgotten people should look like these. Null: nobody else is asked."""
    columns: dict[str, str] | None = None
    """For files with other column names: our field -> their column, e.g. {"input": "question", "output": "answer"}."""
    tasks: tuple[str, ...] = ()
    """Only forget rows of these tasks. Empty: all."""
    attack: Attack = field(default_factory=Relearning)
    """What is done."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Every trial once a seed, with other given rows and in another order; a row's score is its mean over them."""
    prompt: PromptSpec = field(default_factory=PromptSpec)
    """How rows are rendered: as they were trained."""
    max_new_tokens: int = 64
    """Longest answer in tokens."""
    batch_size: int = 64
    """Prompts at once on each process."""
    margin: float = 0.1
    """A mean difference (of scores from 0 to 1) from the retain model below this counts as none."""
    confidence: float = 0.95
    """Of the interval over people."""
    workers: int = 1
    """How many trials run at once, each in a process of its own; they share the cores, or the memory of the GPU. The numbers are
    the same."""
    retain_answers: str | None = None
    """The run folder of an earlier attack with the same retain model, rows and settings, whose answers of the retain model are
    read: half of the work. Refused where anything else was asked."""
    out: str = "runs/attack"
    """The run folder; the result is in its attack.json and attack.png, every answer beside them."""
    resume: bool = False
    """Go on with the attack in `out`."""

    def __post_init__(self) -> None:
        check_confidence(self.confidence)
        if not 0 < self.margin < 1:
            raise UserError(f"margin is {self.margin}: give a difference of scores between 0 and 1 (0.1 is usual)")
        if self.workers < 1:
            raise UserError(f"workers is {self.workers}: give at least 1")
        _ = self.settings  # refuses what no attack can be told
        for name in ("model", "retain_model"):
            if getattr(self, name).dtype == "float16" and isinstance(self.attack, Relearning):
                raise UserError(
                    f"{name}.dtype is float16, in which AdamW's second moments vanish: relearn in float32 or bfloat16"
                )
            if getattr(self, name).device not in (None, "cpu", "cuda"):
                raise UserError(
                    f"{name}.device is {getattr(self, name).device}, but training runs where the launcher puts it: leave it out "
                    "and set CUDA_VISIBLE_DEVICES, or give cpu"
                )
        if not self.forget.startswith("builtin"):
            own = (
                ("retain", self.retain),
                ("retain_model.path", self.retain_model.path),
                ("unseen", self.unseen or ""),
            )
            for name, given in own:
                if given.startswith("builtin"):
                    raise UserError(
                        f"{name} is {given} but forget is {self.forget}: the built-in one says nothing about other data, so give "
                        "your own"
                    )

    @property
    def settings(self) -> AttackSettings:
        """What the attack reads of this."""
        return AttackSettings(
            seeds=self.seeds,
            prompt=self.prompt,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            columns=self.columns,
        )
