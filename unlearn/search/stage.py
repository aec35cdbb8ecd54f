"""The search from files to files: score the base model, try every method equally often, repeat each one's best trial.

One process drives; every run has one of its own, on one device (`unlearn.search.process`). What is known when a run has ended
is in the journal, so a search can be killed at any time. The weights of a run are deleted once it is scored, but for those of
each method's best trial so far.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from lm.config import as_dict, as_of_today
from lm.errors import UserError
from lm.model import ModelSpec
from lm.progress import Advance
from lm.run_folder import RunFolder, progress, stage, write_atomic, write_json
from unlearn import export
from unlearn.config import UnlearnConfig
from unlearn.evaluation.config import EvaluateConfig
from unlearn.search import choice
from unlearn.search.config import Method, SearchConfig, Value
from unlearn.search.picture import pareto
from unlearn.search.plan import Plan
from unlearn.search.process import unlearn_and_score
from unlearn.search.result import MethodResult, SearchResult
from unlearn.search.scored import Finished, Measures, Scored, check_runs, read_scored
from unlearn.search.table import page, table, terms

if TYPE_CHECKING:
    from unlearn.search.ledger import Ledger

REFERENCES = "base"
"""The study that holds the models which were not trained."""
_REFERENCE_BEFORE = {"retain_model": "twin"}
"""What a reference was called; a search that was begun with it goes on."""
_WEIGHTS = (export.MODEL, "best", "checkpoints")


@stage
def run_search(config: SearchConfig) -> SearchResult:
    """Search as the config says; writes `search.json`, `table.md` and `pareto.png` into `config.out`.

    A search that is finished already only checks its runs' files and writes the three again.

    Raises:
        UserError: whatever the user can mend, before the first run wherever that is possible; a run whose files are missing
            or altered, before anything is written.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        raise UserError(
            f"the search was launched on {processes} processes, but one drives it and starts the runs one by one: use python, "
            "not accelerate launch"
        )
    _require_optuna()
    from unlearn.search.ledger import Ledger

    plan, measures, out = Plan.of(config), Measures(config.quality, config.keeping), Path(config.out)
    facts = {"seed": config.seed, "optuna": metadata.version("optuna")}
    facts |= {"unlearn": as_dict(plan.base), "evaluate": as_dict(plan.evaluate)}
    run = RunFolder.create(
        out,
        config,
        resume=config.resume,
        facts=facts,
        same=("unlearn", "evaluate"),
        of_today={
            "unlearn": partial(as_of_today, cls=UnlearnConfig),
            "evaluate": partial(as_of_today, cls=EvaluateConfig),
        },
    )
    ledger = Ledger(out)
    repeated = min(config.repeat or len(config.methods), len(config.methods))
    runs = 1 + (config.retain_model is not None) + len(config.methods) * config.trials + repeated * len(config.seeds)
    done = len(ledger.others(REFERENCES)) + sum(
        len(ledger.trials(method.name)) + len(ledger.others(method.name)) for method in config.methods
    )
    with progress(runs, label="search", unit="runs", done=done) as advance:
        result = _Search(plan, ledger, out, measures, advance).result()
    check_runs(out, result.runs, measures)
    write_json(out / "search.json", result.to_json())
    write_atomic(out / "pareto.png", pareto(result))
    write_atomic(out / "table.md", page(result))
    run.finish(runs=len(result.runs))
    return result


def describe(config: SearchConfig, result: SearchResult) -> str:
    """What a finished search says: the terms, the table, and where everything is."""
    return f"{terms(result)}\n\n{table(result)}\nwrote {config.out}/table.md, pareto.png and search.json"


def _require_optuna() -> None:
    """Raise UserError where it is missing: this stage alone needs it, for its journal and its samplers."""
    if importlib.util.find_spec("optuna") is None:
        raise UserError("optuna is not installed: pip install 'palimpsest-unlearning[search]'")


