"""What forget rows should come to: measured on calibration rows of the same kind, which the model never saw, as it changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lm.data.rows import Row
from lm.devices import sum_over_processes
from lm.errors import UserError
from lm.prompts import Encoded
from unlearn.forward.passes import Passes
from unlearn.objectives import Calibrated, RowTargets

Measured = Mapping[str, Sequence[float]]
"""`value` and `spread` of every forget row, as plain numbers: what a checkpoint keeps."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Measures both kinds of rows, group by group.

    Attributes:
        forget, calibration: the rows, encoded as the forget term reads them.
        forget_rows, calibration_rows: what they were made of.
        size: texts at once on each process.
        seed: of which calibration rows are measured, where there are more than `objective.most`.
    """

    passes: Passes
    objective: Calibrated
    forget: Sequence[Encoded]
    forget_rows: Sequence[Row]
    calibration: Sequence[Encoded]
    calibration_rows: Sequence[Row]
    size: int
    seed: int

    def due(self, step: int, before: Measured | None) -> bool:
        """Whether it is time to measure: nothing is known yet, or the step is a multiple of `objective.renew`."""
        return before is None or step % self.objective.renew == 0

    def renewed(self, step: int, before: Measured | None) -> Measured:
        """What every forget row should come to now: half as `before`, where there is one. Every process must call it."""
        groups = groups_of(self.objective, self.forget_rows, self.calibration_rows)
        value, spread = [0.0] * len(self.forget), [0.0] * len(self.forget)
        for number, (forget, calibration) in enumerate(groups.values()):
            chosen = self._some(calibration, step, number)
            unseen = self._measured([self.calibration[place] for place in chosen])
            own = (
                self._measured([self.forget[place] for place in forget])
                if self.objective.reads_forget
                else unseen.new_zeros(len(forget))
            )
            for place, target in zip(forget, self.objective.targets(own, unseen).tolist(), strict=True):
                value[place], spread[place] = target, float(unseen.std(correction=0))
        if before is None:
            return {"value": value, "spread": spread}
        return {
            name: [(old + new) / 2 for old, new in zip(before[name], now, strict=True)]
            for name, now in (("value", value), ("spread", spread))
        }

    def _some(self, rows: Sequence[int], step: int, group: int) -> list[int]:
        most = self.objective.most
        if len(rows) <= most:
            return list(rows)
        drawn = np.random.default_rng((self.seed, 4, step, group)).permutation(len(rows))[:most]
        return [rows[place] for place in sorted(drawn.tolist())]

    def _measured(self, texts: Sequence[Encoded]) -> Tensor:
        """(texts,) on the CPU in float64, the same on every process."""
        acc, order = self.passes.acc, sorted(range(len(texts)), key=lambda place: len(texts[place].ids))
        found = torch.zeros(len(texts), dtype=torch.float64, device=acc.device)
        pieces = [order[first : first + self.size] for first in range(0, len(order), self.size)]
        mine = pieces[acc.process_index :: acc.num_processes]
        turns = -(-len(pieces) // acc.num_processes)  # as many on every process: shards are gathered in a forward
        for turn in range(turns):
            piece = mine[turn] if turn < len(mine) else []
            logprobs = self.passes.logprobs([texts[place] for place in piece])
            for place, logprob in zip(piece, logprobs, strict=True):
                found[place] = self.objective.measure(logprob.float()).double()
        return sum_over_processes(found).cpu()


def groups_of(
    objective: Calibrated, forget: Sequence[Row], calibration: Sequence[Row]
) -> dict[str, tuple[list[int], list[int]]]:
    """Group -> the places of its forget rows and of its calibration rows.

    Raises:
        UserError: a forget row without a calibration row of its group.
    """

    def group(row: Row) -> str:
        kind = "completions" if row.kind == "sc" else "questions"
        return kind if objective.groups == "kind" else f"{kind} of {row.task}"

    groups: dict[str, tuple[list[int], list[int]]] = {}
    for side, rows in enumerate((forget, calibration)):
        for place, row in enumerate(rows):
            if objective.draws(row.kind):
                groups.setdefault(group(row), ([], []))[side].append(place)
    for name, (own, unseen) in groups.items():
        if own and not unseen:
            raise UserError(
                f"there are forget rows and no calibration rows that are {name}: give some, set objective.groups to kind, or "
                "give that kind the weight 0"
            )
    return {name: both for name, both in groups.items() if both[0]}


def row_targets(
    rows: Sequence[Row], measured: Measured | None, chosen: Sequence[int], device: torch.device
) -> RowTargets:
    """What some rows should come to, as tensors; zeros where nothing is measured yet. For no rows: those of one that is none."""
    known = measured or {"value": [0.0] * len(rows), "spread": [0.0] * len(rows)}
    documents = [rows[place].kind == "sc" for place in chosen] or [False]
    numbers = {name: [known[name][place] for place in chosen] or [0.0] for name in ("value", "spread")}
    return RowTargets(
        value=torch.tensor(numbers["value"], device=device),
        spread=torch.tensor(numbers["spread"], device=device),
        document=torch.tensor(documents, device=device),
    )
