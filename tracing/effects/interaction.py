"""What a window restores beyond its layers one by one: the interaction of neighboring layers.

Windows of layers bring back more than the sum of their members where these need each other, or less where they do the same
work twice. A window's effect alone cannot be read as the sum of its layers' (Zhang and Nanda 2023, arXiv:2309.16042, found
windows to give 1.4 to 1.75 times the sum in one model). Two traces of the same facts are compared; nothing is traced here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lm.anatomy import Kind
from lm.errors import UserError
from lm.prompts import PromptSpec
from tracing.arrays import Array
from tracing.bootstrap import check_confidence, interval, mean_over_facts, resample_counts, units, weighted_means
from tracing.effects.effects import Effects
from tracing.effects.roles import SUBJECT_ROLES
from tracing.effects.table import EffectTable
from tracing.question.sweep import cut_windows, window_layers


@dataclass(frozen=True, kw_only=True, eq=False)
class Interaction:
    """Window effects, the sums of the single layers' effects in them, and the difference, cell by cell.

    Each is an `Effects` of the same facts, of which `indirect` is the number; so means by token role with intervals are
    `interaction.beyond.table(kind)`.

    Attributes:
        window: with the window restored, as traced.
        single: with each layer restored alone, as traced.
        summed: the sum of the effects of restoring each of its layers alone.
        beyond: the first minus the second: above zero where layers need each other.
        kinds: mlp and attn, those that both traces have.
    """

    window: Effects
    single: Effects
    summed: Effects
    beyond: Effects
    kinds: tuple[Kind, ...]

    def edges(self, kind: Kind) -> list[int]:
        """The layers whose window is cut short by an end of the model."""
        return cut_windows(self.window.window, self.window.layers, kind)

    def ratio(
        self,
        kind: Kind,
        *,
        roles: Sequence[str] = SUBJECT_ROLES,
        confidence: float = 0.95,
        resamples: int = 1000,
        seed: int = 0,
    ) -> tuple[float, float, float]:
        """(ratio, low, high): the summed mean effects of all whole windows over those of their layers one by one.

        The means are over facts, and of a fact over its tokens of `roles`; the interval is the percentile bootstrap's over
        groups of facts, NaN with a single one. All three are NaN where the lower sum is not shown to be above zero (its own
        interval reaches it): a ratio to nothing says nothing, whatever it is.

        Raises:
            UserError: no window is whole.
        """
        check_confidence(confidence)
        whole = [layer for layer in range(self.window.layers) if layer not in self.edges(kind)]
        if not whole:
            raise UserError(
                f"no window of {self.window.window} layers is whole in a model of {self.window.layers}: take a smaller one"
            )
        above, below = (one.scores(roles).of(kind)[:, whole].sum(axis=1) for one in (self.window, self.summed))
        groups = [fact.group for fact in self.window.facts]
        counts, nan = resample_counts(groups, resamples, seed), float("nan")
        drawn, mean = weighted_means(below, counts), float(mean_over_facts(below))
        if not mean > 0 or not float(interval(drawn, confidence)[0]) > 0:
            return nan, nan, nan
        ratio = float(mean_over_facts(above)) / mean
        if int(units(groups).max()) == 0:  # of one group there is nothing to draw
            return ratio, nan, nan
        with np.errstate(divide="ignore", invalid="ignore"):
            low, high = interval(weighted_means(above, counts) / drawn, confidence)
        return ratio, float(low), float(high)

    def sentence(
        self, kind: Kind, *, roles: Sequence[str] = SUBJECT_ROLES, confidence: float = 0.95, seed: int = 0
    ) -> str:
        """The ratio in words."""
        name = {"mlp": "MLPs", "attn": "attention layers", "resid": "layers"}[kind]
        what = f"Windows of {self.window.window} {name}"
        if len(self.edges(kind)) == self.window.layers:
            return f"{what} are all cut short by an end of the model: they cannot be compared with single layers."
        ratio, low, high = self.ratio(kind, roles=roles, confidence=confidence, seed=seed)
        if np.isnan(ratio):
            return (
                f"{what} cannot be compared with single layers: one by one their layers bring back nothing that could be told "
                "from zero."
            )
        told = f" ({confidence:.0%} interval {low:.2f} to {high:.2f})" if not np.isnan(low) else ""
        return f"{what} bring back {ratio:.2f} times{told} what their layers bring back one by one."

    def to_json(
        self, roles: Sequence[str] = SUBJECT_ROLES, *, confidence: float = 0.95, seed: int = 0
    ) -> dict[str, Any]:
        """Means and intervals by kind and token role as plain data (null where no fact has the role), with the edges, and the
        `ratio` over the tokens of `roles` (null where no window is whole; it or its interval is null where it cannot be told)."""
        plain: dict[str, Any] = {"window": self.window.window, "metric": self.window.metric, "kinds": {}}
        for kind in self.kinds:
            tables = {
                name: one.table(kind, confidence=confidence, seed=seed)
                for name, one in (("window", self.window), ("summed", self.summed), ("beyond", self.beyond))
            }
            whole = len(self.edges(kind)) < self.window.layers
            ratio = self.ratio(kind, roles=roles, confidence=confidence, seed=seed) if whole else ()
            plain["kinds"][kind] = {
                "edges": self.edges(kind),
                "ratio": [None if np.isnan(one) else one for one in ratio] or None,
                "roles": {
                    role: {name: _row(table, row) for name, table in tables.items()}
                    for row, role in enumerate(tables["beyond"].roles)
                },
            }
        return plain


def interaction(window: Effects, single: Effects) -> Interaction:
    """Compare a trace of windows with one of single layers: the same facts, corruption and metric.

    In a cell (token t, center l) of a kind: window(t, l) - sum over the layers j of the window of single(t, j). Windows at the
    ends of the model hold fewer layers, and their sums too (`Interaction.edges`).

    Raises:
        UserError: traces that do not belong together, or no window.
    """
    if single.window != 1 or window.window < 2:
        raise UserError(
            f"the interaction needs windows of several layers and single ones, not of {window.window} and {single.window}: trace "
            "with window 1 and with a larger one"
        )
    for what in ("metric", "sigma", "facts", "tokens", "subject_spans"):
        if getattr(window, what) != getattr(single, what):
            raise UserError(
                f"the two traces differ in {what}: trace the same facts with the same settings but for the window"
            )
    for what in ("weights", "corruption", "prompt", "positions", "sever"):
        made = window.provenance.get(what), single.provenance.get(what)
        if what == "prompt":  # one of them may be older than a setting
            made = PromptSpec(**made[0] or {}), PromptSpec(**made[1] or {})
        if made[0] != made[1]:
            raise UserError(f"the two traces differ in {what}: trace with the same settings but for the window")
    shared: tuple[Kind, ...] = ("mlp", "attn")
    kinds = tuple(kind for kind in shared if kind in window.kinds and kind in single.kinds)
    if not kinds:
        raise UserError("the two traces have neither mlp nor attn in common: trace one of them in both")
    summed = {kind: [_sums(cells, window.window, kind) for cells in single.indirect(kind)] for kind in kinds}
    beyond = {
        kind: [cells - total for cells, total in zip(window.indirect(kind), summed[kind], strict=True)]
        for kind in kinds
    }
    return Interaction(
        window=replace(window, restored={kind: window.restored[kind] for kind in kinds}),
        single=replace(single, restored={kind: single.restored[kind] for kind in kinds}),
        summed=_with_indirect(window, summed),
        beyond=_with_indirect(window, beyond),
        kinds=kinds,
    )


def _sums(cells: Array, window: int, kind: Kind) -> Array:
    """(tokens, layers): for each layer the sum over the layers of its window."""
    layers = cells.shape[1]
    return np.stack([cells[:, list(window_layers(layer, window, layers, kind))].sum(1) for layer in range(layers)], 1)


def _with_indirect(effects: Effects, indirect: dict[Kind, list[Array]]) -> Effects:
    """The effects with other indirect effects."""
    restored = {
        kind: [cells + low for cells, low in zip(found, effects.corrupted, strict=True)]
        for kind, found in indirect.items()
    }
    return replace(effects, restored=restored)


def _row(table: EffectTable, place: int) -> dict[str, list[float] | None]:
    return {
        name: None if np.isnan(values[place]).any() else [float(value) for value in values[place]]
        for name, values in (("mean", table.mean), ("low", table.low), ("high", table.high))
    }