@dataclass
class _Search:
    """One call of `run_search`: whatever is not in the journal yet is run, and enters it."""

    plan: Plan
    ledger: Ledger
    out: Path
    measures: Measures
    advance: Advance

    def result(self) -> SearchResult:
        config = self.plan.config
        base = self._reference("base", self.plan.base.model)
        retain_model = (
            None
            if config.retain_model is None
            else self._reference("retain_model", ModelSpec(path=config.retain_model))
        )
        if base.utility <= 0:
            raise UserError(
                f"the base model's utility ({config.keeping}) is {base.utility}: there is nothing to keep, and no budget of it; "
                "measure another (keeping, or the evaluation's utility)"
            )
        lowest = choice.floor(base.utility, config.budget)
        for number in range(config.trials):  # in turn: a search that is cut short has been fair so far
            for method in config.methods:
                self._trial(method, number, lowest)
        trials = {method.name: self.ledger.trials(method.name) for method in config.methods}
        chosen = choice.leading(trials, lowest, config.repeat)
        results = [self._repeat(method, lowest, method.name in chosen) for method in config.methods]
        return SearchResult(config, base, retain_model, results)

    def _reference(self, name: str, model: ModelSpec) -> Scored:
        references = self.ledger.others(REFERENCES)
        finished = references.get(name) or references.get(_REFERENCE_BEFORE.get(name, name))
        if finished is None:
            finished = self._run(name, {}, None, model)
            if finished.failed is not None:
                raise UserError(f"the {name} model could not be scored: {finished.failed}")
            self.ledger.keep(REFERENCES, name, finished)
        assert finished.scored is not None
        return finished.scored

    def _trial(self, method: Method, number: int, lowest: float) -> None:
        config, trials = self.plan.config, self.ledger.trials(method.name)
        if number >= len(trials):
            params = self.ledger.propose(
                method.name, method.space, sampler=config.sampler, startup=config.startup, seed=config.seed
            )
            folder = _trial_folder(method, number)
            done = self._run(folder, params, self.plan.unlearning(method, params, self.out / folder, None))
            value = None if done.scored is None else choice.value(done.scored, lowest)
            self.ledger.add_trial(method.name, method.space, done, value)
            trials.append(done)
        best = choice.best(trials, lowest)
        for trial_number in range(len(trials)):
            if trial_number != best:
                self._delete_weights(_trial_folder(method, trial_number))

    def _repeat(self, method: Method, lowest: float, chosen: bool) -> MethodResult:
        trials, repeats = self.ledger.trials(method.name), {}
        best = choice.best(trials, lowest)
        if best is None or not chosen:
            return MethodResult(method.name, trials, best, {})
        for seed in self.plan.config.seeds:
            name = f"seed-{seed}"
            folder = f"{method.name}/{name}"
            done = self.ledger.others(method.name).get(name)
            if done is None:
                params = trials[best].params
                done = self._run(folder, params, self.plan.unlearning(method, params, self.out / folder, seed))
                self.ledger.keep(method.name, name, done)
            self._delete_weights(folder)
            repeats[seed] = done
        return MethodResult(method.name, trials, best, repeats)

    def _run(
        self, folder: str, params: Mapping[str, Value], unlearning: UnlearnConfig | None, model: ModelSpec | None = None
    ) -> Finished:
        self.advance(0, running=folder)
        failed = unlearn_and_score(self.out / folder, unlearning, self.plan.scoring(self.out / folder, model))
        scored = read_scored(self.out, folder, self.measures) if failed is None else None
        self.advance(1)
        return Finished(params=dict(params), scored=scored, failed=failed)

    def _delete_weights(self, folder: str) -> None:
        for name in _WEIGHTS:
            shutil.rmtree(self.out / folder / name, ignore_errors=True)


def _trial_folder(method: Method, number: int) -> str:
    return f"{method.name}/trial-{number:02d}"
