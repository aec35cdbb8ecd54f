"""Whom the forgotten are compared with: people whom the model kept, and people whom neither model ever saw. No model here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lm.data.rows import Row
from lm.errors import UserError
from lm.row_files import canonical_id, row_name
from unlearn.attacks.base import Trial
from unlearn.attacks.splits import without_told


@dataclass(frozen=True)
class Others:
    """Rows of people who were not forgotten, of tasks and kinds that forget rows have.

    Attributes:
        retained: of as many documents of each task as the forget rows have, or all there are.
        unseen: of people whom neither model saw.
    """

    retained: tuple[Row, ...] = ()
    unseen: tuple[Row, ...] = ()

    @property
    def rows(self) -> tuple[Row, ...]:
        """All of them."""
        return (*self.retained, *self.unseen)

    def beside(self, trial: Trial) -> Trial:
        """The trial with the rows to ask beside the forgotten ones: those that the attacker was neither given nor told.

        Raises:
            UserError: the attacker was given a row of somebody whom no model should have seen.
        """
        given = _Known(trial.given)
        for row in self.unseen:
            if row in given:
                raise UserError(
                    f"row {row_name(row)} of unseen is given to the attacker ({trial.name}), and then it is no longer unseen: "
                    "name other rows in unseen or in attack.unrelated"
                )
        kept = tuple(row for row in self.rows if row not in given)
        return replace(trial, beside=without_told(trial.given, kept))


def others_of(forget: Sequence[Row], retain: Sequence[Row], unseen: Sequence[Row], *, seed: int = 0) -> Others:
    """Who is asked beside the forgotten; nobody if there are no unseen rows.

    Args:
        forget: what was to be forgotten.
        retain: what was kept: whole documents of it are drawn, task by task.
        unseen: of people whom neither model saw.
        seed: of the draw.

    Raises:
        UserError: an unseen row that is a forget or a retain row, or none that is of a task and kind of the forget rows.
    """
    if not unseen:
        return Others()
    for name, rows in (("forget", forget), ("retain", retain)):
        known = _Known(rows)
        for row in unseen:
            if row in known:
                raise UserError(
                    f"row {row_name(row)} of unseen is a {name} row too: name rows of people whom neither model saw"
                )
    cells = {(row.task, row.kind) for row in forget}
    alike = tuple(row for row in unseen if (row.task, row.kind) in cells)
    if not alike:
        have = ", ".join(sorted({f"{task} ({kind})" for task, kind in cells}))
        raise UserError(f"no row of unseen is of a task and kind of the forget rows ({have}): give such rows")
    drawn = _documents(forget, retain, seed)
    kept = tuple(row for row in retain if row.document in drawn and (row.task, row.kind) in cells)
    return Others(kept, alike)


def _documents(forget: Sequence[Row], retain: Sequence[Row], seed: int) -> set[str]:
    generator = np.random.default_rng((seed, 2))
    drawn: set[str] = set()
    for task in sorted({row.task for row in forget}):
        count = len({row.document for row in forget if row.task == task})
        documents = sorted({row.document for row in retain if row.task == task})
        drawn.update(documents[place] for place in generator.permutation(len(documents))[:count])
    return drawn


class _Known:
    """Rows by id and by text."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.ids, self.texts = {canonical_id(row.id) for row in rows}, {(row.input, row.output) for row in rows}

    def __contains__(self, row: Row) -> bool:
        return canonical_id(row.id) in self.ids or (row.input, row.output) in self.texts
