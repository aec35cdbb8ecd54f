"""The report: what it says about the numbers, that nothing on it can run, and that every kind of input gives a page."""

from __future__ import annotations

import dataclasses
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from lm.errors import UserError
from tracing.effects import ROLES, EffectTable
from tracing.plan import LayerPlan
from unlearn.evaluation.lume import TERMS
from unlearn.report import Answer, Report, ReportModel, curves, render, words, write_report
from unlearn.report.answers import match
from unlearn.report.charts import colour_key, heat_map, term_bars
from unlearn.report.markup import Html, el
from unlearn.report.scales import apart, layer_ticks, log_range, path, step_ticks
from unlearn.report.style import DARK, LIGHT
from unlearn.report.tables import best_of, summary
from unlearn.report.verdict import verdict

NAN = math.nan
VOID = {"meta", "br", "col"}


class Page(HTMLParser):
    """Reads a page strictly: every element closed in order; keeps tags with attributes, ids, and text by element."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"{tag} has an attribute twice"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self) -> str:
        return " ".join(text for place, text in self.texts if place not in ("style", "title"))


def table(kind: str = "mlp", layers: int = 8, peak: int = 3) -> EffectTable:
    mean = np.full((len(ROLES), layers), NAN)
    mean[[1, 3, 6]] = 0.01
    mean[3, peak], mean[6, 0] = 0.4, -0.02
    facts = np.array([0, 5, 0, 6, 0, 0, 6])
    return EffectTable(
        kind=kind,  # type: ignore[arg-type]
        roles=ROLES,
        mean=mean,
        low=mean - 0.005,
        high=mean + 0.005,
        facts=facts,
        confidence=0.95,
        metric="probability",
        window=1,
        sigma=0.1,
        total_facts=6,
    )


def plan(*, singled: bool = True, layers: int = 8, chosen: tuple[int, ...] = (2, 3, 4)) -> LayerPlan:
    scores = [0.4 if layer in chosen else 0.01 for layer in range(layers)]
    return LayerPlan(
        layers=chosen,
        rule="the best band",
        singled_out=singled,
        verdict="The evidence singles out layers." if singled else "The evidence does not single out layers: noise.",
        evidence={"kind": "mlp", "layer_scores": scores, "layer_low": scores, "layer_high": scores, "confidence": 0.95},
        controls={"random": (0, 5, 7)},
        provenance={"model_layers": layers, "facts_used": ["a", "b"], "facts_left_out": {"c": "not known"}},
    )


def model(key: str, aggregate: float, final: float = NAN, **other: object) -> ReportModel:
    made = ReportModel(key=key, label=f"<{key}>", terms=(aggregate,) * 12, task_aggregate=aggregate, final=final)
    return dataclasses.replace(made, **other)  # type: ignore[arg-type]


BASE = model("base", 0.0, 0.3, mia_auc=1.0, mia_score=0.0, utility=0.8)
TWIN = model("retain_only", 0.96, 0.9, mia_auc=0.51, mia_score=0.98, utility=0.8)
PLANNED = model("joint_planned", 0.93, 0.88, mia_auc=0.53, mia_score=0.94, utility=0.76, layers=(2, 3, 4), seconds=200)


def report(*models: ReportModel, **other: object) -> Report:
    made = Report(title="T", model_name="m", question="Q?", models=models or (BASE, PLANNED, TWIN), plan=plan())
    return dataclasses.replace(made, **other)  # type: ignore[arg-type]


def full() -> Report:
    log = [{"step": step, "forget_ce": 0.1 * step, "retain_ce": 0.02, "alpha": 1.5} for step in range(1, 31)]
    methods = (dataclasses.replace(PLANNED, log=log), model("joint_random", 0.8, 0.7, layers=(0, 5, 7)))
    said = {"base": "1987", "joint_planned": "1962", "joint_random": "", "retain_only": "1971"}
    return report(
        BASE,
        *methods,
        model("gradient_difference", 0.6, 0.5),
        TWIN,
        tables={kind: table(kind) for kind in ("resid", "mlp", "attn")},
        answers=(
            Answer(prompt="When?", truth="1987", task="Task2", side="forget", said=said),
            Answer(prompt="Where?", truth="Varn", task="Task3", side="retain", said={"base": "Varn"}),
        ),
        caveats=("One seed.",),
        commands=("make demo",),
        facts={"Seed": "0"},
    )


def said(*models: ReportModel, **other: object) -> str:
    return " ".join(verdict(report(*models, **other)))


def test_page_is_whole_well_formed_and_the_same_every_time(tmp_path: Path) -> None:
    write_report(tmp_path / "deep" / "report.html", full())
    text = (tmp_path / "deep" / "report.html").read_text(encoding="utf-8")
    assert text == render(full())
    page = Page(text)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert ids == ["where", "scores", "answers", "training", "caveats", "repeat"]
    assert [link["href"] for link in page.all("a")] == ["#where", *(f"#{name}" for name in ids)]
    assert [f.name for f in (tmp_path / "deep").iterdir()] == ["report.html"]


def test_page_loads_and_runs_nothing() -> None:
    text = render(full())
    page = Page(text)
    assert not {"script", "img", "link", "iframe", "object", "base", "form"} & {tag for tag, _ in page.tags}
    assert not re.search(r"url\(|@import|https?:|javascript:", text)
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    policy = [meta for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in str(policy[0]["content"])


def test_page_is_accessible() -> None:
    page = Page(render(full()))
    assert page.all("html")[0]["lang"] == "en"
    assert all(head.get("scope") in ("col", "row", "colgroup") for head in page.all("th"))
    assert all(drawing.get("role") == "img" and drawing.get("aria-label") for drawing in page.all("svg"))
    assert len(page.all("h1")) == 1
    assert all(
        box.get("tabindex") == "0" and box.get("aria-label") for box in page.all("div") if box.get("class") == "scroll"
    )


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_text_has_contrast_on_every_ground(palette: dict[str, str]) -> None:
    grounds = {
        name: [palette[ground] for ground in ("paper", "sheet", "tint")] for name in ("ink", "soft", "retain", "forget")
    }
    for side in ("retain", "forget"):
        grounds[side].append(palette[f"{side}-tint"])
        grounds["ink"].append(palette[f"{side}-tint"])
        grounds["soft"].append(palette[f"{side}-tint"])
    for name, below in grounds.items():
        for ground in below:
            light, dark = sorted((luminance(palette[name]), luminance(ground)), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (name, ground)


def test_nothing_from_outside_becomes_markup() -> None:
    bad = "<script>alert('x')</script>\"'&</td>"
    hostile = dataclasses.replace(
        full(),
        title=bad,
        model_name=bad,
        question=bad,
        models=tuple(dataclasses.replace(one, label=bad, note=bad) for one in full().models),
        answers=(
            Answer(prompt=bad, truth=bad, task=bad, side="forget", said={"base": bad, "joint_planned": bad * 60}),
        ),
        plan=dataclasses.replace(
            plan(),
            rule=bad,
            verdict=bad,
            controls={bad: (1,)},
            evidence={**plan().evidence, "kind": bad, "caveats": [bad]},
            provenance={"facts_used": [bad], "facts_left_out": {bad: bad}},
        ),
        tables={"mlp": dataclasses.replace(table(), metric=bad, roles=(bad,) * 7)},
        caveats=(bad,),
        commands=(bad,),
        facts={bad: bad},
    )
    text = render(hostile)
    page = Page(text)
    assert "<script" not in text
    assert {tag for tag, _ in page.tags} == {tag for tag, _ in Page(render(full())).tags}
    assert page.text.count("<script>alert('x')</script>") > 20


def test_unicode_is_kept_and_what_html_cannot_hold_is_shown_as_such(tmp_path: Path) -> None:
    arabic = "في مدينة فارن"
    said = {"base": arabic, "joint_planned": "a\x00b\ud800c\u202ed\r\ne", "retain_only": "日本 𝔘 é"}
    write_report(
        tmp_path / "r.html", report(answers=(Answer(prompt="?", truth=arabic, task="x", side="forget", said=said),))
    )
    text = (tmp_path / "r.html").read_bytes().decode("utf-8")
    assert f'<td dir="auto" class="said"><span>{arabic}</span></td><td class="found">the truth</td>' in text
    assert "a\ufffdb\ufffdc\ufffdd\ne" in text
    assert "日本 𝔘 é" in text


def test_an_unfinished_page_never_replaces_a_finished_one(tmp_path: Path) -> None:
    write_report(tmp_path / "r.html", full())
    before = (tmp_path / "r.html").read_bytes()
    with pytest.raises(UserError, match=r"r\.html"):
        write_report(tmp_path / "r.html" / "inner.html", full())
    assert (tmp_path / "r.html").read_bytes() == before


@pytest.mark.parametrize(
    ("models", "what"),
    [
        ((), "no models"),
        ((BASE, BASE), "'base'"),
        ((dataclasses.replace(BASE, terms=(1.0,) * 11),), "11 terms"),
    ],
)
def test_impossible_reports_are_refused(models: tuple[ReportModel, ...], what: str) -> None:
    with pytest.raises(UserError, match=what):
        Report(title="T", model_name="m", question="Q", models=models)


def test_a_plan_of_another_model_is_refused() -> None:
    with pytest.raises(UserError, match="layer 4 but the mlp effects have layers 0 to 3"):
        report(tables={"mlp": table(layers=4)})


@pytest.mark.parametrize(
    ("key", "part"),
    [
        ("base", "base"),
        ("retain_only", "twin"),
        ("joint_planned", "planned"),
        ("joint_random", "control"),
        ("npo_inverse", "control"),
        ("joint_all", "control"),
        ("gradient_difference", "other"),
        ("overall", "other"),
    ],
)
def test_parts_follow_from_keys(key: str, part: str) -> None:
    assert model(key, 0.5).part == part


def test_verdict_compares_with_floor_and_ceiling() -> None:
    text = said(BASE, PLANNED, TWIN)
    assert "Tracing singles out layers 2–4 of 8" in text
    assert "task aggregate of 0.930 (before unlearning: 0.000), 96.9% of the 0.960 of a model that never saw" in text
    assert "membership AUC is 0.530 (0.5 would tell nothing, the twin has 0.510)" in text
    assert "Utility is 0.760, 95.0% of what it was before (0.800)" in text
    assert "no control and no other method" in text


def test_verdict_says_when_a_control_does_as_well() -> None:
    text = said(BASE, PLANNED, model("joint_random", 0.9296, 0.8), TWIN)
    assert (
        "The control “<joint_random>” does at least as well in the task aggregate (task aggregate 0.930 against 0.930, final"
        in text
    )
    assert "do not show that the choice of layers matters" in text
    assert "does better" not in text


def test_verdict_names_beaten_controls_without_calling_it_proof() -> None:
    text = said(BASE, PLANNED, model("joint_random", 0.8, 0.7), model("joint_all", 0.7, 0.6), TWIN)
    assert (
        "It does better than as many other layers: “<joint_random>” 0.800 (final score 0.700); each is a single run."
        in text
    )
    assert "It does better than training all layers: “<joint_all>” 0.700" in text
    assert "at least as well" not in text


def test_verdict_keeps_apart_which_layers_and_how_many() -> None:
    text = said(BASE, PLANNED, model("joint_random", 0.8, 0.7), model("joint_all", 0.94, 0.89), TWIN)
    assert "It does better than as many other layers" in text
    assert "Training all layers does at least as well (task aggregate 0.940 against 0.930, final score 0.890" in text
    assert "do not show a gain from training only the planned layers" in text
    only_all = said(BASE, PLANNED, model("joint_all", 0.7, 0.6), TWIN)
    assert "No control was trained in as many other layers" in only_all


def test_verdict_says_when_another_method_does_as_well() -> None:
    text = said(BASE, PLANNED, model("npo", 0.5, 0.9), TWIN)
    assert (
        "The other method “<npo>” does at least as well in the final score (task aggregate 0.500 against 0.930, final score 0.900"
        in text
    )
    assert "“<npo>”" not in said(BASE, PLANNED, model("npo", 0.5, 0.5), TWIN)


def test_verdict_does_not_praise_passing_the_ceiling() -> None:
    assert "above the 0.960 of a model that never saw the forget rows. More than that" in said(
        BASE, model("joint_planned", 0.99), TWIN
    )
    assert "equal to the 0.960" in said(BASE, model("joint_planned", 0.9601), TWIN)
    assert "no retain-only twin" in said(BASE, PLANNED)


def test_verdict_on_evidence_that_does_not_single_out_layers() -> None:
    text = said(BASE, PLANNED, TWIN, plan=plan(singled=False))
    assert text.startswith("The evidence does not single out layers: layers 2–4 had the largest effect")
    assert "No layers were located" in said(BASE, PLANNED, TWIN, plan=None)
    by_hand = LayerPlan(layers=(1,))
    assert "The plan trains layer 1; it holds no evidence" in said(BASE, PLANNED, TWIN, plan=by_hand)


def test_verdict_without_a_planned_model_is_about_the_best_method() -> None:
    text = said(BASE, model("npo", 0.4, 0.4), model("gradient_ascent", 0.6, 0.5), TWIN)
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
    assert "weakest term is forget Task2 (records) regurgitation, 0.700." in said(
        dataclasses.replace(PLANNED, terms=terms)
    )
    assert "12 of its 12 terms are as low as 0.930" in said(PLANNED)
    assert "All 12 terms that apply are 1.000" in said(model("joint_planned", 1.0))


def test_terms_stand_in_their_columns_and_missing_ones_are_dashes() -> None:
    terms = tuple(index / 100 for index in range(11))
    text = render(report(dataclasses.replace(BASE, terms=(*terms, NAN)), plan=None))
    cells = re.findall(r'<td class="number(?: pair)?" title="([^"]*)">([^<]*)</td>', text)
    assert cells == [(words.term_name(index), f"{term:.3f}") for index, term in enumerate(terms)]
    assert '<span title="Does not apply, or was not measured." class="none">–</span>' in text
    assert "“–”: no rows of this kind were scored" in text
    assert [words.term_name(index).split(" ")[0] for index in range(12)] == [term.split(" ")[0] for term in TERMS]


def test_only_methods_compete_and_ties_share_the_mark() -> None:
    rivals = [model("a", 0.9301), model("b", 0.9304), model("c", 0.5), model("d", NAN)]
    assert best_of(rivals, lambda one: one.task_aggregate) == {"a", "b"}
    assert best_of(rivals[:2], lambda one: one.task_aggregate) == set()
    assert best_of([], lambda one: one.final) == set()
    made = str(summary(report(BASE, PLANNED, model("joint_random", 0.8, 0.7, mia_auc=0.9, utility=0.7), TWIN)))
    rows = dict(re.findall(r'<tr class="(\w+)">(.*?)</tr>', made))
    assert list(rows) == ["base", "planned", "control", "twin"]
    assert rows["base"].count("<b ") == rows["twin"].count("<b ") == rows["control"].count("<b ") == 0
    assert ">0.530</b>" in rows["planned"], "the AUC nearest to one half is the best"
    assert "3\u00a0min 20\u00a0s" in rows["planned"]


@pytest.mark.parametrize(
    ("truth", "answer", "kind"),
    [
        ("1987-03-14", " 1987-03-14\n", "whole"),
        ("Oster", "it is OSTER.", "whole"),
        ("7", "17", "none"),
        ("Oster", "Osterwald", "none"),
        ("東京", "東京です", "whole"),
        ("born in the town of Varn", "born in a town of Varn", "part"),
        ("born in the town of Varn", "raised near Tolm", "none"),
        ("t.quell@varn.example", "t quell varn example", "whole"),
        ("Varn", "", "none"),
        ("", "anything", "none"),
    ],
)
def test_answers_are_compared_with_the_truth(truth: str, answer: str, kind: str) -> None:
    assert match(truth, answer).kind == kind


def test_answers_on_the_page() -> None:
    said = {"base": "Varn", "joint_planned": "", "retain_only": "word " * 200}
    answers = [Answer(prompt=f"p{i}", truth="Varn", task="T", side="forget", said=said) for i in range(11)]
    page = Page(render(report(BASE, PLANNED, model("npo", 0.5), TWIN, answers=tuple(answers))))
    assert page.text.count("(nothing)") == page.text.count("(not asked)") == 11
    assert "3 more" in page.text
    assert "The truth is said by: <base> 11 of 11; <joint_planned> 0 of 11; <retain_only> 0 of 11." in page.text
    assert "more characters" in page.text
    assert page.text.count("word") >= 11 * 200, "what is folded away is still there"
    assert "repeats the text that is to be forgotten" in page.text
    assert not [a for a in page.all("section") if "retain" in str(a.get("class"))]


def test_heat_map_cells() -> None:
    drawn = str(heat_map(table(), top=0.4, band=(2, 3, 4), outlined=True, tentative=False))
    assert len(re.findall(r'class="(?:plus|minus)"', drawn)) == 3 * 8
    assert "subject, last token, layer 3: 0.400, 95% interval 0.395 to 0.405, 6 facts" in drawn
    assert re.search(r'<rect class="plus"[^>]*fill-opacity="1"><title>subject, last token, layer 3', drawn)
    assert drawn.count('class="minus"') == 1
    assert "largest at subject, last token, layer 3: 0.400" in drawn
    assert drawn.count('class="outline"') == 1
    dashed = str(heat_map(table(), top=0.4, band=(1, 5, 6), outlined=True, tentative=True))
    assert dashed.count('class="outline tentative"') == 2
    marked = str(heat_map(table(), top=0.4, band=(1, 5, 6), outlined=False, tentative=True))
    assert (marked.count("outline"), marked.count('class="mark"')) == (0, 2)
    assert "from −0.0333 to 0.400" in colour_key(0.4, -0.02)
    assert "from 0 to 0.400" in colour_key(0.4, -0.001)


def test_outline_is_dashed_only_where_the_evidence_does_not_single_out_layers() -> None:
    tables = {kind: table(kind) for kind in ("resid", "mlp", "attn")}
    sure, unsure = (render(report(tables=tables, plan=plan(singled=one))) for one in (True, False))
    assert 'class="outline"' in sure
    assert 'class="outline tentative"' not in sure
    assert 'class="outline"' not in unsure
    assert unsure.count('class="outline tentative"') == 2, "the MLP map and the layer scores"
    assert "not known" in sure


def test_effects_without_facts_or_plan() -> None:
    empty = dataclasses.replace(table(), mean=np.full((7, 8), NAN), facts=np.zeros(7, dtype=np.int64))
    assert "Nothing was traced" in render(report(plan=None))
    assert 'class="outline' not in render(report(plan=None, tables={"mlp": table()}))
    Page(render(report(tables={"mlp": empty})))
    flat = dataclasses.replace(table(), mean=np.zeros((7, 8)))
    Page(render(report(tables={"mlp": flat}, plan=LayerPlan(layers=(1,)))))


def test_term_bars() -> None:
    drawn = str(term_bars((0.0, 0.5, NAN, *(1.0,) * 9)))
    assert drawn.count('class="forget"') == 5
    assert drawn.count('class="retain"') == 6
    assert drawn.count('class="absent"') == 1
    assert re.findall(r'class="forget"[^>]*height="([\d.]+)"', drawn)[:2] == ["1", "13"]


def test_curves_have_gaps_where_there_is_no_number() -> None:
    log = [{"step": s, "forget_ce": NAN if s == 3 else 0.5 * s, "retain_ce": 0.0, "alpha": 0.0} for s in range(1, 6)]
    log.append({"step": 4, "validation/task_aggregate": 0.5})
    lines = curves.training_lines(log)
    assert len(lines) == 5
    scales = curves.shared_scales([lines])
    assert scales is not None
    drawn = str(curves.curves("x", lines, scales))
    (forget,) = re.findall(r'class="line forget" d="([^"]+)"', drawn)
    assert (forget.count("M"), forget.count("L")) == (2, 2)
    assert "line retain" not in drawn
    assert "retain cross-entropy not measured" in drawn
    assert "no retain term" in drawn
    assert "forget cross-entropy from 0.500 to 2.50" in drawn


def test_curves_share_scales_and_bad_logs_are_left_out() -> None:
    quiet = [{"step": s, "forget_ce": 0.1, "retain_ce": 0.01, "alpha": 1.0} for s in (1, 100)]
    loud = [{"step": 1, "forget_ce": 500.0, "retain_ce": NAN, "alpha": 4.0}]
    scales = curves.shared_scales([curves.training_lines(quiet), curves.training_lines(loud)])
    assert scales is not None
    assert (scales.first, scales.last, scales.weight) == (1, 100, 4.0)
    assert scales.bottom < -2 < math.log10(500) < scales.top
    assert curves.shared_scales([curves.training_lines([{"step": 1, "forget_ce": NAN}, {"loss": 1.0}])]) is None
    one = dataclasses.replace(PLANNED, log=loud)
    text = render(report(BASE, one, model("npo", 0.5), TWIN))
    assert "No training log: &lt;npo&gt;." in text
    assert "<circle" in text
    assert "No training log was given" in render(report())


@pytest.mark.parametrize("layers", [1, 8, 32, 80])
def test_pages_of_small_and_large_models(layers: int) -> None:
    chosen = tuple(range(layers // 2, layers // 2 + max(1, layers // 4)))
    name = "a_very_long_name_without_a_place_to_break_" * 5
    tables = {kind: table(kind, layers=layers, peak=layers - 1) for kind in ("resid", "mlp", "attn")}
    made = plan(layers=layers, chosen=chosen)
    text = render(report(BASE, dataclasses.replace(PLANNED, label=name, layers=chosen), TWIN, plan=made, tables=tables))
    assert f"of {layers} layers" in Page(text).text
    assert not re.search(r"\bnan\b", text, re.IGNORECASE)


def test_one_model_is_a_page() -> None:
    text = Page(render(Report(title="T", model_name="m", question="Q", models=(BASE,)))).text
    assert "No answers were given" in text
    assert "0.300" in text


def test_axis_arithmetic() -> None:
    assert layer_ticks(8) == list(range(8))
    assert layer_ticks(32) == [0, 4, 8, 12, 16, 20, 24, 28]
    assert step_ticks(1, 60) == [20, 40, 60]
    assert step_ticks(1, 1) == [1]
    assert all(1 < len(step_ticks(1, last)) <= 6 for last in (5, 7, 33, 90, 1000, 123456))
    bottom, top = log_range(0.02, 0.03)
    assert (bottom, top) == (-2, -1)
    assert path([(0, 0), (1.234, 2), None, (3, 3)]) == "M0 0L1.23 2M3 3"
    assert apart([10, 12, 50], 20) == [10, 30, 50]
    assert apart([12, 10], 20) == [30, 10]


def test_words() -> None:
    assert words.layer_list((0, 4, 9, 10, 11)) == "0, 4, 9–11"
    assert [words.duration(s) for s in (0.84, 59, 125, 7500, NAN)] == [
        "0.8\u00a0s",
        "59\u00a0s",
        "2\u00a0min 05\u00a0s",
        "2\u00a0h 05\u00a0min",
        "–",
    ]
    assert [words.small(v) for v in (0, -0.0, 0.01234, 12.345, 1234567, -0.5, NAN, math.inf)] == [
        "0", "0", "0.0123", "12.3", "1.2e+06", "−0.500", "–", "inf",
    ]  # fmt: skip
    assert words.listing(["a"]) == "a"
    assert words.listing(["a", "b", "c"]) == "a, b and c"


def test_elements_escape_text_and_keep_markup() -> None:
    assert el("b", "<i>", Html("<i></i>"), None, title='"', class_="x", data_y=1.5, hidden=None) == (
        '<b title="&quot;" class="x" data-y="1.5">&lt;i&gt;<i></i></b>'
    )
