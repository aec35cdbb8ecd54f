"""Several localizers together: the mean rank of each layer, how far they agree, and a plan that says when they do not.

Each localizer may be wrong in a way of its own, and their scores have different units; what they have in common are ranks. A
plan from them is only as good as their agreement, so it singles layers out only where every pair is shown to agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
from scipy.stats import rankdata

from lm.anatomy import Kind
from lm.errors import UserError
from tracing.arrays import Array
from tracing.effects.agreement import Agreement, agreement
from tracing.effects.layer_scores import LayerScores, in_common
from tracing.plan.choose import PlanKind, choose_layers
from tracing.plan.layer_plan import LayerPlan
from tracing.plan.verdict import verdict_of_localizers


@dataclass(frozen=True, kw_only=True)
class Agreements:
    """Every pair of some localizers, compared.

    Attributes:
        names: of the localizers, in order.
        pairs: kind -> (a name, a later name) -> their agreement.
    """

    names: tuple[str, ...]
    pairs: Mapping[Kind, Mapping[tuple[str, str], Agreement]]

    def matrix(self, kind: Kind) -> Array:
        """(localizers, localizers) rank correlations, 1 on the diagonal; NaN where there is none."""
        correlations = np.eye(len(self.names))
        for (one, other), value in self.pairs[kind].items():
            cell = self.names.index(one), self.names.index(other)
            correlations[cell] = correlations[cell[::-1]] = value.correlation
        return correlations

    def apart(self, kinds: Sequence[Kind]) -> dict[tuple[str, str], Agreement]:
        """The pairs that are not shown to agree on some of these kinds, each with its least agreement, the least first."""
        worst: dict[tuple[str, str], Agreement] = {}
        for kind in kinds:
            for pair, value in self.pairs[kind].items():
                if not value.shown and (pair not in worst or _order(value) < _order(worst[pair])):
                    worst[pair] = value
        return dict(sorted(worst.items(), key=lambda item: _order(item[1])))

    def to_json(self) -> dict[str, Any]:
        """Everything as plain data; None for what is not defined."""
        return {
            "localizers": list(self.names),
            "kinds": {
                kind: [
                    {"one": one, "other": other, "shown": value.shown}
                    | {name: _plain(number) for name, number in asdict(value).items() if name != "kind"}
                    for (one, other), value in pairs.items()
                ]
                for kind, pairs in self.pairs.items()
            },
        }

    def to_markdown(self) -> str:
        """A table a kind: the rank correlations with their intervals; bold where a pair is shown to agree."""
        return "\n\n".join(self._table(kind) for kind in self.pairs) + "\n"

    def _table(self, kind: Kind) -> str:
        head = [f"| {kind} | {' | '.join(self.names[1:])} |", "|---" * len(self.names) + "|"]
        rows = []
        for row, one in enumerate(self.names[:-1]):
            cells = [
                "" if column <= row else _cell(self.pairs[kind][one, other])
                for column, other in enumerate(self.names)
                if column
            ]
            rows.append(f"| {one} | {' | '.join(cells)} |")
        return "\n".join([*head, *rows])


def compare_all(
    scores: Mapping[str, LayerScores], *, confidence: float = 0.95, resamples: int = 1000, seed: int = 0
) -> Agreements:
    """Every pair of localizers, on the kinds that all of them score and the facts that the pair has in common.

    Raises:
        UserError: fewer than two localizers, other weights, no kind in common, or what `tracing.agreement` refuses.
    """
    _require_several(scores)
    pairs: dict[Kind, dict[tuple[str, str], Agreement]] = {
        kind: {
            (one, other): agreement(
                scores[one], scores[other], kind, confidence=confidence, resamples=resamples, seed=seed
            )
            for one, other in combinations(scores, 2)
        }
        for kind in shared_kinds(scores)
    }
    return Agreements(names=tuple(scores), pairs=pairs)


def combine(scores: Mapping[str, LayerScores]) -> LayerScores:
    """The mean over localizers of each layer's rank, a fact at a time, on the facts that all have.

    A fact's layers are ranked by each localizer's score, 0 the lowest and 1 the highest, ties sharing the mean; the ranks are
    averaged over localizers, each weighing alike. A fact about which one of them says nothing has no score.

    Badge: *reconstruction*; no source says how to combine localizers.

    Raises:
        UserError: fewer than two localizers, other weights, no kind in common, fewer than two facts in common, other numbers
            of layers.
    """
    _require_several(scores)
    common = in_common(list(scores.values()))
    return LayerScores(
        source=f"{len(scores)} localizers together ({', '.join(scores)})",
        unit="rank of the layer (0 the lowest, 1 the highest), the mean over localizers",
        facts=common[0].facts,
        values={
            kind: np.mean([layer_ranks(each.of(kind)) for each in common], axis=0) for kind in shared_kinds(scores)
        },
        details={"localizers": {name: localizer.source for name, localizer in scores.items()}},
        provenance={"localizers": {name: dict(localizer.provenance) for name, localizer in scores.items()}},
    )


def combined_plan(
    scores: Mapping[str, LayerScores],
    agreements: Agreements,
    *,
    size: int,
    kind: PlanKind = "mlp",
    seed: int = 0,
    confidence: float = 0.95,
    stability: float = 0.9,
    resamples: int = 1000,
) -> LayerPlan:
    """The band of layers with the largest mean rank, singled out only if `choose_layers` does and every pair agrees.

    A pair agrees if the interval of its rank correlation lies above zero and few shuffled orders are as alike
    (`Agreement.shown`). Asking it of every pair makes no allowance for many of them, which is on the safe side: one that
    differs is enough to say so.

    Args:
        agreements: `compare_all` of the same localizers.

    Raises:
        UserError: what `combine` and `choose_layers` refuse.
    """
    plan = choose_layers(
        combine(scores),
        size=size,
        kind=kind,
        seed=seed,
        confidence=confidence,
        stability=stability,
        resamples=resamples,
    )
    kinds: tuple[Kind, ...] = ("mlp", "attn") if kind == "both" else (kind,)
    apart = agreements.apart(kinds)
    evidence = {**plan.evidence, "agreement": agreements.to_json(), "apart": [list(pair) for pair in apart]}
    if not apart:
        return replace(plan, evidence=evidence)
    pairs = len(scores) * (len(scores) - 1) // 2
    disagreements = [f"{one} and {other} ({value})" for (one, other), value in apart.items()]
    verdict = verdict_of_localizers(plan, disagreements, pairs)
    return replace(plan, singled_out=False, verdict=verdict, evidence=evidence)


def layer_ranks(scores: Array) -> Array:
    """(facts, layers) scores -> ranks from 0 to 1 in each row, ties sharing the mean; NaN rows stay, a single layer is 0."""
    ranks = (rankdata(scores, axis=1) - 1) / max(1, scores.shape[1] - 1)
    return np.where(np.isnan(scores).any(axis=1, keepdims=True), np.nan, ranks)


def shared_kinds(scores: Mapping[str, LayerScores]) -> list[Kind]:
    """The kinds that all localizers score, in the order of the first. Raises UserError if there is none."""
    kinds = [
        kind
        for kind in next(iter(scores.values())).kinds
        if all(kind in localizer.kinds for localizer in scores.values())
    ]
    if not kinds:
        listed = "; ".join(f"{name}: {', '.join(localizer.kinds)}" for name, localizer in scores.items())
        raise UserError(f"the localizers score no kind in common ({listed}): give them one, such as mlp")
    return kinds


def _require_several(scores: Mapping[str, LayerScores]) -> None:
    if len(scores) < 2:
        raise UserError(f"{len(scores)} localizer cannot be compared or combined: give at least two")
    weights = sorted(
        {str(localizer.provenance["weights"]) for localizer in scores.values() if "weights" in localizer.provenance}
    )
    if len(weights) > 1:
        raise UserError(
            f"the localizers asked models of other weights ({' and '.join(weights)}): run all of them on the same model"
        )


def _order(value: Agreement) -> float:
    return -2.0 if np.isnan(value.correlation) else value.correlation


def _cell(value: Agreement) -> str:
    text = f"{value.correlation:.2f} ({value.low:.2f} to {value.high:.2f})"
    return f"**{text}**" if value.shown else text


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and np.isnan(value) else value
