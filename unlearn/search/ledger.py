"""What a search has done so far, in Optuna's journal file, and what is to be tried next.

A trial enters the journal when it is finished, whole, in one line. What is tried next is a pure function of the finished
trials, the seed and the trial's number: a search that was killed and goes on proposes what an unbroken one proposes.
A study bears its method's name; repeats and reference models are a study's attributes. Nothing runs here.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState, create_trial

from lm.run_folder import writable, write_atomic
from unlearn.search.config import Range, Sampler, Value
from unlearn.search.scored import Finished, Scored

JOURNAL = "study.journal"


class Ledger:
    """The journal of one search."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / JOURNAL
        _drop_half_line(self.path)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with writable(self.path):
            self._storage = JournalStorage(JournalFileBackend(str(self.path)))
        self._studies: dict[str, optuna.Study] = {}

    def trials(self, method: str) -> list[Finished]:
        """The method's finished trials, by number."""
        return [_finished(trial.user_attrs) for trial in self._study(method).get_trials()]

    def add_trial(self, method: str, space: Mapping[str, Range], trial: Finished, value: float | None) -> None:
        """Keep a trial. `value` is what the sampler is to raise; None for one that failed."""
        entry = create_trial(
            state=TrialState.FAIL if value is None else TrialState.COMPLETE,
            value=value,
            params=dict(trial.params),
            distributions=distributions(space),
            user_attrs=asdict(trial),
        )
        with writable(self.path):
            self._study(method).add_trial(entry)

    def propose(
        self, method: str, space: Mapping[str, Range], *, sampler: Sampler, startup: int, seed: int
    ) -> dict[str, Value]:
        """What the method's next trial tries."""
        return propose(self._study(method).get_trials(), space, sampler=sampler, startup=startup, seed=seed)

    def others(self, study: str) -> dict[str, Finished]:
        """What was kept with `keep`, by name."""
        return {name: _finished(attributes) for name, attributes in self._study(study).user_attrs.items()}

    def keep(self, study: str, name: str, run: Finished) -> None:
        """Keep a run that is no trial."""
        with writable(self.path):
            self._study(study).set_user_attr(name, asdict(run))

    def _study(self, name: str) -> optuna.Study:
        if name not in self._studies:
            with writable(self.path):
                self._studies[name] = optuna.create_study(
                    study_name=name, storage=self._storage, direction="maximize", load_if_exists=True
                )
        return self._studies[name]


def propose(
    history: Sequence[FrozenTrial], space: Mapping[str, Range], *, sampler: Sampler, startup: int, seed: int
) -> dict[str, Value]:
    """The values of trial number `len(history)`: a function of the arguments alone.

    The sampler is made anew for each number, from (seed, number). So the first `startup` trials of two methods draw the same
    points of the unit interval, setting by setting in the order of their spaces: what they share, they try at equal values.
    A grid's combinations come in the order of their choices, the last setting's quickest.
    """
    if sampler == "grid":
        points = itertools.product(*(where.ends for where in space.values()))
        return dict(zip(space, next(itertools.islice(points, len(history), None)), strict=True))
    state = int(np.random.SeedSequence([seed, len(history)]).generate_state(1)[0])
    chosen: optuna.samplers.BaseSampler = (
        optuna.samplers.TPESampler(seed=state, n_startup_trials=startup)
        if sampler == "tpe"
        else optuna.samplers.RandomSampler(seed=state)
    )
    study = optuna.create_study(direction="maximize", sampler=chosen)
    study.add_trials(history)
    return dict(study.ask(distributions(space)).params)


def distributions(space: Mapping[str, Range]) -> dict[str, BaseDistribution]:
    """The ranges in Optuna's terms."""
    return {
        name: FloatDistribution(*where.bounds, log=where.log_uniform is not None)
        if where.choice is None
        else CategoricalDistribution(where.choice)
        for name, where in space.items()
    }


def _finished(attributes: Mapping[str, Any]) -> Finished:
    scored = attributes["scored"]
    return Finished(**{**attributes, "scored": None if scored is None else Scored(**scored)})


def _drop_half_line(path: Path) -> None:
    """Take off what a power cut left of a last line: what is appended to it could never be read again."""
    if path.exists():
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data:
            write_atomic(path, whole)
