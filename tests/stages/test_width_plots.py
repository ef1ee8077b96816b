"""Pictures and the page of a search for widths: what they show, of whole and of awkward searches."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex, to_rgba
from searches import STANDARD, awkward, search, width_run

import pyprune as pp
from pyprune.drawing import ACCENT, COLOURS, GREY, LIGHT, encoded
from pyprune.searching import WidthRun, WidthSearch, WidthStep
from pyprune.width_plots import omega_figure, parameters_figure, plot_widths, scores_figure, steps_figure


@pytest.fixture(scope="module")
def result() -> WidthSearch:
    return search()


def texts(axes) -> list[str]:
    return [one.get_text() for one in axes.texts]


def test_width_lambda_and_scores_by_step(result: WidthSearch) -> None:
    figure = steps_figure(result)
    widths, lambdas, scores = figure.axes
    assert [list(line.get_ydata()) for line in widths.lines[:2]] == [[8, 4, 2, 3], [12, 6, 3, 6]]
    assert (widths.get_yscale(), lambdas.get_yscale()) == ("log", "linear")
    drawn, limit = (list(line.get_ydata()) for line in lambdas.lines[2:4])
    assert drawn[:3] == [result.redundancy(step, "conv2") for step in result.steps[:3]]
    assert np.isnan(drawn[3]), "a step without runs has no lambda"
    for step, value, bound in zip(result.steps[:3], drawn, limit, strict=False):
        assert bound == pytest.approx(value - result.excess(step, "conv2") + 0.01)
    first = lambdas.lines[1].get_ydata()[0]
    assert first == pytest.approx(result.by_layer(result.standard, "conv1")["conv1"][1] + 0.01)
    assert [one.get_text() for one in lambdas.get_legend().get_texts()] == ["lambda", "random kernels + 0.01"]
    means = {line.get_label(): list(line.get_ydata()) for line in scores.lines}
    assert means["validation auc"] == [one.validation("auc").mean() for one in result.steps[:3]]
    assert means["test auc"] == [one.test("auc").mean() for one in result.steps[:3]]
    runs = [line.get_ydata().tolist() for line in scores.lines if line.get_linestyle() == "None"]
    assert runs[:3] == [one.validation("auc").tolist() for one in result.steps[:3]]
    (band,) = [one for one in scores.patches if one.get_label() == "tolerance"]
    mean = result.standard.validation("auc").mean()
    assert band.get_y() == mean - 0.02
    assert band.get_y() + band.get_height() == pytest.approx(mean)
    grey = [one.get_x() + 0.5 for one in scores.patches if to_hex(one.get_facecolor()) == LIGHT]
    assert grey == [2, 3], "steps that do not hold"
    assert texts(widths) == ["chosen"]
    assert texts(scores) == ["no run"]
    assert [one.get_text() for one in widths.get_legend().get_texts()] == ["conv1", "conv2"]


def test_parameters_by_step(result: WidthSearch) -> None:
    axes = parameters_figure(result).axes[0]
    assert [bar.get_height() for bar in axes.patches] == [2000, 1000, 500, 0]
    assert [to_hex(bar.get_facecolor()) for bar in axes.patches] == [GREY, ACCENT, LIGHT, LIGHT]
    assert texts(axes) == ["2k\n100%", "1k\n50%", "500\n25%", "no run"]


def test_omega_of_the_narrow_network_stands_left_of_the_standard_one(result: WidthSearch) -> None:
    figure = omega_figure(result)
    panels = [axes for axes in figure.axes if axes.axison]
    assert len(panels) == 2 * 3, "three layers, two networks"
    left, right = panels[2:4]
    assert texts(left)[0] == "6x4x3x3"
    assert texts(left)[-1] == "conv2.0", "the name stands above both"
    assert texts(right)[0] == "12x8x3x3"
    found = [f"{run.redundancy.lambdas()['conv2.0']:.4f}" for run in result.standard.runs]
    assert texts(right)[1:] == ["lambda", *found]
    null, *runs = right.patches
    assert to_hex(null.get_facecolor()) == LIGHT
    assert [to_hex(one.get_edgecolor()) for one in runs] == list(COLOURS[:3])
    histogram = result.standard.runs[1].redundancy["conv2.0"].histogram.reshape(20, 5).sum(1)  # 66 pairs are few
    np.testing.assert_array_equal(runs[1].get_data().values, histogram / histogram.sum())
    assert right.lines[0].get_xdata() == [0.6, 0.6]
    assert figure.get_suptitle() == "Omega, runs over one another: narrow network left, standard right"


def test_many_runs_are_told_as_a_range_and_many_layers_as_so_many(
    result: WidthSearch, monkeypatch: pytest.MonkeyPatch
) -> None:
    five = tuple(width_run(i) for i in range(5))
    many = search(steps=(WidthStep(STANDARD, {}, five), *result.steps[1:]))
    monkeypatch.setattr("pyprune.width_plots.SHOWN_LAYERS", 2)
    figure = omega_figure(many)
    values = [run.redundancy.lambdas()["conv1"] for run in five]
    told = f"lambda {np.mean(values):.4f} ({min(values):.4f} to {max(values):.4f})"
    assert texts(figure.axes[1])[1] == told
    assert figure.get_suptitle().endswith("; the first 2 of 3 layers")
    assert sum(axes.axison for axes in figure.axes) == 4


def test_scores_of_both_networks(result: WidthSearch) -> None:
    auc, accuracy = scores_figure(result).axes
    assert [tick.get_text() for tick in auc.get_xticklabels()] == ["standard", "narrow"]
    dots = [line.get_ydata().tolist() for line in auc.lines[::2]]
    assert dots == [result.standard.test("auc").tolist(), result.narrow.test("auc").tolist()]
    assert [line.get_ydata()[0] for line in auc.lines[1::2]] == [np.mean(one) for one in dots]
    assert auc.get_title().split("\n") == ["ANOVA: F(1, 4) = 0, p = 1", "equal within 0.02: p = 0.035"]
    assert accuracy.get_ylabel() == "test accuracy"
    assert to_rgba(auc.lines[0].get_color()) == to_rgba(COLOURS[0])


def test_many_scores_stand_in_rows() -> None:
    scores = {f"score {i}": 0.1 * i for i in range(6)}
    run = width_run(0)
    run = WidthRun(0, STANDARD, 9, {"auc": 0.5}, scores, {}, run.redundancy)
    figure = scores_figure(search(steps=(WidthStep(STANDARD, {}, (run,)),)))
    assert [axes.get_ylabel() for axes in figure.axes if axes.axison] == [f"test {name}" for name in scores]
    assert figure.axes[4].get_position().y1 < figure.axes[0].get_position().y0


def test_the_same_bytes_twice(result: WidthSearch, tmp_path: Path) -> None:
    paths = plot_widths(result, tmp_path / "new")
    assert [path.name for path in paths.values()] == ["steps.svg", "parameters.svg", "omega.svg", "scores.svg"]
    again = plot_widths(result, tmp_path / "again")
    for name, path in paths.items():
        root = ET.parse(path).getroot()  # noqa: S314
        assert root.tag.endswith("svg")
        assert again[name].read_bytes() == path.read_bytes()
    other = encoded(parameters_figure(search(steps=result.steps[:2])))
    assert encoded(parameters_figure(result)) == paths["parameters"].read_bytes() != other


def test_figures_as_png(tmp_path: Path) -> None:
    paths = plot_widths(awkward()["no runs"], tmp_path, form="png")
    assert [path.name for path in paths.values()] == ["steps.png", "parameters.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths.values())


@pytest.mark.parametrize("name", list(awkward()))
def test_awkward_searches_are_drawn(name: str, tmp_path: Path) -> None:
    some = awkward()[name]
    pp.report(some, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count("<img") == (4 if some.standard.runs else 2), "without a standard network nothing is compared"
    assert "nan" not in re.sub('data:[^"]*', "", page).lower().partition("<h2>runs")[0]
    if name == "one run":
        assert "No narrower network holds" in page
        assert scores_figure(some).axes[0].get_title() == ""
    if name == "no pairs":
        panels = [axes for axes in omega_figure(some).axes if axes.axison]
        assert texts(panels[2])[1] == "no pairs"
        assert len(panels[2].patches) == 0


def test_hostile_names_do_no_harm(tmp_path: Path) -> None:
    bad = "$\\frac{1}$\x1b[31m<script>alert(1)</script>"
    widths = {bad: 4, "_": 5}
    kernels = pp.ckrm({bad: np.random.default_rng(0).normal(size=(4, 1, 3, 3)), "_$x^": np.ones((5, 4, 3, 3))})
    run = WidthRun(0, widths, 9, {"$x_": 0.5}, {"$x_": 0.5}, {bad: 3}, kernels, failures=("<b>&\x00",))
    layers = {bad: (bad,), "_": ("_$x^",)}
    steps = (WidthStep(widths, {bad: "<i>"}, (run,)), WidthStep(widths, {}, (), {"<u>": "<script>"}, False))
    some = WidthSearch(steps, layers, "$x_", "<script>", ("<script>",), {"<script>": "<script>", "threshold": "$_"})
    for path in plot_widths(some, tmp_path).values():
        ET.parse(path)  # noqa: S314
        assert path.parent == tmp_path
    pp.report(some, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "&lt;script&gt;" in page
    assert "<script" not in page


def test_the_page_is_self_contained(result: WidthSearch, tmp_path: Path) -> None:
    pp.report(result, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in page
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)
    assert page.count("<img") == 4
    for told in (
        "the budget of 12 trainings is spent", "lambda of conv1 starts at 0", "50% of the standard one", "1 (chosen)",
        "4<br><span class=\"muted\">lambda 0.12</span>", "NaN loss, and again", "the loss was NaN", "17 trainings",
        "3 of 3 layers", "<td>target</td><td class=\"text\">0.01</td>", "p = 0.035 (within 0.02)",
    ):  # fmt: skip
        assert told in page, told


def test_what_cannot_be_drawn(result: WidthSearch, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="needs the WidthSearch of optimize_widths; got dict"):
        plot_widths({}, tmp_path)
    with pytest.raises(ValueError, match="form must be 'svg' or 'png'; got 'gif'"):
        plot_widths(result, tmp_path, form="gif")
    (tmp_path / "taken").write_text("")
    with pytest.raises(ValueError, match="output folder must be writable"):
        plot_widths(result, tmp_path / "taken")
