"""The page: whole, safe and accessible, for every kind of input."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from markupsafe import Markup

import unlearn.report
from lm.errors import UserError
from tests.unlearn.report_samples import (
    BASE,
    PLANNED,
    RETAIN_MODEL,
    Page,
    attacked,
    full,
    plan,
    report,
    retraced,
    table,
)
from unlearn.report import Answer, Report, ReportModel, render, words, write_report
from unlearn.report.drawing.svg import el


def palettes() -> dict[str, dict[str, str]]:
    """The variables of both color schemes, from the style sheet."""
    style = (Path(unlearn.report.__file__).parent / "style.css").read_text(encoding="utf-8")
    blocks = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    assert len(blocks) == 2
    return {
        name: dict(re.findall(r"--([\w-]+): (#\w+);", block))
        for name, block in zip(("light", "dark"), blocks, strict=True)
    }


def luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_page_is_whole_well_formed_and_the_same_every_time(tmp_path: Path) -> None:
    write_report(tmp_path / "deep" / "report.html", full())
    text = (tmp_path / "deep" / "report.html").read_text(encoding="utf-8")
    assert text == render(full())
    page = Page(text)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert ids == ["where", "scores", "answers", "again", "attacks", "depth", "training", "caveats", "repeat"]
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


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_on_every_ground(scheme: str) -> None:
    palette = palettes()[scheme]
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
        models=tuple(dataclasses.replace(one, label=bad, note=bad, others={bad: 0.5}) for one in full().models),
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
        again=(dataclasses.replace(retraced(), label=bad, found=dataclasses.replace(retraced().found, metric=bad)),),
        attacks=(
            dataclasses.replace(
                attacked(bad),
                attack=bad,
                unit=bad,
                trials=(dataclasses.replace(attacked().trials[0], name=bad, verdict=bad, sentence=bad),),
            ),
        ),
        depths=(dataclasses.replace(full().depths[0], label=bad, sentence=bad),),
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


@pytest.mark.parametrize("layers", [1, 8, 32, 80])
def test_pages_of_small_and_large_models(layers: int) -> None:
    chosen = tuple(range(layers // 2, layers // 2 + max(1, layers // 4)))
    name = "a_very_long_name_without_a_place_to_break_" * 5
    tables = {kind: table(kind, layers=layers, peak=layers - 1) for kind in ("resid", "mlp", "attn")}
    made = plan(layers=layers, chosen=chosen)
    text = render(
        report(BASE, dataclasses.replace(PLANNED, label=name, layers=chosen), RETAIN_MODEL, plan=made, tables=tables)
    )
    assert f"of {layers} layers" in Page(text).text
    assert not re.search(r"\bnan\b", text, re.IGNORECASE)


def test_one_model_is_a_page() -> None:
    text = Page(render(Report(title="T", model_name="m", question="Q", models=(BASE,)))).text
    assert "No answers were given" in text
    assert "0.300" in text


def test_elements_escape_text_and_keep_markup() -> None:
    assert el("b", "<i>", Markup("<i></i>"), None, title='"', class_="x", data_y=1.5, hidden=None) == (
        '<b title="&#34;" class="x" data-y="1.5">&lt;i&gt;<i></i></b>'
    )


def test_a_cell_tells_its_share_of_what_the_corruption_took() -> None:
    made = report(tables={"mlp": table()})
    page = Page(render(made))
    assert "the corruption took 0.800 on average" in page.text
    titles = [str(cell.get("title")) for cell in page.all("td")]
    assert "95% interval 0.395 to 0.405, 50.0% of what the corruption took" in titles
    none = dataclasses.replace(table(), total_effect=0.0, share=table().share * float("nan"))
    page = Page(render(report(tables={"mlp": none})))
    assert "the corruption itself took nothing on average" in page.text
    assert not any("of what" in str(cell.get("title")) for cell in page.all("td"))


def test_cut_windows_are_marked_and_told_by_layer() -> None:
    wide = dataclasses.replace(table(), window=5)
    page = Page(render(report(tables={"mlp": wide})))
    assert "5 layers around each restored together, fewer at layers 0–1, 6–7" in page.text
    titles = [str(cell.get("title")) for cell in page.all("td")]
    assert any(title.endswith("only 3 of 5 layers restored, −0.00667 each") for title in titles)  # −0.02 at layer 0
    assert sum("only 4 of 5 layers restored" in title for title in titles) == 6  # two layers, three roles
    assert "fewer at" not in Page(render(report(tables={"mlp": table()}))).text


def test_what_rounding_leaves_of_nothing_is_nothing() -> None:
    assert [words.small(value) for value in (5.3e-16, -1e-13, 1e-7, 0.0)] == ["0", "0", "1.0e−07", "0"]
