"""The relearning attack: train the unlearned model a little on what somebody may have, and see whether the rest comes back.

The project's own trainer and objective (`Learn`), constant rate, all weights or adapters. Beside Hu et al., "Unlearning or
Obfuscating?" (arXiv 2406.13356). Badge: *reconstruction*: there it is judged by the unlearned model alone; what counts here is
the difference to the retain model, which never saw the forget rows, trained on the same rows in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import ClassVar, Literal, get_args

from accelerate import Accelerator

from lm.data.rows import Row
from lm.devices import accelerator, together
from lm.errors import UserError
from lm.model import LanguageModel, fingerprint
from lm.row_files import load_rows
from lm.run_folder import RunFolder
from unlearn.attacks.answers import Answer, ask, read_answers, write_answers
from unlearn.attacks.base import Attack, Attacked, AttackSettings, Trial
from unlearn.attacks.comparison.curves import Verdict
from unlearn.attacks.splits import Given, check_apart, check_some, other_people, same_people, without_told
from unlearn.generation.batching import Workers
from unlearn.objectives import Learn, Loss, NoRetain, RetainMemory
from unlearn.scope import lora
from unlearn.scope.scope import Lora, Scope
from unlearn.training.config import TrainerConfig
from unlearn.training.loop import train
from unlearn.training.side import Side, encode_rows


@dataclass(frozen=True, kw_only=True)
class Relearning(Attack):
    """Train a little on rows that an attacker may have, and ask for forget rows that were not among them."""

    unit: ClassVar[str] = "steps"
    words: ClassVar[Mapping[Verdict, str]] = {
        "more": "says more in training than the retain model, so knowledge is still inside",
        "a little more": "says a little more in training than the retain model, so something is still inside",
        "as much": "says as much in training as the retain model, so this attack brings nothing back",
        "less": "says less in training than the retain model, so it was damaged rather than made ignorant",
        "cannot tell": "may or may not say more in training than the retain model: cannot tell",
    }

    given: tuple[Given, ...] = get_args(Given)
    """What the attacker has, each tried by itself: all rows of some people (the others are asked), some questions about each
    person (the other questions are asked), the retain rows, or unrelated rows (all forget rows are asked)."""
    share: float = 0.25
    """Which share of the people, or of each person's questions, is given; at least one."""
    unrelated: str = "builtin:calibration"
    """Rows that have nothing to do with either side: a file, a folder, or a part of the built-in world."""
    steps: int = 40
    """Optimizer steps."""
    every: int = 10
    """Steps between askings."""
    batch: int = 16
    """Rows in a global batch."""
    micro_batch: int = 8
    """Rows that go through the model at once on one process."""
    learning_rate: float | tuple[float, ...] = 1e-4
    """Rate of AdamW, constant. Several, `[3e-4, 6e-4]`: each is tried by itself, with everything that is given."""
    lora: int | None = None
    """Train adapters of this rank on all blocks, instead of all weights."""
    autocast: Literal["no", "bf16", "fp16"] = "no"
    """Compute in this type over float32 weights."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""

    def __post_init__(self) -> None:
        if not self.given or len(set(self.given)) < len(self.given):
            raise UserError(
                f"attack.given is {list(self.given)}: name each once, at least one of {', '.join(get_args(Given))}"
            )
        if not 0 < self.share < 1:
            raise UserError(f"attack.share is {self.share}: give a share between 0 and 1; what is left is asked")
        numbers = [(name, getattr(self, name)) for name in ("steps", "every", "batch", "micro_batch", "lora")]
        for name, value in [*numbers, *(("learning_rate", rate) for rate in self.rates)]:
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"attack.{name} is {value}: give a positive number")
        if not self.rates or len(set(self.rates)) < len(self.rates):
            raise UserError(f"attack.learning_rate is {list(self.rates)}: give at least one rate, and each once")
        if self.every > self.steps:
            raise UserError(f"attack.every is {self.every} of {self.steps} steps: the model is never asked; give fewer")

    @property
    def levels(self) -> tuple[int, ...]:
        """Steps after which the model is asked: 0, each `every`, and the last."""
        return tuple(dict.fromkeys((*range(0, self.steps + 1, self.every), self.steps)))

    @property
    def rates(self) -> tuple[float, ...]:
        """Every rate that is tried."""
        return self.learning_rate if isinstance(self.learning_rate, tuple) else (self.learning_rate,)

    def at(self, learning_rate: float | None) -> Relearning:
        """This attack at one of its rates; None stands for the only one."""
        if learning_rate is None and len(self.rates) > 1:
            raise UserError(f"attack.learning_rate is {list(self.rates)}, and a trial names none: give it one of these")
        return replace(self, learning_rate=self.rates[0] if learning_rate is None else learning_rate)

    def trainer(self, seed: int) -> TrainerConfig:
        """What the trainer is told, at the first rate."""
        return TrainerConfig(
            steps=self.steps,
            batch=self.batch,
            micro_batch=self.micro_batch,
            learning_rate=self.rates[0],
            schedule="constant",
            autocast=self.autocast,
            gradient_checkpointing=self.gradient_checkpointing,
            estimate=False,
            save_every=self.every,
            evaluate_every=self.every,
            seed=seed,
        )

    @property
    def scope(self) -> Scope:
        """What may change."""
        if self.lora is None:
            return Scope(layers="model")
        return Scope(layers="all", modules=("all",), lora=Lora(rank=self.lora, alpha=2 * self.lora))

    def trials(self, forget: Sequence[Row], retain: Sequence[Row], settings: AttackSettings) -> list[Trial]:
        """One for each of `given`, each rate and each seed.

        Raises:
            UserError: nothing to give or to ask; a row that is both.
        """
        others = load_rows(self.unrelated, columns=settings.columns) if "unrelated" in self.given else ()
        trials = []
        several = len(self.rates) > 1
        for name, rate in product(self.given, self.rates):
            for seed in settings.seeds:
                if name == "other_people":
                    given, asked = other_people(forget, self.share, seed)
                elif name == "same_people":
                    given, asked = same_people(forget, self.share, seed)
                else:
                    given, asked = tuple(retain if name == "retain" else others), tuple(forget)
                check_apart(given, asked, name)
                left = without_told(given, asked)
                check_some(given, left, name)
                trials.append(
                    Trial(
                        name,
                        seed,
                        given,
                        left,
                        told=len(asked) - len(left),
                        variant=f"rate {rate:g}" if several else "",
                        learning_rate=rate,
                    )
                )
        return trials

    def of_trial(self, trial: Trial) -> Relearning:
        """At its rate alone, with what it gives alone."""
        return replace(self.at(trial.learning_rate), given=tuple(name for name in self.given if name == trial.name))

    def finished(self, folder: Path) -> bool:
        """Whether there are answers at every level."""
        return all(_file(folder, level).exists() for level in self.levels[1:])

    def run(self, trial: Trial, subject: Attacked, settings: AttackSettings, folder: Path) -> dict[int, list[Answer]]:
        """The answers after 1 x `every`, 2 x `every`, … steps; those that are in `folder` already are read."""
        if not self.finished(folder):
            self.at(trial.learning_rate)._train(trial, subject, settings, folder)
        return {level: read_answers(_file(folder, level)) for level in self.levels[1:]}

    def _train(self, trial: Trial, subject: Attacked, settings: AttackSettings, folder: Path) -> None:
        acc = accelerator(mixed_precision=self.autocast, cpu=subject.cpu)
        scope = self.scope
        model = subject.fresh()
        weights = fingerprint(model)
        run = RunFolder(folder, main=acc.is_main_process)
        with together(acc):
            if acc.is_main_process:
                facts = {"weights": weights, "data": trial.data, "seed": trial.seed}
                RunFolder.create(folder, self, resume=folder.exists(), facts=facts, same=("weights", "data"))
        resolved = scope.resolve(model.anatomy)
        resolved.apply(model.model, model.anatomy)
        if scope.lora is not None:
            lora.inject(model.model, model.anatomy, resolved, scope.lora, seed=trial.seed)
        train(
            acc,
            model,
            Side(encode_rows(model, trial.given, settings.prompt)),
            Side([]),
            Loss.of(Learn(), NoRetain()),
            self.trainer(trial.seed),
            run=run,
            made_from=weights,
            validate=_Asking(acc, model, trial, settings, run, last=self.steps),
            resume=True,
            label=f"relearn {trial.name}",
        )
        run.prune_checkpoints(keep=0)
        run.finish()
        acc.wait_for_everyone()


@dataclass(frozen=True)
class _Asking:
    """Asks the model in training, and keeps every answer under the step that the log stands at; at the last, others' too."""

    acc: Accelerator
    model: LanguageModel
    trial: Trial
    settings: AttackSettings
    run: RunFolder
    last: int

    def __call__(self, memory: RetainMemory) -> dict[str, float]:
        """The mean score and log-probability, for the log."""
        workers = Workers(self.acc.process_index, self.acc.num_processes)
        step = int(self.run.metrics()[-1]["step"])
        answers = ask(
            self.model,
            (*self.trial.asked, *(self.trial.beside if step == self.last else ())),
            self.settings.prompt,
            max_new_tokens=self.settings.max_new_tokens,
            batch_size=self.settings.batch_size,
            workers=workers,
        )
        if self.run.main:
            write_answers(_file(self.run.path, step), answers)
        asked = answers[: len(self.trial.asked)]
        return {
            name: sum(getattr(answer, name) for answer in asked) / len(asked) for name in ("score", "log_probability")
        }


def _file(folder: Path, level: int) -> Path:
    return folder / f"answers-{level:06d}.json"
