"""What a prefilter may have missed: its largest cells and random other ones, computed exactly.

Estimates of every cell come from `tracing.localizers.attribution`; exact effects from the wave (`tracing.engine.wavefront`),
whose first few are compared with the reference. The random cells bound the share of cells that matter and were not among the
largest (a reconstruction of the check that the authors of AtP* describe).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.stats import beta

from lm.anatomy import Kind
from lm.errors import UserError
from lm.model import LanguageModel
from lm.run_folder import progress as progress_bar
from tracing.arrays import Array
from tracing.corruption.noise import Corruptor
from tracing.effects.agreement import spearman
from tracing.effects.effects import Effects
from tracing.effects.roles import ROLES, token_roles
from tracing.engine.engines import Checked, compare
from tracing.question.encoded_fact import EncodedFact
from tracing.question.sweep import Sweep

CellName = tuple[Kind, int, int]
"""(kind, token, layer)."""
CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True, eq=False)
class Compared:
    """Some cells of one fact: their indirect effects as estimated and exactly, (cells,) each."""

    cells: tuple[CellName, ...]
    estimated: Array
    exact: Array


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Verification:
    """Estimated and exact effects of some cells, and what they say of the others.

    Attributes:
        top: the cells with the largest estimates of those that count, a fact each.
        random: cells drawn, without replacement and all as likely, from the others of all facts, a fact each.
        outside: (facts,), how many of the cells that count are not among the top.
        total: (facts,), the total effects.
        matters: a cell matters if its absolute effect is at least this share of the absolute total effect.
        signed: whether estimates have a sign; if not, they are compared with absolute effects.
    """

    top: tuple[Compared, ...]
    random: tuple[Compared, ...]
    outside: Array
    total: Array
    matters: float
    signed: bool = True

    @property
    def drawn(self) -> int:
        """How many random cells there are."""
        return sum(len(cells.cells) for cells in self.random)

    @property
    def missed(self) -> int:
        """How many of the random cells matter."""
        least = self.matters * np.abs(self.total)
        return sum(int((np.abs(cells.exact) >= bound).sum()) for cells, bound in zip(self.random, least, strict=True))

    @property
    def bound(self) -> float:
        """The share of the cells outside the top that matter is at most this, with 95 % confidence (one-sided, Clopper and
        Pearson 1934; drawing without replacement makes it wider than it need be); exactly this where all of them were
        drawn. 1 where none was.
        """
        if self.drawn == int(self.outside.sum()):
            return self.missed / self.drawn if self.drawn else 0.0
        return upper_bound(self.missed, self.drawn)

    def rank_correlation(self, cells: Sequence[Compared]) -> float:
        """The mean over facts of Spearman's correlation of estimated and exact effects; NaN where no fact has one."""
        correlations = [
            spearman(compared.estimated, self._exact(compared)) for compared in cells if len(compared.cells) > 1
        ]
        defined = [value for value in correlations if not np.isnan(value)]
        return float(np.mean(defined)) if defined else float("nan")

    def sign_agreement(self, cells: Sequence[Compared]) -> float:
        """The share of cells whose estimated and exact effects have the same sign; NaN without signs or cells."""
        same = [np.sign(compared.estimated) == np.sign(compared.exact) for compared in cells if len(compared.cells)]
        return float(np.concatenate(same).mean()) if same and self.signed else float("nan")

    def applied(self, effects: Effects) -> Effects:
        """The effects with exact values in place of the estimates that were checked."""
        restored: dict[Kind, list[Array]] = {
            kind: [np.array(of_fact) for of_fact in effects.restored[kind]] for kind in effects.kinds
        }
        for index, low in enumerate(effects.corrupted):
            for some in (self.top[index], self.random[index]):
                for (kind, position, layer), exact in zip(some.cells, self._exact(some), strict=True):
                    restored[kind][index][position, layer] = low + exact
        return replace(effects, restored=restored)

    def __str__(self) -> str:
        facts, outside = len(self.total), int(self.outside.sum())
        if not outside:
            verdict = "every cell was computed"
        elif not self.drawn:
            verdict = "no random cell was computed, so that nothing is known of the cells outside the top"
        else:
            share = f"{100 * self.bound:.2g} % of the {outside:,} cells outside the top do"
            known = f"{share}, all of which were computed" if self.drawn == outside else f"at most {share} (95 %)"
            verb = "has" if self.missed == 1 else "have"
            verdict = (
                f"of {self.drawn:,} random cells {self.missed:,} {verb} an effect of {100 * self.matters:g} % of the total "
                f"or more: {known}"
            )
        ranks = f"rank correlation with the exact effects {_number(self.rank_correlation(self.top))} at the top"
        signs = f"the same sign in {_percent(self.sign_agreement(self.top))}"
        if self.drawn:
            ranks += f" and {_number(self.rank_correlation(self.random))} at random"
            signs += f" and {_percent(self.sign_agreement(self.random))}"
        return f"{facts} facts; {verdict}; {ranks}{f', {signs}' if self.signed else ''}"

    __repr__ = __str__

    def to_json(self) -> dict[str, Any]:
        """Everything as plain data; None for what is not defined."""
        return {
            "sentence": str(self),
            "drawn": self.drawn,
            "missed": self.missed,
            "matters": self.matters,
            "outside": int(self.outside.sum()),
            "bound": self.bound,
            "confidence": CONFIDENCE,
            "rank_correlation": {
                "top": _plain(self.rank_correlation(self.top)),
                "random": _plain(self.rank_correlation(self.random)),
            },
            "sign_agreement": {
                "top": _plain(self.sign_agreement(self.top)),
                "random": _plain(self.sign_agreement(self.random)),
            },
            "facts": [
                {"top": _rows(top), "random": _rows(chance)} for top, chance in zip(self.top, self.random, strict=True)
            ],
        }

    def _exact(self, some: Compared) -> Array:
        return some.exact if self.signed else np.abs(some.exact)


