"""From effects to layers: those that bring the answers back most by a rule, and whether the evidence singles them out.

The published method gives no rule; these are reconstructions that can also say no. Rules are `tracing.plan.rules`, how sure a
pick is is `tracing.plan.evidence`, what that comes to in a sentence `tracing.plan.verdict`; here they are put together into a
`tracing.plan.layer_plan.LayerPlan`. Nothing is traced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

from lm.anatomy import Kind
from lm.errors import UserError
from tracing.arrays import Array
from tracing.bootstrap import check_confidence, interval, mean_over_facts, resample_counts, weighted_means
from tracing.effects.effects import Effects
from tracing.effects.layer_scores import LayerScores
from tracing.effects.roles import SUBJECT_ROLES, Aggregation
from tracing.plan.evidence import Required, judge, judge_by_permutation
from tracing.plan.layer_plan import LayerPlan, control_layers
from tracing.plan.rules import Band, Rule, RuleName, make_rule
from tracing.plan.verdict import too_little, verdict
from tracing.question.facts import facts_hash

PlanKind = Literal["mlp", "attn", "both", "resid"]


def choose_layers(
    measured: Effects | LayerScores,
    *,
    size: int | None = None,
    rule: RuleName = "band",
    share: float = 0.5,
    kind: PlanKind = "mlp",
    roles: Sequence[str] = SUBJECT_ROLES,
    seed: int = 0,
    confidence: float = 0.95,
    stability: float = 0.9,
    resamples: int = 1000,
    least_share: float = 0.05,
    aggregation: Aggregation = "fixed",
) -> LayerPlan:
    """The layers that a rule picks from the effects, and whether the evidence singles them out.

    Badge: *reconstruction*. The authors of the joint method read their layers off a heat map by eye; no rule is
    published. Here a layer's score is the mean over facts of the indirect effect of restoring `kind` there, averaged
    within each of the `roles` and then over the roles that a fact has (of another localizer: the mean of its scores over
    facts). `both` adds mlp and attn. From these scores a rule of `tracing.plan.rules` picks layers.

    They are *singled out* if, over bootstrap resamples of the facts (grouped by person),

    1. their score less that of the other layers (of a band: less the mean of all other bands') is above zero at the lower
       end of the interval,
    2. their score itself is,
    3. in at least `stability` of the resamples the rule picks the same layers or shares three quarters of them,
    4. facts that took no part agree: for each resample the rule picks on the facts drawn and is compared, as in
       1, on those not drawn; that too is above zero in at least `stability` of the resamples. The pick is the best
       of many on these very facts, which alone makes 1 too kind,
    5. shuffled layers do not do as well: with the layers shuffled within each group the same rule picks something as far
       above the rest in at most 1 - `confidence` of the shuffles (`tracing.plan.permutation` states the null hypothesis), and
    6. it matters: the score of the best chosen layer is at least `least_share` of what the corruption took (the mean
       total effect). A tiny effect can be certain too. Not asked of localizers whose scores are a part of nothing.

    The rule `permutation` asks instead of 1, 3, 4 and 5 that each layer stands out from shuffled ones, with all layers paid for.

    Otherwise the plan still names the rule's pick, with `singled_out` False and a verdict that says why. On made-up
    effects without any preference among layers each rule singles layers out in fewer than 5 % of the draws (a test).

    Args:
        measured: what tracing or another localizer gave.
        size: how many layers; for `band` and `top` only, where None is three eighths of them.
        rule: how layers are picked from their scores.
        share: how much of all positive effect `mass` must hold.
        kind: `mlp`, `attn`, `both` (then `modules` keeps those of the two whose effect in these layers is above zero at the
            lower end of its interval, or the larger one if neither is), or `resid` (whole blocks: `modules` is `all`).
        roles: the token roles that count, of `Effects`.
        aggregation: which positions a role has: see `tracing.effects.roles.token_roles`.
        seed: of the resampling, the shuffles and the random control.

    Raises:
        UserError: a size that does not fit the model or the rule, a kind that was not traced, roles that no fact has.
    """
    layer_scores = measured if isinstance(measured, LayerScores) else measured.scores(roles, aggregation)
    layers = layer_scores.layers
    _check(kind, confidence, stability)
    picks = make_rule(rule, size=size, share=share, layers=layers)
    parts = {part_kind: layer_scores.of(part_kind) for part_kind in _parts(kind)}
    scores = np.sum(list(parts.values()), axis=0)
    counts = resample_counts(layer_scores.groups, resamples, seed)
    means = mean_over_facts(scores)
    drawn = weighted_means(scores, counts)
    drawn, counts = drawn[~np.isnan(drawn).any(axis=1)], counts[~np.isnan(drawn).any(axis=1)]
    required = Required(confidence=confidence, stability=stability)
    if picks is None:
        judged = judge_by_permutation(scores, layer_scores.groups, counts, required, seed)
    else:
        judged = judge(picks, scores, layer_scores.groups, counts, required, seed)
    chosen = judged.layers
    taken = None if layer_scores.total is None else float(layer_scores.total.mean())
    best = float(means[list(chosen)].max())
    part = None if taken is None else best / taken if taken > 0 else 0.0
    against = [*judged.against, *too_little(part, least_share)]
    window = int(layer_scores.details.get("window", 1)) if kind != "resid" else 1
    low, high = interval(drawn, confidence)
    evidence = {
        "kind": kind,
        "rule": rule,
        "source": layer_scores.source,
        "unit": layer_scores.unit,
        "roles": list(layer_scores.details.get("roles", ())),
        "layer_scores": _floats(means),
        "layer_low": _floats(low),
        "layer_high": _floats(high),
        "confidence": confidence,
        "stability_asked": stability,
        "least_share_asked": least_share,
        **({"mass_asked": share} if rule == "mass" else {}),
        "aggregation": layer_scores.details.get("aggregation"),
        **judged.numbers,
        **({} if part is None else {"share_of_total": part}),
        **(_bands(picks, means, drawn, confidence) if isinstance(picks, Band) else {}),
        "other_kinds_in_band": {
            part_kind: float(np.sum(layer_scores.mean(part_kind)[list(chosen)]))
            for part_kind in layer_scores.kinds
            if part_kind not in parts
        },
        "mean_total_effect": taken,
        "caveats": _caveats(layer_scores, len(chosen), window),
    }
    return LayerPlan(
        layers=chosen,
        modules=_modules(kind, parts, counts, chosen, confidence),
        rule=(
            f"{_said(picks, layers)} mean {layer_scores.unit} of {'mlp and attn' if kind == 'both' else kind} "
            f"({layer_scores.source})"
        ),
        singled_out=not against,
        verdict=verdict(
            chosen,
            against,
            judged.favor,
            part=part,
            restored=_restored(kind, window),
            roles=layer_scores.details.get("roles", ()),
        ),
        evidence=evidence,
        controls=control_layers(chosen, means, seed),
        provenance={
            **layer_scores.provenance,
            "model_layers": layers,
            **{
                name: layer_scores.details[name]
                for name in ("sigma", "metric", "window")
                if name in layer_scores.details
            },
            "facts_used": [fact.label for fact in layer_scores.facts],
            "facts_sha256": facts_hash(layer_scores.facts),
            "facts_left_out": layer_scores.details.get("left_out", {}),
            "resamples": resamples,
            "seed": seed,
        },
    )


def _check(kind: str, confidence: float, stability: float) -> None:
    if kind not in get_args(PlanKind):
        raise UserError(f"the plan's kind {kind!r} is unknown: use one of {', '.join(get_args(PlanKind))}")
    check_confidence(confidence)
    if not 0 < stability <= 1:
        raise UserError(f"the plan's stability is {stability}: give a share above 0 and up to 1 (0.9 is usual)")


def _parts(kind: PlanKind) -> tuple[Kind, ...]:
    return ("mlp", "attn") if kind == "both" else (kind,)


def _said(rule: Rule | None, layers: int) -> str:
    return rule.said(layers) if rule is not None else f"of {layers} layers those that stand out from shuffled ones by"


def _restored(kind: PlanKind, window: int) -> str:
    restored = " and ".join(_parts(kind)) if kind != "resid" else "the stream"
    return restored + (f" (windows of {window} layers)" if window > 1 else "")


def _bands(rule: Band, means: Array, drawn: Array, confidence: float) -> dict[str, Any]:
    """The scores of all bands, for who wants to draw them."""
    low, high = interval(rule.sums(drawn), confidence)
    return {
        "band_starts": list(range(len(means) - rule.size + 1)),
        "band_scores": _floats(rule.sums(means)),
        "band_low": _floats(low),
        "band_high": _floats(high),
    }


def _modules(
    kind: str, parts: Mapping[Kind, Array], counts: Array, chosen: Sequence[int], confidence: float
) -> tuple[str, ...]:
    if kind == "resid":
        return ("all",)
    if kind != "both":
        return (kind,)
    sums = {module: scores[:, list(chosen)].sum(axis=1) for module, scores in parts.items()}
    carried = [module for module, values in sums.items() if interval(weighted_means(values, counts), confidence)[0] > 0]
    largest = max(sums, key=lambda module: float(mean_over_facts(sums[module])))
    return tuple(carried or [largest])


def _caveats(layer_scores: LayerScores, size: int, window: int) -> list[str]:
    caveats = [
        "Localizing shows where an answer is carried, not where training works best: compare with the controls.",
        "These layers carry other answers as well: wiping them removes what is to be kept too, unless it is shown again.",
    ]
    if window > 1:
        caveats.append(
            f"Windows of {window} layers blur neighboring layers"
            + (f", and are wider than the plan of {size}" if window > size else "")
            + "; those at the edges hold fewer layers."
        )
    if left := layer_scores.details.get("left_out"):
        caveats.append(f"{len(left)} of {len(left) + len(layer_scores.facts)} facts were left out.")
    return caveats


def _floats(values: Array) -> list[float]:
    return [float(value) for value in values]
