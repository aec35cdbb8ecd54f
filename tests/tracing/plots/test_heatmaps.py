"""Heat maps: PNGs that show the effects on one shared scale, and say what is missing."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib._pylab_helpers import Gcf
from matplotlib.figure import Figure
from matplotlib.image import imread
from tiny_tracing import made_up

from lm.errors import UserError
from tracing import ROLES, LayerPlan, plot, plot_severed
from tracing.plots import heatmaps
from tracing.plots.heatmaps import fact_figure, figure, heatmap
from tracing.plots.lines import line
from tracing.question.sweep import cut_windows

BUMP = [0.1, 0.2, 0.3, 0.9, 0.8, 0.7, 0.1, 0.0]


_MAPS = 300
"""Rows of pixels that hold the maps of a picture and not the lines under them."""


def pixels(data: bytes) -> np.ndarray:
    """(height, width, 3) from 0 to 1."""
    return np.asarray(imread(io.BytesIO(data)))[..., :3]


def blue_ink(image: np.ndarray) -> np.ndarray:
    """How much of the scale's dark blue each column of pixels holds."""
    red, green, blue = image[..., 0], image[..., 1], image[..., 2]
    return ((blue - red > 0.15) & (blue > green)).sum(axis=0)


def test_a_heat_map_is_a_png_and_the_same_each_time(tmp_path: Path) -> None:
    table = made_up(BUMP, noise=0.1).table("mlp")
    data = heatmap(table, tmp_path / "maps" / "mlp.png", band=[3, 4, 5])
    assert data.startswith(b"\x89PNG\r\n")
    assert (tmp_path / "maps" / "mlp.png").read_bytes() == data
    assert heatmap(table, band=[3, 4, 5]) == data
    assert heatmap(table) != data
    assert heatmap(table, band=[3, 4, 5], tentative=True) != data
    height, width, _ = pixels(data).shape
    assert width > height > 200


def test_the_dark_cells_are_where_the_effects_are() -> None:
    left = blue_ink(pixels(heatmap(made_up([0.9, 0.9, 0, 0, 0, 0, 0, 0]).table("mlp"))))
    right = blue_ink(pixels(heatmap(made_up([0, 0, 0, 0, 0, 0, 0.9, 0.9]).table("mlp"))))
    bar = int(0.75 * len(left))  # the color bar stands right of the cells
    assert left[:bar].argmax() < len(left) * 0.5 < right[:bar].argmax()


