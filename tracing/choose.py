"""From effects to layers: the band that brings the answers back most, and whether the evidence singles it out.

The published method gives no rule; this one is a reconstruction that can also say no. What comes out is a
`tracing.plan.LayerPlan`; nothing is traced here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from lm.anatomy import Kind
from lm.errors import UserError
from tracing.arrays import Array
from tracing.effects import SUBJECT_ROLES, Aggregation, Effects
from tracing.plan import LayerPlan, control_layers
from tracing.scores import LayerScores
from tracing.statistics import (
    check_confidence,
    interval,
    mean_over_facts,
    resample_counts,
    units,
    weighted_means,
)

PlanKind = Literal["mlp", "attn", "both", "resid"]


def choose_layers(
    found: Effects | LayerScores,
    *,
    size: int,
    kind: PlanKind = "mlp",
    roles: Sequence[str] = SUBJECT_ROLES,
    seed: int = 0,
    confidence: float = 0.95,
    stability: float = 0.9,
    resamples: int = 1000,
    least_share: float = 0.05,
    aggregation: Aggregation = "fixed",
) -> LayerPlan:
    """The contiguous band of `size` layers that brings the answers back most, and whether the evidence singles it out.

    Badge: *reconstruction*. The authors of the joint method read their layers off a heat map by eye; no rule is
    published. Here a layer's score is the mean over facts of the indirect effect of restoring `kind` there, averaged
    within each of the `roles` and then over the roles that a fact has (of another localiser: the mean of its scores over
    facts); a band's score is the sum over its layers, and the highest wins (the lowest layers of equal ones). `both` adds
    mlp and attn.

    The band is *singled out* if, over bootstrap resamples of the facts (grouped by person),

    1. its score minus the mean of all other bands' is above zero at the lower end of the interval,
    2. its score itself is,
    3. in at least `stability` of the resamples the best band is the same or shares three quarters of its layers, and
    4. facts that took no part agree: for each resample the best band is chosen on the facts drawn and compared, as in
       1, on those not drawn; that too is above zero in at least `stability` of the resamples. The band is the best
       of many on these very facts, which alone makes 1 too kind, and
    5. it matters: the score of the band's best layer is at least `least_share` of what the corruption took (the mean
       total effect). A tiny effect can be certain too. Not asked of localisers whose scores are a part of nothing.

    Otherwise the plan still names the best band, with `singled_out` False and a verdict that says why. On made-up
    effects without any preference among layers the defaults single a band out in fewer than 5 % of the draws (a test).

    Args:
        found: what tracing or another localiser found.
        size: how many layers.
        kind: `mlp`, `attn`, `both` (then `modules` keeps those of the two whose effect in the band is above zero at the
            lower end of its interval, or the larger one if neither is), or `resid` (whole blocks: `modules` is `all`).
        roles: the token roles that count, of `Effects`.
        aggregation: which positions a role has: see `tracing.effects.token_roles`.
        seed: of the resampling and of the random control.

    Raises:
        UserError: a size that does not fit the model, a kind that was not traced, roles that no fact has.
    """
    given = found if isinstance(found, LayerScores) else found.scores(roles, aggregation)
    layers = given.layers
    _check(layers, size, kind, confidence, stability)
    parts = {one: given.of(one) for one in _parts(kind)}
    scores = np.sum(list(parts.values()), axis=0)
    counts = resample_counts(given.groups, resamples, seed)
    means = mean_over_facts(scores)
    drawn = weighted_means(scores, counts)
    drawn, counts = drawn[~np.isnan(drawn).any(axis=1)], counts[~np.isnan(drawn).any(axis=1)]
    bands, drawn_bands = _bands(means, size), _bands(drawn, size)
    best = int(np.argmax(bands))
    chosen = tuple(range(best, best + size))
    numbers = _evidence(scores, drawn_bands, counts, best, size, confidence, units(given.groups))
    taken = None if given.total is None else float(given.total.mean())
    if taken is not None:
        numbers["share_of_total"] = float(means[list(chosen)].max()) / taken if taken > 0 else 0.0
    window = int(given.details.get("window", 1)) if kind != "resid" else 1
    restored = " and ".join(_parts(kind)) if kind != "resid" else "the stream"
    restored += f" (windows of {window} layers)" if window > 1 else ""
    reasons = _reasons(numbers, layers, size, stability, confidence, least_share)
    low, high = interval(drawn, confidence)
    band_low, band_high = interval(drawn_bands, confidence)
    evidence = {
        "kind": kind,
        "source": given.source,
        "unit": given.unit,
        "roles": list(given.details.get("roles", ())),
        "layer_scores": _floats(means),
        "layer_low": _floats(low),
        "layer_high": _floats(high),
        "band_starts": list(range(layers - size + 1)),
        "band_scores": _floats(bands),
        "band_low": _floats(band_low),
        "band_high": _floats(band_high),
        "confidence": confidence,
        "stability_asked": stability,
        "least_share_asked": least_share,
        "aggregation": given.details.get("aggregation"),
        **numbers,
        "other_kinds_in_band": {
            one: float(np.sum(given.mean(one)[list(chosen)])) for one in given.kinds if one not in parts
        },
        "mean_total_effect": taken,
        "caveats": _caveats(given, size, window),
    }
    return LayerPlan(
        layers=chosen,
        modules=_modules(kind, parts, counts, chosen, confidence),
        rule=(
            f"the contiguous band of {size} of {layers} layers with the largest summed mean {given.unit} of "
            f"{'mlp and attn' if kind == 'both' else kind} ({given.source})"
        ),
        singled_out=not reasons,
        verdict=_verdict(chosen, reasons, numbers, confidence, restored),
        evidence=evidence,
        controls=control_layers(chosen, means, seed),
        provenance={
            **given.provenance,
            "model_layers": layers,
            **{name: given.details[name] for name in ("sigma", "metric", "window") if name in given.details},
            "facts_used": [fact.label for fact in given.facts],
            "facts_left_out": given.details.get("left_out", {}),
            "resamples": resamples,
            "seed": seed,
        },
    )


def _check(layers: int, size: int, kind: str, confidence: float, stability: float) -> None:
    if kind not in get_args(PlanKind):
        raise UserError(f"the plan's kind {kind!r} is unknown; use one of {', '.join(get_args(PlanKind))}.")
    if not 1 <= size <= layers:
        raise UserError(f"the plan's size is {size} but the model has {layers} layers; give 1 to {layers}.")
    check_confidence(confidence)
    if not 0 < stability <= 1:
        raise UserError(f"the plan's stability is {stability}; give a share above 0 and up to 1 (0.9 is usual).")


def _parts(kind: PlanKind) -> tuple[Kind, ...]:
    return ("mlp", "attn") if kind == "both" else (kind,)


def _bands(scores: Array, size: int) -> Array:
    """Sums over `size` neighbouring layers: (..., layers) -> (..., layers - size + 1)."""
    bands: Array = np.lib.stride_tricks.sliding_window_view(scores, size, axis=-1).sum(axis=-1)
    return bands


def _margin(bands: Array, best: npt.NDArray[np.int64]) -> Array:
    """A band's score minus the mean of the others': (resamples, bands), (resamples,) -> (resamples,)."""
    own = np.take_along_axis(bands, best[:, None], axis=1)[:, 0]
    others = bands.shape[1] - 1
    return np.asarray(own - (bands.sum(axis=1) - own) / others) if others else np.zeros(len(bands))


def _evidence(
    scores: Array, bands: Array, counts: Array, best: int, size: int, confidence: float, unit: npt.NDArray[np.int64]
) -> dict[str, Any]:
    """The numbers behind `singled_out`."""
    again = bands.argmax(axis=1)
    apart = size - np.ceil(0.75 * size)
    margin = _margin(bands, np.full(len(bands), best))
    low, high = interval(margin, confidence)
    own_low, _ = interval(bands[:, best], confidence)
    unseen = _bands(weighted_means(scores, (counts == 0).astype(np.float64)), size)
    held_out = _margin(unseen, again)
    held_out = held_out[~np.isnan(held_out)]
    return {
        "units": int(unit.max()) + 1,
        "facts": len(scores),
        "margin": float(_margin(_bands(mean_over_facts(scores), size)[None], np.array([best]))[0]),
        "margin_low": float(low),
        "margin_high": float(high),
        "band_score_low": float(own_low),
        "same_band_share": float((again == best).mean()),
        "stable_share": float((np.abs(again - best) <= apart).mean()),
        "held_out_share": float((held_out > 0).mean()) if len(held_out) else 0.0,
    }


def _reasons(
    found: Mapping[str, Any], layers: int, size: int, stability: float, confidence: float, least_share: float
) -> list[str]:
    """Why the band is not singled out; empty if it is."""
    if size == layers:
        return [f"the plan takes all {layers} layers, so there is nothing to compare with"]
    if found["units"] < 3:
        return [f"only {found['units']} independent group(s) of facts were traced, at least 3 are needed"]
    reasons = []
    if not found["band_score_low"] > 0:
        reasons.append(f"its effect is not above zero (lower {confidence:.0%} bound {found['band_score_low']:.3g})")
    if not found["margin_low"] > 0:
        reasons.append(
            f"it does not beat the mean of the other bands (lower {confidence:.0%} bound {found['margin_low']:.3g})"
        )
    if found["stable_share"] < stability:
        reasons.append(f"a like band wins in only {found['stable_share']:.0%} of the resamples ({stability:.0%} asked)")
    if found["held_out_share"] < stability:
        reasons.append(
            f"on facts held out of the choice the band wins in only {found['held_out_share']:.0%} of the resamples "
            f"({stability:.0%} asked)"
        )
    if found.get("share_of_total", 1.0) < least_share:
        reasons.append(
            f"the best layer brings back only {found['share_of_total']:.1%} of what the corruption took "
            f"({least_share:.0%} asked)"
        )
    return reasons


def _verdict(
    chosen: tuple[int, ...], reasons: Sequence[str], found: Mapping[str, Any], confidence: float, restored: str
) -> str:
    several = len(chosen) > 1
    name = f"layers {chosen[0]}-{chosen[-1]}" if several else f"layer {chosen[0]}"
    if reasons:
        has = "have" if several else "has"
        return f"The evidence does not single out layers: {name} {has} the largest effect, but {'; '.join(reasons)}."
    its = "their" if several else "its"
    sentence = (
        f"The evidence singles out {name}: {its} effect exceeds the mean of the other bands by {found['margin']:.3g} "
        f"({confidence:.0%} interval {found['margin_low']:.3g} to {found['margin_high']:.3g}), a like band wins in "
        f"{found['stable_share']:.0%} of the resamples, and {found['held_out_share']:.0%} agree on held-out facts "
        f"({found['facts']} facts)."
    )
    if "share_of_total" not in found:
        return sentence
    return (
        f"{sentence} Restoring {restored} in {'the best of them' if several else 'it'} at one subject token "
        f"brings back {found['share_of_total']:.0%} of what the corruption took, on average."
    )


def _modules(
    kind: str, parts: Mapping[Kind, Array], counts: Array, chosen: Sequence[int], confidence: float
) -> tuple[str, ...]:
    if kind == "resid":
        return ("all",)
    if kind != "both":
        return (kind,)
    sums = {one: scores[:, list(chosen)].sum(axis=1) for one, scores in parts.items()}
    carried = [one for one, values in sums.items() if interval(weighted_means(values, counts), confidence)[0] > 0]
    largest = max(sums, key=lambda one: float(mean_over_facts(sums[one])))
    return tuple(carried or [largest])


def _caveats(given: LayerScores, size: int, window: int) -> list[str]:
    caveats = ["Localising shows where an answer is carried, not where training works best: compare with the controls."]
    if window > 1:
        caveats.append(
            f"Windows of {window} layers blur neighbouring layers"
            + (f", and are wider than the plan of {size}" if window > size else "")
            + "; those at the edges hold fewer layers."
        )
    if left := given.details.get("left_out"):
        caveats.append(f"{len(left)} of {len(left) + len(given.facts)} facts were left out.")
    return caveats


def _floats(values: Array) -> list[float]:
    return [float(value) for value in values]
