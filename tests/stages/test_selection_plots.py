"""Pictures of selections: which are drawn, what they show, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from test_selection import HAND, model_of, ranks_of, run

import pyprune as pp
from pyprune.drawing import ACCENT, LIGHT
from pyprune.selection_plots import plot_selection, scores_figure, steps_figure


def test_every_step_of_one_layer():
    why = run(HAND).why["0"]
    figure = steps_figure(HAND, why, "layer")
    panels = [axes for axes in figure.axes if axes.get_title(loc="left")]
    titles = [axes.get_title(loc="left") for axes in panels]
    assert [title[0] for title in titles] == list("123456")
    assert titles[2] == "3. AVG and STD of the rows of X: 4 filters in the region"
    assert titles[3] == "4. K = 4 clusters, mean silhouette 0.62; stars are medoids"
    assert titles[4] == "5. 1 clusters survive: their medoid lies in the region"
    assert figure.get_suptitle() == "layer: 2 of 8 filters stay"
    np.testing.assert_array_equal(panels[0].images[0].get_array(), HAND.T)
    np.testing.assert_array_equal(panels[1].images[0].get_array(), HAND.T / 10)
    bars = panels[5].patches
    assert len(bars) == 4, "the members of the surviving cluster"
    assert sum(bar.get_facecolor()[3] > 0 for bar in bars) == 2, "those that stay are filled"
    assert sorted(bar.get_height() for bar in bars) == sorted(why[f].silhouette for f in (1, 2, 3, 7))


def test_scores_of_one_layer():
    why = pp.select(model_of(8), "hrank", ranks=ranks_of(HAND), rates=0.75).why["0"]
    bars = scores_figure(why, "layer by hrank").axes[0].patches
    assert [bar.get_height() for bar in bars] == sorted(HAND.mean(1), reverse=True)
    kept = [bar.get_facecolor()[:3] for bar in bars]
    assert len(set(kept[:2])) == len(set(kept[2:])) == 1 != len(set(kept))
    assert ACCENT != LIGHT


def test_one_file_a_layer(tmp_path):
    model, ranks = model_of(8, 8, 8), ranks_of(HAND, HAND, np.ones((8, 2)))
    plan = pp.select(model, ranks=ranks, exclude=["1"], jobs=1)
    written = plot_selection(plan, tmp_path / "new", ranks)
    assert [path.name for path in written] == ["0.svg"], "layers that were left alone have no steps"
    again = plot_selection(plan, tmp_path / "again", ranks)
    assert again[0].read_bytes() == written[0].read_bytes()
    scores = plot_selection(pp.select(model, "l1", rates=0.5), tmp_path / "scores", layers=["2"])
    assert [path.name for path in scores] == ["2.svg"]
    assert plot_selection(plan, tmp_path / "scores only")[0].stat().st_size < written[0].stat().st_size
    by_hand = pp.Plan({"../0": [1]}, {"../0": 3})
    assert plot_selection(by_hand, tmp_path) == []
    with pytest.raises(ValueError, match="the plan has no layer 'x'"):
        plot_selection(plan, tmp_path, ranks, layers=["x"])
