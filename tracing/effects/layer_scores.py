"""What a localizer says of some facts: how much of each lies at each layer, module by module.

The common currency of causal tracing and of the other ways to localize (`tracing.localizers.base`): plans are drawn from it
(`tracing.plan.choose`), and two of them are compared by rank (`tracing.agreement`). Nothing is measured here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from lm.anatomy import Kind
from lm.errors import UserError
from lm.run_folder import write_atomic
from tracing.arrays import Array, pack
from tracing.bootstrap import bootstrap, check_confidence, mean_over_facts
from tracing.question.facts import Fact

_VERSION = 1


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class LayerScores:
    """A score for each fact, module kind and layer; more where more of the fact lies.

    Attributes:
        source: the localizer, in a few words.
        unit: what a score is, in a few words.
        facts: the facts, in order.
        values: kind -> (facts, layers) float64; NaN rows for facts that say nothing.
        total: (facts,), what a score is a part of, in the same unit (tracing: the total effect); None if of nothing.
        details: what else was measured, as plain data for JSON.
        provenance: model, weights, settings.
    """

    source: str
    unit: str
    facts: tuple[Fact, ...]
    values: Mapping[Kind, Array]
    total: Array | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shapes = {values.shape for values in self.values.values()}
        if len(shapes) != 1 or next(iter(shapes))[0] != len(self.facts):
            raise UserError(
                f"scores of {len(self.facts)} facts have the shapes {sorted(shapes)}: give (facts, layers) each"
            )
        for kind, values in self.values.items():
            if np.isnan(values).all():
                raise UserError(
                    f"{self.source} has no score of {kind} for any of the {len(self.facts)} facts: leave {kind} out"
                )

    def __repr__(self) -> str:
        kinds = ", ".join(self.values)
        return f"LayerScores({self.source}: {self.unit}; {len(self.facts)} facts; {kinds} of {self.layers} layers)"

    @property
    def layers(self) -> int:
        """How many layers the model has."""
        return int(next(iter(self.values.values())).shape[1])

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds that are scored."""
        return tuple(self.values)

    @property
    def groups(self) -> list[str]:
        """The facts' groups, which are resampled together."""
        return [fact.group for fact in self.facts]

    def of(self, kind: Kind) -> Array:
        """(facts, layers). Raises UserError for a kind that is not scored."""
        if kind not in self.values:
            raise UserError(f"{self.source} does not score {kind!r}: use one of {', '.join(self.values)}")
        return self.values[kind]

    def mean(self, kind: Kind) -> Array:
        """(layers,): the mean over facts."""
        return mean_over_facts(self.of(kind))

    def interval(
        self, kind: Kind, *, confidence: float = 0.95, resamples: int = 1000, seed: int = 0
    ) -> tuple[Array, Array]:
        """(layers,) low and high: the percentile bootstrap interval of the mean; facts of a group are drawn together. NaN with
        fewer than two groups."""
        check_confidence(confidence)
        return bootstrap(self.of(kind), self.groups, confidence=confidence, resamples=resamples, seed=seed)

    def some(self, places: Sequence[int]) -> LayerScores:
        """The scores of some of the facts, by their places."""
        chosen = list(places)
        return replace(
            self,
            facts=tuple(self.facts[place] for place in chosen),
            values={kind: values[chosen] for kind, values in self.values.items()},
            total=None if self.total is None else self.total[chosen],
        )

    def save(self, path: str | Path) -> None:
        """Write one `.npz` file, atomically: arrays, and a JSON text named `about`. Nothing is pickled."""
        about = {
            "version": _VERSION,
            "source": self.source,
            "unit": self.unit,
            "facts": [asdict(fact) for fact in self.facts],
            "kinds": self.kinds,
            "details": dict(self.details),
            "provenance": dict(self.provenance),
        }
        arrays: dict[str, np.ndarray[Any, Any]] = {"about": np.array(json.dumps(about, ensure_ascii=False))}
        for kind in self.kinds:
            arrays[kind] = self.values[kind]
        if self.total is not None:
            arrays["total"] = self.total
        write_atomic(Path(path), pack(arrays), private=True)

    @classmethod
    def load(cls, path: str | Path) -> LayerScores:
        """Read what `save` wrote. Raises UserError for a missing or broken file, or one of another version."""
        try:
            with np.load(path, allow_pickle=False) as stored:
                about = json.loads(str(stored["about"]))
                if about["version"] != _VERSION:
                    raise UserError(
                        f"{path} has scores of version {about['version']}, this program reads {_VERSION}: localize again"
                    )
                return cls(
                    source=about["source"],
                    unit=about["unit"],
                    facts=tuple(Fact(**one) for one in about["facts"]),
                    values={kind: stored[kind] for kind in about["kinds"]},
                    total=stored.get("total"),
                    details=about["details"],
                    provenance=about["provenance"],
                )
        except FileNotFoundError as error:
            raise UserError(f"there is no file of layer scores {path}: give one that localizing wrote") from error
        except UserError:
            raise
        except Exception as error:  # zip, npy, JSON and key errors have no common base
            raise UserError(f"{path} is not a readable file of layer scores ({error}): localize again") from error


def in_common(scores: Sequence[LayerScores]) -> list[LayerScores]:
    """The same facts of each, in the order of the first; facts are the same if prompt and subject are.

    Raises:
        UserError: other numbers of layers, or fewer than two facts in common.
    """
    layers = sorted({one.layers for one in scores})
    if len(layers) > 1:
        raise UserError(f"scores over {' and '.join(map(str, layers))} layers are of different models: localize in one")
    places = [{(fact.prompt, fact.subject): place for place, fact in enumerate(one.facts)} for one in scores]
    shared = [key for key in places[0] if all(key in other for other in places[1:])]
    if len(shared) < 2:
        raise UserError(
            f"{' and '.join(one.source for one in scores)} have {len(shared)} facts in common: give all the same ones "
            "(max_facts may cut some off)"
        )
    return [one.some([where[key] for key in shared]) for one, where in zip(scores, places, strict=True)]
