"""The two paragraphs at the top of the page, from the numbers alone.

They compare one model, the *focus* (trained in the planned layers, or else the best method), with the model before
unlearning, with the retain model (which never saw the forget rows), with its controls and with the other methods. They say when
any of these does as well, and never more than the numbers do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from unlearn.report import words
from unlearn.report.records import Attacked, Estimate, Report, ReportModel

_OUTCOMES = {
    "more": "more than the retain model",
    "a little more": "a little more than the retain model",
    "as much": "no more than the retain model",
    "less": "less than the retain model",
    "cannot tell": "what cannot be told from the retain model or from more",
}
_DIGITS = 3  # what the tables show; smaller differences are ties


def focus(report: Report) -> ReportModel | None:
    """The model that the page is about: the first planned one, else the method with the best measure; None without any."""
    planned = report.only("planned")
    if planned:
        return planned[0]
    return max(report.methods, key=lambda model: (_known(model.task_aggregate), _known(model.final)), default=None)


def verdict(report: Report) -> list[str]:
    """The sentences of both paragraphs, in order."""
    return [sentence for paragraph in paragraphs(report) for sentence in paragraph]


def paragraphs(report: Report) -> list[list[str]]:
    """The paragraphs as sentences: what was found, with what comes back under attack; and how that compares."""
    about = focus(report)
    reference = next(iter(report.only("reference")), None)
    retain_model = next(iter(report.only("retain_model")), None)
    if about is None:
        return [
            [_located(report), "No unlearned model is in this report, so nothing can be said about forgetting."],
        ]
    wiped = [model for model in report.only("wiped") if model is not about]
    rivals = [model for model in report.methods if model is not about and model not in wiped]
    found = [
        _located(report),
        _aggregate(about, reference, retain_model, len(report.methods)),
        *_membership(about, retain_model),
        *_utility(about, reference),
        *map(_wiped, wiped),
        *_attacked(report),
    ]
    compared = [*_weakest(about), *_garbled(about, retain_model)]
    if rivals or not wiped:
        compared += _rivals(about, rivals, about.part == "planned")
    compared += _outcomes([each for each in report.attacks if each.gap is not None])
    return [found, compared] if compared else [found]


def _located(report: Report) -> str:
    plan = report.plan
    if plan is None:
        return "No layers were located for this report."
    if not plan.evidence:
        return f"The plan trains {words.layer_name(plan.layers)}; it holds no evidence from tracing."
    if plan.singled_out:
        of = f" of {report.model_layers}" if report.model_layers else ""
        return f"Tracing singles out {words.layer_name(plan.layers)}{of} as carrying the answers."
    kept = f"{words.layer_name(plan.layers)} had the largest effect and "
    return f"The evidence does not single out layers: {kept}{'were' if len(plan.layers) > 1 else 'was'} trained all the same."


def _aggregate(
    about: ReportModel, reference: ReportModel | None, retain_model: ReportModel | None, methods: int
) -> str:
    value = about.task_aggregate
    if math.isnan(value):
        return f"“{about.label}” has no task aggregate."
    best = "" if about.part == "planned" or methods == 1 else ", the best of the methods,"
    text = f"“{about.label}”{best} reaches a task aggregate of {words.score(value)}"
    if reference is not None and not math.isnan(reference.task_aggregate):
        text += f" (before unlearning: {words.score(reference.task_aggregate)})"
    if retain_model is None or math.isnan(retain_model.task_aggregate) or retain_model.task_aggregate == 0:
        return f"{text}. No retain model was scored, so how high it could honestly go is not known."
    ceiling = f"the {words.score(retain_model.task_aggregate)} of the retain model, which never saw the forget rows"
    if _tied(value, retain_model.task_aggregate):
        return f"{text}, equal to {ceiling}."
    if value < retain_model.task_aggregate:
        return f"{text}, {words.percent(value / retain_model.task_aggregate)} of {ceiling}."
    return (
        f"{text}, above {ceiling}. More than that ceiling is no merit: it means behaving unlike a model that never saw "
        "the rows."
    )


def _weakest(about: ReportModel) -> list[str]:
    known = [(term, index) for index, term in enumerate(about.terms) if not math.isnan(term)]
    if not known:
        return []
    lowest = min(known)[0]
    names = [words.term_name(index) for term, index in known if _tied(term, lowest)]
    if _tied(lowest, 1.0):
        return [f"All {len(names)} terms of “{about.label}” that apply are {words.score(lowest)}."]
    if len(names) > 3:
        return [f"{len(names)} of the {len(known)} terms of “{about.label}” are as low as {words.score(lowest)}."]
    if len(names) > 1:
        return [f"The weakest terms of “{about.label}” are {words.listing(names)}, {words.score(lowest)} each."]
    return [f"The weakest term of “{about.label}” is {names[0]}, {words.score(lowest)}."]


def _membership(about: ReportModel, retain_model: ReportModel | None) -> list[str]:
    if math.isnan(about.mia_auc):
        return ["Membership inference was not measured."]
    other = (
        ""
        if retain_model is None or math.isnan(retain_model.mia_auc)
        else f", the retain model has {words.score(retain_model.mia_auc)}"
    )
    return [f"The membership AUC is {words.score(about.mia_auc)} (0.5 would tell nothing{other})."]


def _garbled(about: ReportModel, retain_model: ReportModel | None) -> list[str]:
    value = about.value("garbled")
    if math.isnan(value):
        return []
    text = f"At least {words.percent(value)} of its answers to forget rows are garbled"
    if retain_model is None or math.isnan(retain_model.value("garbled")):
        return [f"{text}."]
    return [f"{text} (retain model: {words.percent(retain_model.value('garbled'))})."]


def _utility(about: ReportModel, reference: ReportModel | None) -> list[str]:
    if math.isnan(about.utility):
        return ["Utility was not measured."]
    text = f"Utility is {words.score(about.utility)}"
    if reference is None or math.isnan(reference.utility) or reference.utility == 0:
        return [f"{text}; there is no value from before unlearning to compare with."]
    return [
        f"{text}, {words.percent(about.utility / reference.utility)} of what it was before ({words.score(reference.utility)})."
    ]


def _rivals(about: ReportModel, rivals: list[ReportModel], planned: bool) -> list[str]:
    """What controls and other methods say against the focus."""
    if not rivals:
        return ["There is no control and no other method to compare with."]
    controls = [model for model in rivals if model.part in ("control", "all_layers")] if planned else []
    sentences = _controls(about, controls) if planned else []
    for other in rivals:
        if other not in controls and at_least(other, about):
            sentences.append(f"The other method “{other.label}” does {against(other, about)}.")
    return sentences


def _controls(about: ReportModel, controls: list[ReportModel]) -> list[str]:
    """Does it matter which layers are trained (controls of equal size), and does it help to train few (all layers)?"""
    every = [model for model in controls if model.part == "all_layers"]
    equal = [model for model in controls if model.part == "control"]
    if not equal:
        sentences = [
            "No control was trained in as many other layers, so nothing shows that the choice of layers matters."
        ]
    elif winners := [model for model in equal if at_least(model, about)]:
        sentences = [f"The control “{control.label}” does {against(control, about)}." for control in winners]
        sentences.append("So these numbers do not show that the choice of layers matters.")
    else:
        each = words.listing([f"“{control.label}” {_measures(control)}" for control in equal])
        sentences = [f"It does better than as many other layers: {each}; each is a single run."]
    for control in every:
        if at_least(control, about):
            sentences.append(f"Training all layers does {against(control, about)}.")
            sentences.append("So these numbers do not show a gain from training only the planned layers.")
        else:
            sentences.append(f"It does better than training all layers: “{control.label}” {_measures(control)}.")
    return sentences


def _wiped(model: ReportModel) -> str:
    """The scores of a method that wipes weights and heals them, beside the one that the page is about."""
    measures = [
        ("a task aggregate of", model.task_aggregate),
        ("a membership AUC of", model.mia_auc),
        ("a utility of", model.utility),
        ("a final score of", model.final),
    ]
    known = [f"{name} {words.score(value)}" for name, value in measures if not math.isnan(value)]
    if not known:
        return f"“{model.label}” wipes weights and heals them; it was not scored."
    return f"“{model.label}”, which wipes weights and heals them, reaches {words.listing(known)}."


def _attacked(report: Report) -> list[str]:
    """What attacks brought back at worst, and what is left by likelihood; an attack that names no worst in words."""
    sentences = _outcomes([each for each in report.attacks if each.gap is None])
    gaps = [(each.label, each.gap) for each in report.attacks if each.gap is not None]
    if gaps:
        attack = words.listing(sorted({each.attack.lower() for each in report.attacks if each.gap is not None}))
        brought = [
            f"{words.signed(gap[0])}{_interval(gap, words.signed)} of the answers of “{label}”" for label, gap in gaps
        ]
        sentences.append(
            f"At worst {attack} brings back, beyond what the retain model says under the same attack, {words.listing(brought)}."
        )
    audits = [(each.label, each.audit) for each in report.attacks if each.audit is not None]
    left = [(label, audit.residue[1]) for label, audit in audits if audit.residue is not None]
    if left:
        nats = [f"{words.nats(each[0])} nats a token{_interval(each, words.nats)} in “{label}”" for label, each in left]
        sentences.append(
            "Afterwards forgotten answers are likelier than those of people never seen, beyond the retain model's own "
            f"difference, by {words.listing(nats)}; 0 would be nothing left."
        )
    return sentences


def _outcomes(attacks: Sequence[Attacked]) -> list[str]:
    """What each attack brought back in words, by what the attacker had."""
    sentences = []
    for attacked in attacks:
        outcomes: dict[str, list[str]] = {}
        for trial in attacked.trials:
            outcomes.setdefault(_OUTCOMES.get(trial.verdict, trial.verdict), []).append(trial.name.replace("_", " "))
        parts = [f"{outcome} ({', '.join(names)})" for outcome, names in outcomes.items()]
        sentences.append(
            f"Attacked by {attacked.attack.lower()}, “{attacked.label}” gives back {words.listing(parts)}."
        )
    return sentences


def _interval(estimate: Estimate, text: Callable[[float], str]) -> str:
    """Its interval in brackets, and whether it holds 0; empty where there is none."""
    _, low, high = estimate
    if math.isnan(low + high):
        return ""
    chance = ", which holds 0" if low <= 0 <= high else ""
    return f" (interval {text(low)} to {text(high)}{chance})"


def at_least(rival: ReportModel, about: ReportModel) -> bool:
    """Whether a rival equals or beats the focus in the task aggregate or the final score, as far as both are known."""
    return any(_not_below(mine, its) for _, mine, its in _pairs(rival, about))


def against(rival: ReportModel, about: ReportModel) -> str:
    """`at least as well in the final score (task aggregate 0.931 against 0.948, final score 0.822 against 0.812)`."""
    pairs = _pairs(rival, about)
    ahead = [name for name, mine, its in pairs if _not_below(mine, its)]
    where = "" if len(ahead) == len(pairs) else f" in the {ahead[0]}"
    numbers = ", ".join(f"{name} {words.score(mine)} against {words.score(its)}" for name, mine, its in pairs)
    return f"at least as well{where} ({numbers})"


def _pairs(rival: ReportModel, about: ReportModel) -> list[tuple[str, float, float]]:
    """The measures that both have: name, the rival's, the focus's."""
    both = [("task aggregate", rival.task_aggregate, about.task_aggregate), ("final score", rival.final, about.final)]
    return [each for each in both if not math.isnan(each[1]) and not math.isnan(each[2])]


def _not_below(mine: float, its: float) -> bool:
    return mine > its or _tied(mine, its)


def _measures(model: ReportModel) -> str:
    final = "" if math.isnan(model.final) else f" (final score {words.score(model.final)})"
    return f"{words.score(model.task_aggregate)}{final}"


def _tied(value: float, other: float) -> bool:
    return round(value, _DIGITS) == round(other, _DIGITS)


def _known(value: float) -> float:
    return -1.0 if math.isnan(value) else value
