"""What an attack came to: a comparison for each way of attacking, and the worst of all. As text, and as `attack.json`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from unlearn.attacks.base import Attack
from unlearn.attacks.comparison.audit import Audit, Residue
from unlearn.attacks.comparison.curves import Comparison
from unlearn.attacks.comparison.worst import Worst, worst_of


@dataclass(frozen=True)
class AttackResult:
    """The comparison for each name and variant that trials have, in order, and beside it the audit."""

    attack: Attack
    comparisons: tuple[Comparison, ...]
    audits: tuple[Audit | None, ...] = ()
    """Beside each comparison, what the models make of others; none where nobody else was asked."""

    @cached_property
    def worst(self) -> Worst | None:
        """The cell of the grid (given rows x way x level above 0) with the largest mean gap to the retain model; None without
        one, or with one that knew the answers."""
        return worst_of(self.comparisons)

    @property
    def worst_sentence(self) -> str:
        """The worst cell in a sentence; empty where there is none."""
        worst = self.worst
        return "" if worst is None else worst.sentence(self.attack.unit, self.comparisons[worst.place].confidence)

    @cached_property
    def residue(self) -> tuple[Residue, Residue] | None:
        """How much likelier forgotten answers are than never-seen ones, before and after the attack that leaves most; None where
        nobody unseen was asked, or there is no retain model."""
        place = self._most_left
        return None if place is None else (self._audit(place).residue(0), self._audit(place).residue(1))

    @property
    def residue_sentence(self) -> str:
        """The residue in words; without a retain model, what the first audit found; empty where nobody else was asked."""
        place = self._most_left
        if place is None:
            return next((audit.sentence for audit in self.audits if audit is not None), "")
        return self._audit(place).sentence

    @cached_property
    def _most_left(self) -> int | None:
        after = {place: audit.residue(1).mean for place, audit in enumerate(self.audits) if audit is not None}
        known = [place for place, mean in after.items() if not np.isnan(mean)]
        return max(known, key=lambda place: after[place], default=None)

    def _audit(self, place: int) -> Audit:
        audit = self.audits[place]
        assert audit is not None
        return audit

    def __str__(self) -> str:
        """A table and a sentence for each, the worst, and the residue."""
        parts = [
            f"{each.title}: {each.given:.0f} rows given, {len(each.ids)} rows of {each.people} people asked"
            + (f", {each.told:.0f} left out (a given row tells the answer)" if each.told else "")
            + f"\n{each.table(self.attack.unit)}\n{each.sentence(self.attack.words)}"
            for each in self.comparisons
        ]
        for place, audit in enumerate(self.audits):
            if audit is not None:
                left = (
                    f"\n{audit.left_out} forgotten rows are of a task and kind that no unseen row has"
                    if audit.left_out
                    else ""
                )
                parts[place] += f"\n{audit.table()}{left}"
        return "\n\n".join([*parts, *filter(None, (self.worst_sentence, self.residue_sentence))])

    def to_json(self) -> dict[str, Any]:
        """Everything as plain data, as in `attack.json`."""
        words = self.attack.words
        audits = self.audits or (None,) * len(self.comparisons)
        trials = [
            {**each.to_json(), "sentence": each.sentence(words), "audit": None if audit is None else audit.to_json()}
            for each, audit in zip(self.comparisons, audits, strict=True)
        ]
        worst = None if self.worst is None else {**self.worst.to_json(), "sentence": self.worst_sentence}
        return {"unit": self.attack.unit, "trials": trials, "worst": worst, "residue": self._residue()}

    def _residue(self) -> dict[str, Any] | None:
        if self.residue is None or self._most_left is None:
            return None
        most = self.comparisons[self._most_left]
        before, after = (each.to_json() for each in self.residue)
        where = {"given": most.name, "learning_rate": most.learning_rate}
        return {"before": before, "after": after, **where, "sentence": self.residue_sentence}
