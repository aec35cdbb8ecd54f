"""What the report says about the numbers: never more than they show."""

from __future__ import annotations

import dataclasses

from tests.unlearn.report_samples import BASE, NAN, PLANNED, RETAIN_MODEL, attacked, model, plan, report
from tracing.plan.layer_plan import LayerPlan
from unlearn.report import ReportModel
from unlearn.report.verdict import paragraphs, verdict


def said(*models: ReportModel, **other: object) -> str:
    return " ".join(verdict(report(*models, **other)))


def test_verdict_compares_with_floor_and_ceiling() -> None:
    text = said(BASE, PLANNED, RETAIN_MODEL)
    assert "Tracing singles out layers 2–4 of 8" in text
    assert (
        "task aggregate of 0.930 (before unlearning: 0.000), 96.9% of the 0.960 of the retain model, which never saw"
        in text
    )
    assert "membership AUC is 0.530 (0.5 would tell nothing, the retain model has 0.510)" in text
    assert "Utility is 0.760, 95.0% of what it was before (0.800)" in text
    assert "no control and no other method" in text


def test_verdict_says_when_a_control_does_as_well() -> None:
    text = said(BASE, PLANNED, model("joint_random", 0.9296, 0.8), RETAIN_MODEL)
    assert (
        "The control “<joint_random>” does at least as well in the task aggregate (task aggregate 0.930 against 0.930, final"
        in text
    )
    assert "do not show that the choice of layers matters" in text
    assert "does better" not in text


def test_verdict_names_beaten_controls_without_calling_it_proof() -> None:
    text = said(BASE, PLANNED, model("joint_random", 0.8, 0.7), model("joint_all", 0.7, 0.6), RETAIN_MODEL)
    assert (
        "It does better than as many other layers: “<joint_random>” 0.800 (final score 0.700); each is a single run."
        in text
    )
    assert "It does better than training all layers: “<joint_all>” 0.700" in text
    assert "at least as well" not in text


def test_verdict_keeps_apart_which_layers_and_how_many() -> None:
    text = said(BASE, PLANNED, model("joint_random", 0.8, 0.7), model("joint_all", 0.94, 0.89), RETAIN_MODEL)
    assert "It does better than as many other layers" in text
    assert "Training all layers does at least as well (task aggregate 0.940 against 0.930, final score 0.890" in text
    assert "do not show a gain from training only the planned layers" in text
    only_all = said(BASE, PLANNED, model("joint_all", 0.7, 0.6), RETAIN_MODEL)
    assert "No control was trained in as many other layers" in only_all


def test_verdict_says_when_another_method_does_as_well() -> None:
    text = said(BASE, PLANNED, model("npo", 0.5, 0.9), RETAIN_MODEL)
    assert (
        "The other method “<npo>” does at least as well in the final score (task aggregate 0.500 against 0.930, final score 0.900"
        in text
    )
    assert "“<npo>”" not in said(BASE, PLANNED, model("npo", 0.5, 0.5), RETAIN_MODEL)


def test_verdict_does_not_praise_passing_the_ceiling() -> None:
    assert "above the 0.960 of the retain model, which never saw the forget rows. More than that" in said(
        BASE, model("joint_planned", 0.99), RETAIN_MODEL
    )
    assert "equal to the 0.960" in said(BASE, model("joint_planned", 0.9601), RETAIN_MODEL)
    assert "No retain model was scored" in said(BASE, PLANNED)


def test_verdict_on_evidence_that_does_not_single_out_layers() -> None:
    text = said(BASE, PLANNED, RETAIN_MODEL, plan=plan(singled=False))
    assert text.startswith("The evidence does not single out layers: layers 2–4 had the largest effect")
    assert "No layers were located" in said(BASE, PLANNED, RETAIN_MODEL, plan=None)
    by_hand = LayerPlan(layers=(1,))
    assert "The plan trains layer 1; it holds no evidence" in said(BASE, PLANNED, RETAIN_MODEL, plan=by_hand)


