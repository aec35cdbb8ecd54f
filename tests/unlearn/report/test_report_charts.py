"""The report's drawings: cells, outlines, gaps and scales."""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np
import pytest

from tests.unlearn.report_samples import (
    BASE,
    NAN,
    PLANNED,
    RETAIN_MODEL,
    Page,
    attacked,
    model,
    plan,
    report,
    retraced,
    table,
)
from tracing.plan.layer_plan import LayerPlan
from unlearn.report import render
from unlearn.report.drawing import curves
from unlearn.report.drawing.heat_maps import color_key, heat_map
from unlearn.report.drawing.lines import two_lines
from unlearn.report.drawing.scales import apart, layer_ticks, log_range, path, step_ticks, value_ticks
from unlearn.report.drawing.term_bars import term_bars


def test_heat_map_cells() -> None:
    drawn = str(heat_map(table(), top=0.4, band=(2, 3, 4), outlined=True, tentative=False))
    assert len(re.findall(r'class="(?:plus|minus)"', drawn)) == 3 * 8
    assert (
        "subject, last token, layer 3: 0.400, 95% interval 0.395 to 0.405, 50.0% of what the corruption took, 6 facts"
        in drawn
    )
    assert re.search(r'<rect class="plus"[^>]*fill-opacity="1"><title>subject, last token, layer 3', drawn)
    assert drawn.count('class="minus"') == 1
    assert "largest at subject, last token, layer 3: 0.400" in drawn
    assert drawn.count('class="outline"') == 1
    dashed = str(heat_map(table(), top=0.4, band=(1, 5, 6), outlined=True, tentative=True))
    assert dashed.count('class="outline tentative"') == 2
    marked = str(heat_map(table(), top=0.4, band=(1, 5, 6), outlined=False, tentative=True))
    assert (marked.count("outline"), marked.count('class="mark"')) == (0, 2)
    assert "from −0.0333 to 0.400" in color_key(0.4, -0.02)
    assert "from 0 to 0.400" in color_key(0.4, -0.001)


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


def test_facts_traced_again_are_shown_before_after_and_as_a_change() -> None:
    again = (retraced("Facts to forget", 0.05), retraced("Facts to keep", 0.4))
    drawn = render(report(again=again))
    page = Page(drawn)
    assert "What is left where it was stored?" in page.text
    assert [text for place, text in page.texts if place == "h3"] == ["Facts to forget", "Facts to keep"]
    assert again[0].found.sentence("mlp").replace("'", "&#39;") in drawn
    assert (
        "what putting back the MLP of layer 3 at the first subject token brings, most of all before, fell from"
        in page.text
    )
    assert "did not change beyond chance" in page.text
    described = [str(svg["aria-label"]) for svg in page.all("svg") if "token role" in str(svg["aria-label"])]
    assert [one.split(": ")[1].split(" by")[0] for one in described] == [
        "mean indirect effect before",
        "mean indirect effect after",
        "change of the mean indirect effect",
    ] * 2
    assert "layer 3: −0.350" in described[2]
    assert re.search(r'<rect class="minus"[^>]*fill-opacity="1"><title>subject, last token, layer 3: −0.350', drawn)
    opacity = re.findall(r'<rect class="plus"[^>]*fill-opacity="([\d.]+)"><title>subject, last token, layer 3', drawn)
    assert [float(one) for one in opacity[:2]] == pytest.approx([1.0, 0.064 / 0.415], abs=0.03)  # one scale for both
    assert drawn.count("The change in numbers") == 2
    assert "What is left where it was stored?" not in render(report())
    unsure = render(report(again=again, plan=plan(singled=False)))
    assert unsure.count('class="outline tentative"') == 6 + 1  # three maps a side, and the layer scores


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
    text = render(report(BASE, one, model("npo", 0.5), RETAIN_MODEL))
    assert "No training log: &lt;npo&gt;." in text
    assert "<circle" in text
    assert "No training log was given" in render(report())


def test_two_lines_have_gaps_and_a_band_where_there_is_an_interval() -> None:
    trial = attacked().trials[0]
    band = (trial.low, trial.high)
    drawn = str(
        two_lines(trial.levels, (0.0, NAN, 0.2), trial.retain_model, unit="steps", description="d", top=1.0, band=band)
    )
    (line,) = re.findall(r'class="line forget" d="([^"]+)"', drawn)
    assert (line.count("M"), line.count("L")) == (2, 0)
    assert 'aria-label="d: unlearned from 0 to 0.200; retain model from 0 to 0.250."' in drawn
    (points,) = re.findall(r'class="band" points="([^"]+)"', drawn)
    assert len(points.split()) == 4, "the last level has no interval"
    assert "<title>retain model, steps 10: 0.150</title>" in drawn
    assert "band" not in str(two_lines((0, 1), (1.0, 2.0), (NAN, NAN), unit="layer", description="d"))


def test_axis_arithmetic() -> None:
    assert layer_ticks(8) == list(range(8))
    assert layer_ticks(32) == [0, 4, 8, 12, 16, 20, 24, 28]
    assert step_ticks(1, 60) == [20, 40, 60]
    assert step_ticks(1, 1) == [1]
    assert value_ticks(0.0, 1.0) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert all(1 < len(step_ticks(1, last)) <= 6 for last in (5, 7, 33, 90, 1000, 123456))
    bottom, top = log_range(0.02, 0.03)
    assert (bottom, top) == (-2, -1)
    assert path([(0, 0), (1.234, 2), None, (3, 3)]) == "M0 0L1.23 2M3 3"
    assert apart([10, 12, 50], 20) == [10, 30, 50]
    assert apart([12, 10], 20) == [30, 10]
