"""Files of earlier versions still load and mean the same; a new format adds a folder and keeps the old ones."""

from pathlib import Path

import pytest
import torch

import pyprune as pp
from tolerances import FROZEN_LOGITS

V1 = Path(__file__).parent / "frozen" / "v1"


def test_ranks_and_plan_of_version_1() -> None:
    ranks = pp.ClassRanks.load(V1 / "ranks.safetensors")
    assert ranks.layers["0"].shape == (8, 3)
    assert ranks.layers["0"].sum() == 144.25
    plan = pp.Plan.load(V1 / "plan.json")
    assert plan.method == "crank"
    assert plan.keep["0"].tolist() == [2, 4]


def test_slim_folder_of_version_1() -> None:
    images = torch.linspace(-1, 1, 100).reshape(1, 1, 10, 10)
    expected = [-0.07524839043617249, -0.0934397429227829, -0.08192671835422516]
    with torch.no_grad():
        assert pp.load_slim(V1 / "slim")(images)[0].tolist() == pytest.approx(expected, abs=FROZEN_LOGITS)
