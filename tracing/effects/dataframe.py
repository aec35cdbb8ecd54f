"""Every cell of a trace as a row of a table, for pandas. Nothing is averaged here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tracing.effects.cells import Cells
from tracing.effects.roles import token_roles
from tracing.question.sweep import layers_restored

if TYPE_CHECKING:
    import pandas

COLUMNS = (
    "fact",
    "subject",
    "group",
    "kind",
    "position",
    "token",
    "role",
    "layer",
    "clean",
    "corrupted",
    "restored",
    "indirect",
    "total",
    "share",
    "layers_restored",
    "indirect_per_layer",
)


def dataframe(effects: Cells) -> pandas.DataFrame:
    """One row a cell that was computed, in the columns `COLUMNS`.

    `clean`, `corrupted` and `restored` are scores; `indirect` is restored minus corrupted; `total` is clean minus corrupted, of
    the fact; `share` is indirect / total, NaN where the total is not above zero. Do not average `share` over facts: those with a
    small total outweigh the rest. The share of averages is `found.indirect.mean() / found.total.mean()`, as in `Cells.table`.
    `layers_restored` is how many layers were restored together, fewer at the ends of the model; `indirect_per_layer` is
    indirect / layers_restored, so that windows which are cut there can be compared with whole ones.
    """
    import pandas

    rows: list[tuple[Any, ...]] = []
    for kind in effects.kinds:
        many = layers_restored(effects.window, effects.layers, kind)
        shares = effects.indirect(kind, normalized=True)
        for index, (fact, found) in enumerate(zip(effects.facts, effects.restored[kind], strict=True)):
            role_of = {
                place: role
                for role, places in token_roles(len(found), effects.subject_spans[index]).items()
                for place in places
            }
            clean, corrupted = float(effects.clean[index]), float(effects.corrupted[index])
            for place, layer in zip(*(axis.tolist() for axis in np.nonzero(~np.isnan(found))), strict=True):
                restored = float(found[place, layer])
                rows.append(
                    (
                        fact.label,
                        fact.subject,
                        fact.group,
                        kind,
                        place,
                        effects.tokens[index][place],
                        role_of[place],
                        layer,
                        clean,
                        corrupted,
                        restored,
                        restored - corrupted,
                        clean - corrupted,
                        float(shares[index][place, layer]),
                        many[layer],
                        (restored - corrupted) / many[layer],
                    )
                )
    return pandas.DataFrame(rows, columns=list(COLUMNS))
