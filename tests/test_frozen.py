"""Files of earlier versions still load and mean the same; a new format adds a folder and keeps the old ones."""

from pathlib import Path

import numpy as np
import pytest
import torch

import pyprune as pp
from pyprune.searching import WidthSearch
from tolerances import FROZEN_LOGITS

V1 = Path(__file__).parent / "frozen" / "v1"


def test_ranks_and_plan_of_version_1() -> None:
    ranks = pp.ClassRanks.load(V1 / "ranks.safetensors")
    assert ranks.layers["0"].shape == (8, 3)
    assert ranks.layers["0"].sum() == 144.25
    plan = pp.Plan.load(V1 / "plan.json")
    assert plan.method == "crank"
    assert plan.keep["0"].tolist() == [2, 4]


def test_redundancy_of_version_1() -> None:
    result = pp.CKRM.load(V1 / "ckrm.json")
    assert list(result.networks) == ["run 0", "run 1"]
    assert result.lambdas(0.3, "run 0") == pytest.approx({"first": 0.4, "second": 1.0, "single": np.nan}, nan_ok=True)
    layer = result["run 1", "first"]
    assert (layer.pairs, layer.all_pairs) == (5, 6)
    assert layer.top[0] == (1, 3, 0.5397180453811635)
    assert layer.random is not None
    assert layer.random.mean == 0.4136885670160386
    assert result.left_out["run 0"] == {"point": "1x1 kernels have no structure"}


def test_width_search_of_version_1() -> None:
    search = WidthSearch.load(V1 / "width_search.json")
    assert (search.metric, search.stopped) == ("auc", "the budget of 12 trainings is spent")
    standard, narrow = search.steps
    assert (standard.widths, narrow.widths) == ({"conv1": 8, "conv2": 12}, {"conv1": 4, "conv2": 3})
    assert [run.validation["auc"] for run in standard.runs] == [0.9, 0.91]
    assert standard.runs[1].failures == ("the loss was NaN",)
    assert narrow.given_up == {"1": "the loss was NaN, and again"}
    assert (narrow.holds, search.trainings, search.tests) == (False, 6, ("auc", "accuracy"))
    assert [search.redundancy(step, "conv1") for step in search.steps] == pytest.approx([1 / 14, 1 / 6])


def test_slim_folder_of_version_1() -> None:
    images = torch.linspace(-1, 1, 100).reshape(1, 1, 10, 10)
    expected = [-0.07524839043617249, -0.0934397429227829, -0.08192671835422516]
    with torch.no_grad():
        assert pp.load_slim(V1 / "slim")(images)[0].tolist() == pytest.approx(expected, abs=FROZEN_LOGITS)
