"""What a trace found, in sentences with numbers: what the corruption took, and which activation brings most of it back.

Shares are of averages: the mean effect over the mean total effect of the same facts (`tracing.statistics.shares`). Where the
corruption took nothing there are none, and a sentence says so. Layers are chosen elsewhere (`tracing.choose`).
"""

from __future__ import annotations

import numpy as np

from lm.anatomy import Kind
from tracing.arrays import Array
from tracing.effects import ROLES, Effects
from tracing.statistics import mean_over_facts, share_of

_PLACES = {"resid": "the stream after layer", "mlp": "the MLP of layer", "attn": "the attention of layer"}


def named(kind: Kind, layer: int, role: str) -> str:
    """A cell of the averaged picture in words."""
    return f"{_PLACES[kind]} {layer} at the {role.replace('_', ' ')} token"


def brought_back(effects: Effects) -> str:
    """The largest share that one restored activation brings back, of all kinds and token roles, in a few words."""
    found = {kind: _share(effects, kind) for kind in effects.kinds}
    known = {kind: share for kind, share in found.items() if not np.isnan(share).all()}
    if not known:
        return "no shares: it is not above zero"
    kind = max(known, key=lambda one: float(np.nanmax(known[one])))
    row, layer = highest(known[kind])
    return f"at most {known[kind][row, layer]:.1%} brought back ({kind} {layer}, {ROLES[row].replace('_', ' ')})"


def sentences(effects: Effects, *, confidence: float = 0.95, seed: int = 0) -> list[str]:
    """The whole summary, a sentence or two a line."""
    if not effects.facts:
        return ["No facts were traced."]
    clean, corrupted, total = (float(one.mean()) for one in (effects.clean, effects.corrupted, effects.total))
    many = f"{len(effects.facts)} fact{'s' if len(effects.facts) > 1 else ''}"
    said = [
        f"On {many} the corruption takes {total:.3g} of the answer's mean {effects.metric.replace('_', ' ')} "
        f"({clean:.3g} to {corrupted:.3g}). Putting one clean activation back brings back, at most:"
    ]
    for kind in effects.kinds:
        table = effects.table(kind, confidence=confidence, seed=seed)
        if np.isnan(table.mean).all():
            continue
        row, layer = highest(table.mean)
        share, low, high = (float(one[row, layer]) for one in (table.share, table.share_low, table.share_high))
        spread = f" ({confidence:.0%} interval {low:.1%} to {high:.1%})" if not np.isnan(low) else ""
        part = f", {share:.1%}{spread} of what it took" if not np.isnan(share) else ""
        said.append(f"- {named(kind, layer, table.roles[row])}: {table.mean[row, layer]:.3g}{part}.")
    return [*said, *_without_shares(effects, total)]


def highest(values: Array) -> tuple[int, int]:
    """The row and column of the largest number."""
    row, column = np.unravel_index(int(np.nanargmax(values)), values.shape)
    return int(row), int(column)


def _share(effects: Effects, kind: Kind) -> Array:
    """(roles, layers): as in `Effects.table`, without intervals."""
    values = effects.by_role(kind)
    taken = np.where(np.isnan(values), np.nan, effects.total[:, None, None])
    return share_of(mean_over_facts(values), mean_over_facts(taken))


def _without_shares(effects: Effects, total: float) -> list[str]:
    """Of what nothing can be a share."""
    if not total > 0:
        return [f"There are no shares: on average the corruption took nothing ({total:.3g})."]
    none = int((~(effects.total > 0)).sum())
    if not none:
        return []
    one = none == 1
    return [
        f"Of {none} fact{'' if one else 's'} the corruption took nothing: {'it has' if one else 'they have'} no share of "
        f"{'its' if one else 'their'} own, and count{'s' if one else ''} in the means."
    ]
