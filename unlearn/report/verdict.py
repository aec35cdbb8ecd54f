"""The paragraph at the top of the page, from the numbers alone.

It compares one model, the *focus* (trained in the planned layers, or else the best method), with the model before
unlearning, with the twin that never saw the forget rows, with its controls and with the other methods. It says when
any of these does as well, and never more than the numbers do.
"""

from __future__ import annotations

import math

from unlearn.report import words
from unlearn.report.records import Report, ReportModel

_DIGITS = 3  # what the tables show; smaller differences are ties


def focus(report: Report) -> ReportModel | None:
    """The model that the page is about: the first planned one, else the method with the best measure; None without any."""
    planned = report.only("planned")
    if planned:
        return planned[0]
    return max(report.methods, key=lambda model: (_known(model.task_aggregate), _known(model.final)), default=None)


def verdict(report: Report) -> list[str]:
    """The sentences, in order."""
    about = focus(report)
    base = next(iter(report.only("base")), None)
    twin = next(iter(report.only("twin")), None)
    said = [_located(report)]
    if about is None:
        return [*said, "No unlearned model is in this report, so nothing can be said about forgetting."]
    said += [_aggregate(about, base, twin, len(report.methods)), *_weakest(about), *_membership(about, twin)]
    said += _utility(about, base)
    rivals = [model for model in report.methods if model is not about]
    return [*said, *_rivals(about, rivals, about.part == "planned")]


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


def _aggregate(about: ReportModel, base: ReportModel | None, twin: ReportModel | None, methods: int) -> str:
    value = about.task_aggregate
    if math.isnan(value):
        return f"“{about.label}” has no task aggregate."
    best = "" if about.part == "planned" or methods == 1 else ", the best of the methods,"
    text = f"“{about.label}”{best} reaches a task aggregate of {words.score(value)}"
    if base is not None and not math.isnan(base.task_aggregate):
        text += f" (before unlearning: {words.score(base.task_aggregate)})"
    if twin is None or math.isnan(twin.task_aggregate) or twin.task_aggregate == 0:
        return f"{text}. There is no retain-only twin to say how high it could honestly go."
    ceiling = f"the {words.score(twin.task_aggregate)} of a model that never saw the forget rows"
    if _tied(value, twin.task_aggregate):
        return f"{text}, equal to {ceiling}."
    if value < twin.task_aggregate:
        return f"{text}, {words.percent(value / twin.task_aggregate)} of {ceiling}."
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
        return [f"All {len(names)} terms that apply are {words.score(lowest)}."]
    if len(names) > 3:
        return [f"{len(names)} of its {len(known)} terms are as low as {words.score(lowest)}."]
    if len(names) > 1:
        return [f"Its weakest terms are {words.listing(names)}, {words.score(lowest)} each."]
    return [f"Its weakest term is {names[0]}, {words.score(lowest)}."]


def _membership(about: ReportModel, twin: ReportModel | None) -> list[str]:
    if math.isnan(about.mia_auc):
        return ["Membership inference was not measured."]
    other = "" if twin is None or math.isnan(twin.mia_auc) else f", the twin has {words.score(twin.mia_auc)}"
    return [f"The membership AUC is {words.score(about.mia_auc)} (0.5 would tell nothing{other})."]


def _utility(about: ReportModel, base: ReportModel | None) -> list[str]:
    if math.isnan(about.utility):
        return ["Utility was not measured."]
    text = f"Utility is {words.score(about.utility)}"
    if base is None or math.isnan(base.utility) or base.utility == 0:
        return [f"{text}; there is no value from before unlearning to compare with."]
    return [
        f"{text}, {words.percent(about.utility / base.utility)} of what it was before ({words.score(base.utility)})."
    ]


def _rivals(about: ReportModel, rivals: list[ReportModel], planned: bool) -> list[str]:
    """What controls and other methods say against the focus."""
    if not rivals:
        return ["There is no control and no other method to compare with."]
    controls = [model for model in rivals if model.part == "control"] if planned else []
    said = _controls(about, controls) if planned else []
    for other in (one for one in rivals if one not in controls and at_least(one, about)):
        said.append(f"The other method “{other.label}” does {against(other, about)}.")
    return said


def _controls(about: ReportModel, controls: list[ReportModel]) -> list[str]:
    """Does it matter which layers are trained (controls of equal size), and does it help to train few (all layers)?"""
    every = [model for model in controls if model.key.rsplit("_", 1)[-1] == "all"]
    equal = [model for model in controls if model not in every]
    if not equal:
        said = ["No control was trained in as many other layers, so nothing shows that the choice of layers matters."]
    elif winners := [model for model in equal if at_least(model, about)]:
        said = [f"The control “{one.label}” does {against(one, about)}." for one in winners]
        said.append("So these numbers do not show that the choice of layers matters.")
    else:
        each = words.listing([f"“{one.label}” {_measures(one)}" for one in equal])
        said = [f"It does better than as many other layers: {each}; each is a single run."]
    for one in every:
        if at_least(one, about):
            said.append(f"Training all layers does {against(one, about)}.")
            said.append("So these numbers do not show a gain from training only the planned layers.")
        else:
            said.append(f"It does better than training all layers: “{one.label}” {_measures(one)}.")
    return said


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


def _tied(one: float, other: float) -> bool:
    return round(one, _DIGITS) == round(other, _DIGITS)


def _known(value: float) -> float:
    return -1.0 if math.isnan(value) else value
