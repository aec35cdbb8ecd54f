"""What a trace found, in sentences with numbers: what the corruption took, and which activation brings most of it back.

Shares are of averages: the mean effect over the mean total effect of the same facts (`tracing.bootstrap.shares`). Where the
corruption took nothing there are none, and a sentence says so. Layers are chosen elsewhere (`tracing.plan.choose`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lm.anatomy import Kind
from tracing.arrays import Array
from tracing.bootstrap import mean_over_facts, share_of
from tracing.effects.cells import Cells
from tracing.effects.roles import ROLES, SUBJECT_ROLES
from tracing.effects.table import EffectTable
from tracing.question.sweep import cut_windows, window_layers

_PLACES = {"resid": "the stream after", "mlp": "the MLP of", "attn": "the attention of"}
_SEVERAL = {"mlp": "MLPs of", "attn": "attention of"}


def named(table: EffectTable, row: int, layer: int) -> str:
    """A cell of a table in words: what was put back, and where."""
    put = window_layers(layer, table.window, table.mean.shape[1], table.kind)
    several = len(put) > 1
    what = (
        f"the {_SEVERAL[table.kind]} layers {put[0]}-{put[-1]}" if several else f"{_PLACES[table.kind]} layer {put[0]}"
    )
    return f"{what} at the {table.roles[row].replace('_', ' ')} token"


def put_back(kinds: Sequence[Kind], window: int) -> str:
    """What is restored at a time."""
    several = [_SEVERAL[kind].removesuffix(" of") for kind in kinds if kind != "resid"]
    if window == 1 or not several:
        return "one clean activation"
    return f"one clean activation ({' and '.join(several)}: {window} layers together)"


def peak(kind: Kind, roles: Sequence[str], values: Array) -> tuple[int, int] | None:
    """The row and layer of the largest of (roles, layers); None where there are no numbers.

    Of the stream only the subject's tokens count, if any was traced: at the last token its end is the answer's first token, so
    that it brings back all of that one whatever the model.
    """
    subject = np.isin(roles, SUBJECT_ROLES)[:, None] & ~np.isnan(values)
    seen = subject if kind == "resid" and subject.any() else ~np.isnan(values)
    if not seen.any():
        return None
    row, layer = np.unravel_index(int(np.where(seen, values, -np.inf).argmax()), values.shape)
    return int(row), int(layer)


def brought_back(effects: Cells) -> str:
    """The largest share that one restored activation brings back, of all kinds and token roles (`peak`), in a few words."""
    peaks = []
    for kind in effects.kinds:
        share = _share(effects, kind)
        cell = peak(kind, ROLES, share)
        if cell is not None:
            peaks.append((float(share[cell]), kind, cell))
    if not peaks:
        return "no shares: it is not above zero"
    most, kind, (row, layer) = max(peaks, key=lambda cell_of_kind: cell_of_kind[0])
    return f"at most {_percent(most)} brought back ({kind} {layer}, {ROLES[row].replace('_', ' ')})"


def sentences(effects: Cells, *, confidence: float = 0.95, seed: int = 0) -> list[str]:
    """The whole summary, a sentence or two a line."""
    if not effects.facts:
        return ["No facts were traced."]
    clean, corrupted, total = (float(one.mean()) for one in (effects.clean, effects.corrupted, effects.total))
    many = f"{len(effects.facts)} fact{'s' if len(effects.facts) > 1 else ''}"
    stream = (
        " (the stream counts at subject tokens alone: at the last token it ends as the answer's first token)"
        if "resid" in effects.kinds
        else ""
    )
    changes = "lowers" if total >= 0 else "raises"
    lines = [
        f"The corruption {changes} the answer's mean {effects.metric.replace('_', ' ')} by {abs(total):.3g}, from {clean:.3g} to "
        f"{corrupted:.3g}, on {many}. Restoring {put_back(effects.kinds, effects.window)} brings back at most{stream}:"
    ]
    for kind in effects.kinds:
        table = effects.table(kind, confidence=confidence, seed=seed)
        cell = peak(kind, table.roles, table.mean)
        if cell is None:
            continue
        row, layer = cell
        share, low, high = (float(one[row, layer]) for one in (table.share, table.share_low, table.share_high))
        spread = f" ({confidence:.0%} interval {_percent(low)} to {_percent(high)})" if not np.isnan(low) else ""
        part = f", {_percent(share)}{spread} of what the corruption took" if not np.isnan(share) else ""
        lines += [f"- {named(table, row, layer)}: {table.mean[row, layer]:.3g}{part}.", *_cut(table)]
    return [*lines, *_without_shares(effects, total)]


def _cut(table: EffectTable) -> list[str]:
    """That windows at the ends hold fewer layers, and what comes back per layer; nothing where all are whole."""
    layers = table.mean.shape[1]
    cut, cell = cut_windows(table.window, layers, table.kind), peak(table.kind, table.roles, table.per_layer)
    if not cut or cell is None:
        return []
    row, layer = cell
    held = ", ".join(f"{table.layers_restored[layer_at]} about layer {layer_at}" for layer_at in cut)
    return [
        f"  Windows of {table.window} are cut short by the ends of the model ({held}). Per layer restored, "
        f"most comes back from {named(table, row, layer)}: {table.per_layer[row, layer]:.3g} each."
    ]


def _percent(share: float) -> str:
    """With one decimal, and without a minus before nothing."""
    return f"{round(float(share), 3) + 0.0:.1%}"


def _share(effects: Cells, kind: Kind) -> Array:
    """(roles, layers): as in `Cells.table`, without intervals."""
    values = effects.by_role(kind)
    taken = np.where(np.isnan(values), np.nan, effects.total[:, None, None])
    return share_of(mean_over_facts(values), mean_over_facts(taken))


def _without_shares(effects: Cells, total: float) -> list[str]:
    """Of what nothing can be a share."""
    if not total > 0:
        return [f"There are no shares: on average the corruption took nothing ({total:.3g})."]
    none = int((~(effects.total > 0)).sum())
    if not none:
        return []
    one = none == 1
    return [
        f"The corruption took nothing of {none} fact{'' if one else 's'}: {'it has' if one else 'they have'} no share of "
        f"{'its' if one else 'their'} own, and count{'s' if one else ''} in the means."
    ]