def verify(
    model: LanguageModel,
    encoded_facts: Sequence[EncodedFact],
    corruptor: Corruptor,
    estimated: Effects,
    *,
    roles: Sequence[str] = ROLES,
    top: int = 16,
    chance: int = 16,
    matters: float = 0.1,
    seed: int = 0,
    memory: float = 2.0,
    signed: bool = True,
    progress: bool = True,
) -> Verification:
    """Compute the largest cells of each fact exactly, and random others of all facts.

    Args:
        model: in eval mode.
        encoded_facts, corruptor: those that the estimates are of (`tracing.known.prepare`).
        estimated: every cell's estimate; its kinds and metric are used, windows are not.
        roles: only the cells of tokens with these roles are looked at, and spoken of.
        top: how many cells a fact, by absolute estimated effect over all kinds, tokens from the subject on, and layers.
        chance: how many random others a fact, on average: every one of the others is as likely as any other to be drawn.
        matters: see `Verification`.
        signed: whether estimates have a sign.
        memory: gigabytes (10^9 bytes) that it may take beside the model, about, as in `tracing.trace`.

    Raises:
        UserError: estimates of windows or of other facts, NaN, or a wave that disagrees with the reference on the first fact.
    """
    if estimated.window != 1:
        raise UserError(f"windows of {estimated.window} layers cannot be verified cell by cell: use window 1")
    if [encoded.fact for encoded in encoded_facts] != list(estimated.facts):
        raise UserError("the estimates are of other facts: give the encoded facts of the same call of prepare")
    sweep = Sweep(kinds=estimated.kinds, metric=estimated.metric)  # type: ignore[arg-type]
    engine = Checked(model, sweep, int(memory * 1e9))
    guesses = [_guesses(estimated, index, encoded, roles) for index, encoded in enumerate(encoded_facts)]
    ranked = [_largest_first(guess) for guess in guesses]
    outside = [cells[top:] for cells in ranked]
    drawn = _drawn([len(cells) for cells in outside], chance * len(encoded_facts), seed)
    tops: list[Compared] = []
    others: list[Compared] = []
    with progress_bar(len(encoded_facts), label="verification", unit="facts", enabled=progress) as advance:
        for index, encoded in enumerate(encoded_facts):
            chosen = ranked[index][:top]
            wanted = [*chosen, *(outside[index][index_of] for index_of in drawn[index])]
            batch = corruptor.batch(encoded)
            scores = engine.score_cells(encoded, batch, wanted)
            low = float(estimated.corrupted[index])
            if index == 0:
                few = [*range(min(2, len(wanted))), len(wanted) - 1] if wanted else []
                few_scores = {wanted[index_of]: scores[index_of] for index_of in few}
                compare(model, encoded, batch, sweep, few_scores, low, rows=engine.ordinary_rows(encoded))
            exact = np.array(scores) - low
            guessed = np.array([guesses[index][cell] for cell in wanted])
            for compared, part in ((tops, slice(0, len(chosen))), (others, slice(len(chosen), len(wanted)))):
                compared.append(Compared(cells=tuple(wanted[part]), estimated=guessed[part], exact=exact[part]))
            advance(1)
    return Verification(
        top=tuple(tops),
        random=tuple(others),
        outside=np.array([len(cells) for cells in outside], dtype=np.float64),
        total=estimated.total,
        matters=matters,
        signed=signed,
    )


def _guesses(estimated: Effects, index: int, encoded: EncodedFact, roles: Sequence[str]) -> dict[CellName, float]:
    """The estimated indirect effect of each of a fact's cells at tokens of these roles, from the subject on."""
    low = float(estimated.corrupted[index])
    places = token_roles(len(encoded.prompt_ids), encoded.span)
    return {
        (kind, position, layer): float(estimated.restored[kind][index][position, layer]) - low
        for kind in estimated.kinds
        for position in sorted(token for role in roles if role != "before" for token in places[role])
        for layer in range(estimated.layers)
    }


def _largest_first(guess: Mapping[CellName, float]) -> list[CellName]:
    return sorted(guess, key=lambda cell: -abs(guess[cell]))


def _drawn(sizes: Sequence[int], many: int, seed: int) -> list[list[int]]:
    """`many` places of all in lists of these sizes, without replacement, all as likely: those in each list, ascending."""
    ends = np.cumsum(sizes)
    chosen = np.sort(np.random.default_rng(seed).choice(int(ends[-1]), min(many, int(ends[-1])), replace=False))
    which = np.searchsorted(ends, chosen, side="right")
    return [(chosen[which == index] - (ends[index] - size)).tolist() for index, size in enumerate(sizes)]


def upper_bound(hits: int, drawn: int, confidence: float = CONFIDENCE) -> float:
    """The one-sided upper bound of Clopper and Pearson on a share of which `hits` of `drawn` were seen; about 3 / drawn for 0."""
    return 1.0 if hits == drawn else float(beta.ppf(confidence, hits + 1, drawn - hits))


def _rows(some: Compared) -> list[list[Any]]:
    """(kind, token, layer, estimated, exact) a cell."""
    return [
        [*cell, float(guess), float(exact)]
        for cell, guess, exact in zip(some.cells, some.estimated, some.exact, strict=True)
    ]


def _plain(value: float) -> float | None:
    return None if np.isnan(value) else value


def _number(value: float) -> str:
    return "undefined" if np.isnan(value) else f"{value:.2f}"


def _percent(value: float) -> str:
    return "undefined" if np.isnan(value) else f"{value:.0%}"
