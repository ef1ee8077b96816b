"""Trials: criteria side by side, resumable, with statistics that can be checked by hand."""

import json
import re

import numpy as np
import pytest
import torch
from scipy import stats

import pyprune as pp
from pyprune import comparing, criteria, trials
from pyprune.comparing import Attempt, Trial
from pyprune.data import digits, loader
from pyprune.types import Evaluation
from tolerances import STATISTICS


@pytest.fixture(scope="module")
def trained():
    splits = digits(seed=0)
    torch.manual_seed(0)
    model = pp.models.vgg_digits(widths=(12, 16))
    pp.finetune(model, loader(splits.train, shuffle=True, seed=0), epochs=2, lr=0.05, progress=False)
    return model, splits


def data(splits):
    return (
        loader(splits.train, shuffle=True, seed=0), loader(splits.val), loader(splits.test), loader(splits.train),
    )  # fmt: skip


SETTINGS = {"runs": 2, "images_per_class": 5, "steps": 3, "progress": False, "rates": 0.5}


@pytest.fixture(scope="module")
def found(trained, tmp_path_factory):
    model, splits = trained
    folder = tmp_path_factory.mktemp("trial")
    before = {name: one.clone() for name, one in model.state_dict().items()}
    result = pp.trial(model, ["l1", "random"], data(splits), folder=folder, **SETTINGS)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    return result, folder


def test_a_trial_compares_at_the_same_rates(found):
    result, folder = found
    assert list(result.attempts) == ["l1", "random"]
    one, other = result.attempts["l1"]
    assert [one.seed, other.seed] == [0, 1]
    assert all(np.array_equal(one.keep[name], other.keep[name]) for name in one.keep)  # weights do not change
    assert one.finetuned.loss != other.finetuned.loss  # the order of batches does
    first, second = result.attempts["random"]
    assert any(not np.array_equal(first.keep[name], second.keep[name]) for name in first.keep)
    assert one.parameters == first.parameters < result.parameters
    assert {name: len(kept) for name, kept in one.keep.items()} == {
        name: filters // 2 for name, filters in result.filters.items()
    }
    assert result.original.top1 > one.pruned.top1
    assert set(one.fairness) == {"eopp0", "eopp1", "eodd", "eodd_separate", "excess"}
    again = Trial.load(folder / "trial.json")
    assert again.to_json() == result.to_json()
    assert "random" in str(result)
    assert "by chance" in str(result)
    page = (folder / "report.html").read_text()
    assert page.count("data:image/svg+xml;base64,") == 2
    assert "Content-Security-Policy" in page


def test_a_stopped_trial_goes_on_and_takes_more_methods(trained, found, monkeypatch):
    model, splits = trained
    result, folder = found
    done = {path: path.stat().st_mtime_ns for path in folder.glob("*/run_*.json")}
    (folder / "l1" / "run_1.json").unlink()
    more = pp.trial(model, ["l1", "random", "l2"], data(splits), folder=folder, **SETTINGS)
    assert more.attempts["l1"][1].to_json() == result.attempts["l1"][1].to_json()  # the same bits
    left = [path for path, when in done.items() if path.stat().st_mtime_ns != when]
    assert left == [folder / "l1" / "run_1.json"]
    assert list(more.attempts) == ["l1", "random", "l2"]
    assert not list(folder.glob("*/training_*"))


def test_cranks_own_plan_takes_part_at_its_own_rates(trained):
    model, splits = trained
    result = pp.trial(
        model, {"ours": "crank", "norm": "l1"},
        data(splits), runs=1, images_per_class=5, steps=1, progress=False,
    )  # fmt: skip
    one, other = (result.attempts[name][0].keep for name in ("ours", "norm"))
    assert {name: len(kept) for name, kept in one.items()} == {name: len(kept) for name, kept in other.items()}
    assert result.rows()[0]["deviation"] is None
    assert result.compare("ours", "norm").p is None


def test_welch_and_cohen_by_hand():
    first, second = np.array([0.80, 0.82, 0.84]), np.array([0.70, 0.72, 0.71])
    found = comparing.compare(first, second)
    # Deviations 0.02 and 0.01; t = 0.11 / sqrt(0.0004 / 3 + 0.0001 / 3), by Welch's degrees of freedom 2.941.
    t = 0.11 / np.sqrt(0.0005 / 3)
    assert found.difference == pytest.approx(0.11, abs=STATISTICS)
    assert found.p == pytest.approx(2 * stats.t.sf(t, 0.0005**2 * 2 / (0.0004**2 + 0.0001**2)), abs=STATISTICS)
    assert found.d == pytest.approx(0.11 / np.sqrt(0.00025), abs=STATISTICS)
    assert comparing.compare(first, second).d == pytest.approx(-comparing.compare(second, first).d, abs=STATISTICS)
    assert comparing.compare(np.array([0.5, 0.5]), np.array([0.4, 0.4])).p is None
    assert comparing.compare(first[:1], second).d is None


