"""What a search found, as data: every trial, the best of each method, its repeats, and what they are measured against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lm.config import as_dict
from unlearn.search import choice
from unlearn.search.choice import Estimate
from unlearn.search.config import SearchConfig
from unlearn.search.scored import Finished, Scored


@dataclass(frozen=True)
class MethodResult:
    """One method.

    Attributes:
        trials: by number.
        best: number of the best trial within the budget; None if there is none, and then there are no repeats.
        repeats: seed -> the best trial's settings run with it.
    """

    name: str
    trials: Sequence[Finished]
    best: int | None
    repeats: Mapping[int, Finished]

    @property
    def scored_repeats(self) -> list[Scored]:
        """The repeats that did not fail, by seed in the order asked for."""
        return [run.scored for run in self.repeats.values() if run.scored is not None]

    def estimate(self, measure: str) -> Estimate:
        """Of one attribute of `Scored` over the repeats."""
        return Estimate.of([float(getattr(run, measure)) for run in self.scored_repeats])

    def stands(self, lowest: float) -> bool:
        """Whether it has a place in the order: no repeat failed, and their mean utility is within the budget too."""
        done = self.scored_repeats
        return bool(done) and len(done) == len(self.repeats) and self.estimate("utility").mean >= lowest


@dataclass(frozen=True)
class SearchResult:
    """The whole search."""

    config: SearchConfig
    base: Scored
    retain_model: Scored | None
    methods: Sequence[MethodResult]

    @property
    def lowest(self) -> float:
        """The lowest utility within the budget."""
        return choice.floor(self.base.utility, self.config.budget)

    @property
    def ranked(self) -> list[MethodResult]:
        """The methods that stand, by the mean quality of their repeats, the first listed of equals."""
        standing = [method for method in self.methods if method.stands(self.lowest)]
        return sorted(standing, key=lambda method: -method.estimate("quality").mean)

    @property
    def runs(self) -> list[Scored]:
        """Every scored run: references, trials, repeats."""
        finished = [run for method in self.methods for run in (*method.trials, *method.repeats.values())]
        trained = [run.scored for run in finished if run.scored is not None]
        return [self.base, *([] if self.retain_model is None else [self.retain_model]), *trained]

    def to_json(self) -> dict[str, Any]:
        """Everything, with the hashes of each run's files; `rank` counts from 1, null for what does not stand."""
        ranks = {method.name: place for place, method in enumerate(self.ranked, start=1)}
        return {
            "config": as_dict(self.config),
            "lowest_utility": self.lowest,
            "base": asdict(self.base),
            "retain_model": None if self.retain_model is None else asdict(self.retain_model),
            "methods": {
                method.name: {
                    "rank": ranks.get(method.name),
                    "best": method.best,
                    "trials": [asdict(trial) for trial in method.trials],
                    "repeats": {str(seed): asdict(run) for seed, run in method.repeats.items()},
                }
                for method in self.methods
            },
        }
