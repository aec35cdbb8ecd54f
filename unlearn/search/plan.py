"""From a search config to the configs of its runs, each read by the stages' own parser. Nothing runs here.

Every combination of a method's ends is not tried, but every end of every range is, beside the first of the others: a
misspelled setting, a wrong type or a forbidden value is refused before the first run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from lm.config import parse_config
from lm.errors import UserError
from lm.model import ModelSpec
from unlearn.config import UnlearnConfig
from unlearn.evaluation.config import EvaluateConfig
from unlearn.export import MODEL
from unlearn.search.config import Method, SearchConfig, Value

SCORES = "scores"
"""The evaluation's folder inside a run's."""


@dataclass(frozen=True)
class Plan:
    """The configs of all runs, from the config of the search."""

    config: SearchConfig
    base: UnlearnConfig
    evaluate: EvaluateConfig

    @classmethod
    def of(cls, config: SearchConfig) -> Plan:
        """Read both base configs and try every range.

        Raises:
            UserError: a setting that does not exist or may not be so, a seed on which the trials already run, a utility that
                the evaluation does not measure.
        """
        base = parse_config(UnlearnConfig, ["--config", config.unlearn, *words(config.settings)])
        evaluate = parse_config(EvaluateConfig, ["--config", config.evaluate])
        if config.keeping == "utility" and evaluate.utility is None:
            raise UserError(
                f"keeping is utility, but {config.evaluate} asks no utility questions: set utility there, or "
                "keeping: retain_terms"
            )
        plan = cls(config, base, evaluate)
        for method in config.methods:
            plan._try_ends(method)
        return plan

    def unlearning(self, method: Method, params: Mapping[str, Value], folder: Path, seed: int | None) -> UnlearnConfig:
        """The run of a method at these values; `seed` None leaves the trials' own."""
        arguments = ["--config", self.config.unlearn, *words({**self.config.settings, **method.settings, **params})]
        config = parse_config(UnlearnConfig, arguments)
        trainer = config.trainer if seed is None else replace(config.trainer, seed=seed)
        return replace(config, trainer=trainer, out=str(folder), resume=(folder / "config.yaml").exists())

    def scoring(self, folder: Path, model: ModelSpec | None = None) -> EvaluateConfig:
        """The evaluation of the result in `folder`, or of another model; both in the evaluation's type, on its device."""
        held = self.evaluate.model
        spec = model or ModelSpec(path=str(folder / MODEL))
        spec = replace(spec, dtype=held.dtype, device=held.device, attention=held.attention)
        out = folder / SCORES
        return replace(self.evaluate, model=spec, out=str(out), resume=(out / "config.yaml").exists())

    def _try_ends(self, method: Method) -> None:
        first = {name: where.ends[0] for name, where in method.space.items()}
        for name, where in method.space.items():
            for value in where.ends:
                try:
                    config = self.unlearning(method, {**first, name: value}, Path(self.config.out), None)
                except UserError as error:
                    raise UserError(f"the method {method.name} with {name} at {value}: {error}") from error
        if config.trainer.seed in self.config.seeds:
            raise UserError(
                f"seeds is {list(self.config.seeds)}, but the trials run with trainer.seed {config.trainer.seed}: a repeat on "
                "the seed that the trial was chosen on is no repeat; give others"
            )


def words(settings: Mapping[str, object]) -> list[str]:
    """Settings as command-line words, a class before its fields."""
    out: list[str] = []
    for name, value in sorted(settings.items(), key=lambda item: item[0].count(".")):
        out += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    return out