def test_overlap_by_hand():
    found = comparing.overlap(np.array([0, 1]), np.array([1, 2]), 4)
    # Two of four, drawn twice: at least one in common unless the second draw takes exactly the other two, 1 in 6.
    assert (found.common, found.chance) == (1, 1.0)
    assert found.p == pytest.approx(5 / 6, abs=STATISTICS)


def test_tables_by_hand():
    def attempt(top1, keep):
        hits = round(100 * top1)
        scored = Evaluation(np.array([[hits, 100 - hits], [100 - hits, hits]]), 0.5, None, 0.9)
        return Attempt(0, {"a": np.array(keep)}, scored, scored, 10, 100)

    result = Trial(
        attempt(0.9, [0]).finetuned, 20, 200, {"a": 4},
        {"x": (attempt(0.8, [0, 1]), attempt(0.82, [0, 1])), "y": (attempt(0.7, [1, 2]), attempt(0.7, [1, 2]))},
    )  # fmt: skip
    best, worst = result.rows()
    assert (best["method"], worst["method"]) == ("x", "y")
    assert best["top1"] == pytest.approx(0.81, abs=STATISTICS)
    assert best["deviation"] == pytest.approx(0.02 / np.sqrt(2), abs=STATISTICS)
    (pair,) = result.pairs()
    assert pair["methods"] == "x, y"
    assert (pair["common_filters"], pair["by_chance"], pair["of"]) == (1, 1.0, 2)
    json.dumps(result.to_json(), allow_nan=False)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"methods": ["l1", "l1"]}, ValueError, "'l1' is there twice"),
        ({"methods": {"../x": "l1"}}, ValueError, "labels of methods become folders"),
        ({"methods": ["l11"]}, ValueError, "Did you mean 'l1'"),
        ({"methods": []}, TypeError, "methods must be criteria in a list"),
        ({"methods": 3}, TypeError, "methods must be criteria in a list"),
        ({"runs": 0}, ValueError, "runs must be a whole number of at least 1; got 0"),
        ({"runs": True}, ValueError, "runs must be a whole number"),
        ({"data": None}, TypeError, "two to four loaders"),
        ({"data": (None, [])}, ValueError, "got None for one of them"),
        ({"data": ([], [])}, ValueError, "the training loader is empty"),
        ({"rates": 1.5}, ValueError, "select: .*1.5"),
    ],
)
def test_bad_arguments(trained, changes, error, message):
    model, splits = trained
    with pytest.raises(error, match=message):
        pp.trial(
            model, **{"methods": ["l1"], "data": data(splits), "runs": 1, "progress": False, "rates": 0.5, **changes}
        )


def test_a_folder_of_another_trial_is_refused(trained, found):
    model, splits = trained
    _, folder = found
    with pytest.raises(ValueError, match=re.escape(f"trial: {folder} holds a run with other lr. Choose another")):
        pp.trial(model, ["l1"], data(splits), folder=folder, **{**SETTINGS, "lr": 0.5})
    with pytest.raises(ValueError, match="of 'random' with other settings"):
        pp.trial(model, {"random": criteria.find("x", "random", {"seed": 7})}, data(splits), folder=folder, **SETTINGS)


def test_broken_files_are_refused(tmp_path):
    path = tmp_path / "trial.json"
    path.write_text(json.dumps({"format": "pyprune.trial", "version": 1}))
    with pytest.raises(ValueError, match=r"Trial\.load: .* lacks or garbles"):
        Trial.load(path)
    path.write_text(json.dumps({"format": "pyprune.attempt", "version": 1, "seed": None}))
    with pytest.raises(ValueError, match=r"Attempt\.load: .* lacks or garbles"):
        Attempt.load(path)


def test_loaders_by_name_and_by_place():
    assert trials._loaders(("a", "b")) == trials.Loaders("a", "b")
    assert trials._loaders(("a", "b", "c")) == trials.Loaders("a", "c", "b")
    assert trials._loaders(["a", None, "c", "d"]) == trials.Loaders("a", "c", None, "d")