def test_verdict_without_a_planned_model_is_about_the_best_method() -> None:
    text = said(BASE, model("npo", 0.4, 0.4), model("gradient_ascent", 0.6, 0.5), RETAIN_MODEL)
    assert "“<gradient_ascent>”, the best of the methods, reaches" in text
    assert "control" not in text


def test_verdict_survives_what_is_missing() -> None:
    assert "nothing can be said about forgetting" in said(BASE)
    text = said(model("joint_planned", NAN))
    assert "has no task aggregate" in text
    assert "Membership inference was not measured. Utility was not measured." in text
    assert "nan" not in text.lower()


def test_verdict_names_the_weakest_term() -> None:
    terms = (1.0, 1.0, 0.7, *(1.0,) * 8, NAN)
    assert "The weakest term of “<joint_planned>” is forget Task2 (records) regurgitation, 0.700." in said(
        dataclasses.replace(PLANNED, terms=terms)
    )
    assert "12 of the 12 terms of “<joint_planned>” are as low as 0.930" in said(PLANNED)
    assert "All 12 terms of “<joint_planned>” that apply are 1.000" in said(model("joint_planned", 1.0))


def test_a_part_is_a_field_and_no_name() -> None:
    """A control is one because it says so: its key and label may be anything."""
    control = dataclasses.replace(model("mine", 0.8, 0.7), part="control")
    assert "It does better than as many other layers: “<mine>” 0.800" in said(BASE, PLANNED, control)
    assert "“overall_planned”" not in said(dataclasses.replace(BASE, key="overall_planned"), PLANNED)
    about = dataclasses.replace(model("x", 0.2), part="planned")
    assert "“<x>” reaches a task aggregate of 0.200" in said(model("npo", 0.9), about)


def test_verdict_says_what_attacks_brought_back_at_worst_and_by_likelihood() -> None:
    other = attacked("other")
    assert other.audit is not None
    other = dataclasses.replace(
        other,
        worst=(0, 2),  # which has no interval
        audit=dataclasses.replace(other.audit, residue=((9.0, 8.0, 10.0), (0.62, 0.4, 0.9))),
    )
    first, second = paragraphs(report(BASE, PLANNED, attacks=(attacked("mine"), other)))
    assert first[-2:] == [
        "At worst relearning brings back, beyond what the retain model says under the same attack, −0.050 (interval −0.100 to "
        "+0.050, which holds 0) of the answers of “mine” and −0.050 of the answers of “other”.",
        "Afterwards forgotten answers are likelier than those of people never seen, beyond the retain model's own difference, "
        "by 0.62 nats a token (interval 0.40 to 0.90) in “other”; 0 would be nothing left.",
    ]
    assert second[-2:] == [
        "Attacked by relearning, “mine” gives back no more than the retain model (other people).",
        "Attacked by relearning, “other” gives back no more than the retain model (other people).",
    ]
    first, second = paragraphs(report(BASE, PLANNED, attacks=(dataclasses.replace(attacked("mine"), worst=None),)))
    assert first[-1] == "Attacked by relearning, “mine” gives back no more than the retain model (other people)."
    assert "Attacked" not in " ".join(second)


def test_verdict_puts_what_wipes_and_heals_beside_the_method() -> None:
    wiped = dataclasses.replace(model("w", 0.97, 0.95, mia_auc=0.55, utility=0.98), part="wiped")
    text = said(BASE, PLANNED, wiped, RETAIN_MODEL)
    assert "“<joint_planned>” reaches a task aggregate of 0.930" in text
    assert (
        "“<w>”, which wipes weights and heals them, reaches a task aggregate of 0.970, a membership AUC of 0.550, a utility of "
        "0.980 and a final score of 0.950."
    ) in text
    assert "The other method “<w>”" not in text
    assert "There is no control and no other method" not in text
    assert "“<w>” reaches a task aggregate of 0.970" in said(BASE, wiped), "alone it is what the page is about"