def test_panels_share_one_scale() -> None:
    strong, weak = made_up(BUMP).table("mlp"), replace(made_up(np.array(BUMP) / 50).table("mlp"), kind="attn")
    together = pixels(figure([strong, weak]))[:_MAPS]
    width = together.shape[1]
    ink = blue_ink(together)
    assert ink[: width // 2].max() > 50
    assert ink[int(width * 0.55) : int(width * 0.78)].max() == 0  # a fiftieth of the scale is nearly its palest color
    alone = blue_ink(pixels(figure([weak]))[:_MAPS])
    assert alone[: int(len(alone) * 0.75)].max() > 50


@pytest.mark.parametrize("profile", [[0.0] * 8, [-0.5] * 8, [0.3]])
def test_flat_negative_and_single_layer_maps_can_be_drawn(profile: list[float]) -> None:
    assert figure([made_up(profile).table("mlp")]).startswith(b"\x89PNG")


def test_rows_that_no_fact_has_are_left_out_and_missing_cells_are_white() -> None:
    full = pixels(heatmap(made_up(BUMP, tokens=7).table("mlp")))
    fewer = pixels(heatmap(made_up(BUMP, tokens=5).table("mlp")))
    assert fewer.shape[0] < full.shape[0]
    effects = made_up(BUMP)
    for cells in effects.restored["mlp"]:
        cells[:] = np.nan
    assert heatmap(effects.table("mlp")).startswith(b"\x89PNG")


def test_tables_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(UserError, match="no table"):
        figure([])
    with pytest.raises(UserError, match="differ in roles, layers or metric"):
        figure([made_up(BUMP).table("mlp"), made_up(BUMP[:4]).table("mlp")])


def test_drawing_leaves_no_figure_in_pyplot() -> None:
    open_before = dict(Gcf.figs)
    heatmap(made_up(BUMP).table("mlp"))
    assert dict(Gcf.figs) == open_before
    assert "pyplot" not in vars(heatmaps)


def test_pictures_for_a_notebook(tmp_path: Path) -> None:
    effects = made_up([0.1, 0.4, 0.2, 0.0], facts=3, kinds=("resid", "mlp"))
    strange = replace(effects, tokens=(("$x$", "\n", "żółw", "\u0000", "🐢", "a"),) * 3, window=3)
    for picture in (plot(effects), plot(effects, layers=[1, 2]), plot(strange, 0), plot(strange, kinds=["mlp"])):
        assert picture._repr_png_().startswith(b"\x89PNG")
    assert plot(effects).png != plot(effects, layers=[1, 2]).png
    assert plot(effects, 0).png != plot(effects, 1).png
    plot(effects, 2).save(tmp_path / "fact.png")
    assert (tmp_path / "fact.png").read_bytes() == plot(effects, 2).png
    with pytest.raises(UserError, match="there is no fact 3: these effects hold 0 to 2"):
        plot(effects, 3)


def test_severed_paths_are_lines_with_intervals() -> None:
    runs = {
        "nothing": made_up([0.1, 0.6, 0.3], noise=0.1, kinds=("resid",)),
        "mlp": made_up([0.1, 0.1, 0.3], kinds=("resid",)),
    }
    picture = plot_severed(runs)
    assert picture.png.startswith(b"\x89PNG")
    assert picture.png == plot_severed(runs).png
    assert picture.png != plot_severed({**runs, "mlp": runs["nothing"]}).png
    assert picture.png != plot_severed(runs, role="last").png
    with pytest.raises(UserError, match="0 runs are to be drawn"):
        plot_severed({})
    with pytest.raises(UserError, match="'attn' was not traced"):
        plot_severed(runs, kind="attn")


def test_cut_windows_have_hollow_markers_and_a_dashed_line_that_sets_them_right() -> None:
    axis: Any = Figure().subplots()
    table = replace(made_up([0.4, 0.5, 0.3, 0.3, 0.0], facts=3).table("mlp", roles=["last_subject"]), window=4)
    line(axis, table, 0, "#26467f", "windows")
    drawn, whole, hollow, dashed = axis.get_lines()
    assert drawn.get_ydata().tolist() == pytest.approx([0.4, 0.5, 0.3, 0.3, 0.0])
    assert (whole.get_xdata().tolist(), whole.get_markerfacecolor()) == ([2, 3], "#26467f")
    assert (hollow.get_xdata().tolist(), hollow.get_markerfacecolor()) == ([0, 1, 4], "white")
    assert dashed.get_linestyle() == "--"
    assert dashed.get_ydata().tolist() == pytest.approx([0.8, 2 / 3, 0.3, 0.3, 0.0])  # of 2, 3, 4, 4 and 3 layers
    alone: Any = Figure().subplots()
    line(alone, replace(table, window=1), 0, "#26467f")
    assert not alone.get_lines()[2].get_xdata().size
    assert len(alone.get_lines()) == 3


def test_under_each_map_are_the_lines_of_the_subject_s_best_row_and_of_the_last_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[tuple[str, str, str]] = []
    monkeypatch.setattr(
        heatmaps, "line", lambda axis, table, row, color, label: drawn.append((table.kind, ROLES[row], label))
    )
    effects = made_up(BUMP, kinds=("resid", "mlp"))
    plot(effects)
    both = [("first_subject", "first subject token"), ("last", "last token")]
    assert drawn == [(kind, *one) for kind in ("resid", "mlp") for one in both]
    drawn.clear()
    figure([effects.table("mlp", roles=["last"])])
    assert drawn == [("mlp", ROLES[0], "last token")], "no subject was asked for"


def test_windows_cut_by_the_ends_are_known() -> None:
    assert cut_windows(5, 8, "mlp") == [0, 1, 6, 7]
    assert cut_windows(4, 8, "attn") == [0, 1, 7]
    assert cut_windows(1, 8, "mlp") == cut_windows(9, 8, "resid") == []
    assert cut_windows(99, 3, "mlp") == [0, 1, 2]


def test_a_fact_whose_name_looks_like_mathematics_is_drawn() -> None:
    effects = made_up([0.1, 0.5])
    named = replace(effects, facts=(replace(effects.facts[0], id=r"$\frac$ of \n $5"), *effects.facts[1:]))
    assert fact_figure(named, 0).startswith(b"\x89PNG")


def test_a_plan_is_outlined_where_it_trains_and_dashed_where_it_is_not_sure(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[str, bool]] = []

    def seen(axis: Any, band: Any, rows: int, tentative: bool) -> None:
        drawn.append((axis.get_title(loc="left"), tentative))

    monkeypatch.setattr(heatmaps, "outline", seen)
    effects = made_up([0.1, 0.5, 0.2], kinds=("resid", "mlp", "attn"))
    plot(effects, plan=LayerPlan(layers=(1,), modules=("mlp",)))
    plot(effects, plan=LayerPlan(layers=(1,), modules=("all",), singled_out=True))
    assert drawn == [("MLP", True), ("whole stream after a block", False)]
    with pytest.raises(UserError, match="no facts"):
        effects.some([])


def test_the_color_bar_has_shares_beside_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[Any] = []
    real = Figure.colorbar
    monkeypatch.setattr(Figure, "colorbar", lambda *given, **named: bars.append(real(*given, **named)) or bars[-1])
    effects = made_up([0.1, 0.4, 0.2], facts=2)  # of a total effect of 0.8
    plot(effects)
    plot(effects, 0)
    nothing = replace(effects, clean=np.array([0.1, 0.0]))
    plot(nothing)
    plot(nothing, 1)
    for bar in bars[:2]:
        assert "0.4 (50%)" in [tick.get_text() for tick in bar.ax.get_yticklabels()]
        assert "share of the total effect" in bar.ax.get_ylabel()
    for bar in bars[2:]:
        assert not any("%" in tick.get_text() for tick in bar.ax.get_yticklabels())
        assert "share" not in bar.ax.get_ylabel()


def test_the_label_of_the_color_bar_has_room_beside_few_rows() -> None:
    """One row is drawn as high as the label is long, and not less."""
    one = made_up(BUMP, facts=3).table("mlp", roles=["last_subject"])
    four = made_up(BUMP, facts=3).table("mlp", roles=["first_subject", "middle_subject", "last_subject", "last"])
    assert pixels(figure([one])).shape[0] >= pixels(figure([four])).shape[0]


def test_the_rows_of_a_long_prompt_are_drawn_together_where_they_bring_nothing_back() -> None:
    cells = np.zeros((154, 3))
    cells[60:64], cells[100, 1], cells[120] = 0.4, -0.3, np.nan
    rows = heatmaps._token_rows(cells, range(60, 64))
    apart = [(60,), (61,), (62,), (63,), tuple(range(64, 100)), (100,), tuple(range(101, 120)), tuple(range(121, 153))]
    assert rows == [tuple(range(60)), *apart, (153,)]
    cells[64:] = np.linspace(0.1, 0.2, 90)[:, None]
    rows = heatmaps._token_rows(cells, range(60, 64))
    alone = [row[0] for row in rows if len(row) == 1]
    assert alone == [60, 61, 62, 63, *range(118, 154)], "the largest, and the last"
    assert heatmaps._largest(np.array([[0.1, np.nan, -0.2], [-0.3, np.nan, 0.1]])).tolist()[::2] == [-0.3, -0.2]


def test_of_one_fact_or_group_no_intervals_are_promised() -> None:
    def caption(facts: int, groups: int | None = None) -> str:
        return heatmaps._caption([made_up(BUMP, facts=facts, groups=groups).table("mlp")], (), 1.0, False)

    assert "lines: of one fact, without intervals" in caption(1)
    assert "lines: of one group of facts, without intervals" in caption(3, groups=1)
    assert "lines: means with their 95% intervals" in caption(3)
    assert "1\u00a0fact\u00a0" in caption(1)
