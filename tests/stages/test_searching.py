"""Results of a search for widths: what they say, that they come back bit for bit, that damaged ones are refused."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from searches import STANDARD, awkward, redundancy, search, width_run

from pyprune.comparing import anova, compare, equivalence
from pyprune.searching import WidthRun, WidthSearch, WidthStep
from tolerances import STATISTICS


@pytest.fixture(params=["whole", *awkward()])
def each(request: pytest.FixtureRequest) -> WidthSearch:
    return search() if request.param == "whole" else awkward()[request.param]


def test_searches_come_back_bit_for_bit(each: WidthSearch, tmp_path: Path) -> None:
    each.save(tmp_path / "a")
    back = WidthSearch.load(tmp_path / "a")
    back.save(tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()
    assert back.to_json() == each.to_json()
    assert [list(step.widths) for step in back.steps] == [list(step.widths) for step in each.steps]
    assert (back.layers, back.tests, back.trainings, str(back)) == (each.layers, each.tests, each.trainings, str(each))


def test_runs_come_back_bit_for_bit(tmp_path: Path) -> None:
    run = width_run(7, failures=("the loss was NaN",), validation=1 / 3)
    run.save(tmp_path / "a")
    back = WidthRun.load(tmp_path / "a")
    assert (back.to_json(), back.failures, back.validation["auc"]) == (run.to_json(), run.failures, 1 / 3)
    (tmp_path / "a").write_text(json.dumps({"format": "pyprune.width_run", "version": 2}))
    with pytest.raises(ValueError, match="format version 2; this pyprune reads 1 to 1"):
        WidthRun.load(tmp_path / "a")


def test_what_a_search_says() -> None:
    result = search()
    assert result.standard is result.steps[0]
    assert result.narrow is result.steps[1], "the smallest that holds, not the smallest"
    assert result.widths == {"conv1": 4, "conv2": 6}
    # Three, three and two runs that ended well, of which one a step was a repetition; three that failed twice.
    assert result.trainings == 8 + 3 + 6
    assert (result.tests, result.scores, result.tolerance) == (("auc", "accuracy"), ("auc", "accuracy"), 0.02)
    rows = result.rows()
    assert [row["parameters"] for row in rows] == [2000, 1000, 500, None]
    assert [row["runs"] for row in rows] == [3, 3, 2, 0]
    assert rows[0]["validation auc"] == pytest.approx(0.9, abs=STATISTICS)
    assert rows[0]["test accuracy deviation"] == pytest.approx(0.01, abs=STATISTICS)
    assert "validation auc" not in rows[3]
    assert str(result).splitlines() == [
        "step  parameters  lambda    validation auc          test auc  holds",
        "   0       2,000  0.1071  0.9000 +- 0.0100  0.8800 +- 0.0100    yes",
        "   1       1,000  0.1667  0.9000 +- 0.0100  0.8800 +- 0.0100    yes",
        "   2         500  1.0000  0.7100 +- 0.0141  0.6900 +- 0.0141     no",
        "   3           -       -                 -                 -     no",
        "widths: conv1 8 > 4, conv2 12 > 6",
        "auc: ANOVA F(1, 4) = 0, p 1.000; difference +0.0000, within 0.02 (two one-sided tests) p 0.035",
        "accuracy: ANOVA F(1, 4) = 0, p 1.000; difference +0.0000, within 0.02 (two one-sided tests) p 0.035",
        "stopped: the budget of 12 trainings is spent",
        "lambda of conv1 starts at 0",
    ]


def test_lambda_of_a_width_is_the_largest_mean_of_its_layers() -> None:
    result = search()
    step = result.standard
    by_layer = step.lambdas()
    assert list(by_layer) == ["conv1", "conv2.0", "conv2.1"]
    found = [run.redundancy.lambdas() for run in step.runs]
    assert by_layer["conv2.1"].tolist() == [one["conv2.1"] for one in found]
    wanted = max(np.mean([one[layer] for one in found]) for layer in ("conv2.0", "conv2.1"))
    assert result.redundancy(step, "conv2") == pytest.approx(wanted, abs=STATISTICS)
    assert result.redundancy(step, "conv1") == pytest.approx(by_layer["conv1"].mean(), abs=STATISTICS)
    assert math.isnan(result.redundancy(result.steps[3], "conv1"))
    narrow = awkward()["no pairs"].steps[1]
    assert np.isnan(narrow.lambdas()["conv2.1"]).all()
    assert math.isnan(awkward()["no pairs"].redundancy(narrow, "conv2"))
    assert awkward()["no pairs"].rows()[1]["lambda"] == 1.0, "the two filters that are alike"


def test_awkward_searches_say_what_they_have() -> None:
    some = awkward()
    assert some["one run"].narrow is some["one run"].standard
    assert "0.9000 " in str(some["one run"])
    assert "ANOVA" not in str(some["one run"])
    assert some["no test"].tests == ()
    assert some["no test"].scores == ("auc", "accuracy")
    assert "validation auc  holds" in str(some["no test"])
    assert some["no runs"].narrow is some["no runs"].standard
    assert some["no runs"].scores == ()
    assert some["no runs"].trainings == 2
    assert "ANOVA undefined (single runs, or no variance)" in str(some["no pairs"])
    assert "two one-sided" not in str(some["no pairs"]), "without a tolerance there is no margin"
    same = some["all the same"]
    assert (same.anova("auc").p, same.compare("auc").p, same.equivalence("auc").p) == (None, None, None)
    late = some["the standard failed"]
    assert late.narrow is late.steps[1]
    assert (late.anova("auc").f, late.compare("auc").p) == (None, None)
    assert math.isnan(late.compare("auc").difference)
    with pytest.raises(ValueError, match=r"margin must be a positive number; got 0"):
        late.equivalence("auc")


def test_only_scores_that_every_run_has_are_compared() -> None:
    runs = (width_run(0), width_run(1, test=None))
    result = search(steps=(WidthStep(STANDARD, {}, runs), WidthStep({"conv1": 4, "conv2": 6}, {}, runs[:1])))
    assert result.tests == ()
    assert set(result.rows()[1]) - set(result.rows()[0]) == {
        "test auc", "test auc deviation", "test accuracy", "test accuracy deviation",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": ()}, "needs at least one step, the standard network"),
        ({"layers": {"conv1": ("conv1",)}}, "their layers must be named"),
        ({"steps": (*search().steps, WidthStep({"conv1": 2}, {}, ()))}, "every step must have the same widths"),
        ({"metric": "f1"}, "every run must have the validation score 'f1' that decides"),
        ({"options": {"tolerance": -1}}, "the tolerance must be a number of at least 0; got -1"),
        ({"options": {"tolerance": "0.1"}}, "the tolerance must be a number of at least 0; got 0.1"),
        ({"options": {"tolerance": True}}, "the tolerance must be a number"),
        ({"options": {"target": [0.1]}}, "the target must be a number"),
    ],
)
def test_what_does_not_belong_together_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"WidthSearch: .*{message}"):
        search(**changes)


def test_runs_of_other_networks_are_refused() -> None:
    two = redundancy(STANDARD, 0)
    two = type(two)({"a": two.layers(), "b": two.layers()}, two.thresholds)
    with pytest.raises(ValueError, match="the redundancy of a run must be that of one network"):
        search(steps=(WidthStep(STANDARD, {}, (width_run(0, redundancy=two),)),))
    fewer = redundancy(STANDARD, 0, layers=["conv1"])
    with pytest.raises(ValueError, match="the runs of a step must have the same layers"):
        search(steps=(WidthStep(STANDARD, {}, (width_run(0), width_run(1, redundancy=fewer))),))


def places(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield where something stands in the JSON of a search, the insides of a redundancy and of the options left out."""
    items = list(content.items() if isinstance(content, dict) else enumerate(content))
    for key, value in items[:2] if isinstance(content, list) else items:
        yield (*path, key)
        if isinstance(value, dict | list) and key not in ("redundancy", "options", "rows"):
            yield from places(value, (*path, key))


RECOMPUTED = ("rows", "widths")  # written for readers of the file; loading computes them again


def test_every_field_that_lacks_or_is_of_another_kind_is_refused(tmp_path: Path) -> None:
    whole = search(steps=search().steps[2:3]).to_json()
    tried = 0
    for place in places(whole):
        if place[0] in RECOMPUTED or (len(place) > 2 and place[-1] in ("format", "version")):
            continue  # a run inside a search is known by its place
        for garbage in (None, "x", -1, True, [], [[]], {}, {"a": []}, 1e300, 10**400):
            content = copy.deepcopy(whole)
            parent = content
            for key in place[:-1]:
                parent = parent[key]
            old = parent[place[-1]]
            if type(old) is type(garbage) and garbage != 10**400:
                continue  # what is of the right kind may be another search
            if garbage == -1 and (type(old) is float or place[-1] == "seed"):
                continue
            parent[place[-1]] = garbage
            refused(tmp_path, content, f"{place} = {garbage!r}")
            tried += 1
        if isinstance(parent, dict) and place[-1] not in ("conv1", "conv2", "auc", "accuracy", "2", "0", "1"):
            content = copy.deepcopy(whole)
            parent = content
            for key in place[:-1]:
                parent = parent[key]
            del parent[place[-1]]
            refused(tmp_path, content, f"without {place}")
            tried += 1
    assert tried > 200


def refused(folder: Path, content: dict[str, Any], what: str) -> None:
    (folder / "s").write_text(json.dumps(content))
    try:
        WidthSearch.load(folder / "s")
    except ValueError as error:
        assert re.match(r"(WidthSearch|WidthRun|CKRM)(\.load)?: ", str(error)), (what, error)  # noqa: PT017
    else:
        pytest.fail(f"accepted {what}")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format": "other"}', '{"format": "pyprune.width_search"}'])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "s").write_text(text)
    with pytest.raises(ValueError, match=r"WidthSearch\.load: "):
        WidthSearch.load(tmp_path / "s")
    with pytest.raises(ValueError, match=r"WidthSearch\.load: "):
        WidthSearch.load(tmp_path / "nothing there")


SAMPLES = st.lists(st.lists(st.integers(0, 1000), min_size=2, max_size=6), min_size=2, max_size=4)


@given(SAMPLES)
@settings(deadline=None, max_examples=60)
def test_anova_is_the_formula(drawn: list[list[int]]) -> None:
    samples = [np.array(one) / 1000 for one in drawn]
    found = anova(samples)
    together = np.concatenate(samples)
    between = sum(len(one) * (one.mean() - together.mean()) ** 2 for one in samples)
    within = sum(((one - one.mean()) ** 2).sum() for one in samples)
    freedom = (len(samples) - 1, len(together) - len(samples))
    assert (found.between, found.within) == freedom
    if not any(np.ptp(one) for one in samples):
        assert (found.f, found.p) == (None, None)
        return
    assert found.f == pytest.approx((between / freedom[0]) / (within / freedom[1]), rel=1e-9, abs=STATISTICS)
    theirs = stats.f_oneway(*samples)
    if found.f > 1e-3:  # below that scipy's difference of sums is mostly rounding, and can be negative
        assert found.f == pytest.approx(theirs.statistic, rel=1e-7)
        assert found.p == pytest.approx(theirs.pvalue, rel=1e-6, abs=STATISTICS)
    assert found.f >= 0
    assert 0 <= found.p <= 1


def test_anova_by_hand() -> None:
    # Means 0.8 and 0.9 about 0.85: 3 * 0.05^2 * 2 = 0.015 between; 4 * 0.01^2 = 0.0004 within; F = 0.015 / 0.0001.
    first, second = np.array([0.79, 0.80, 0.81]), np.array([0.89, 0.90, 0.91])
    found = anova([first, second])
    assert found.f == pytest.approx(150, rel=1e-9)
    assert found.p == pytest.approx(compare_equal_variances(first, second), rel=1e-9)
    assert str(found) == "ANOVA F(1, 4) = 150, p 0.000"
    assert anova([first, second + 0.001]).f != found.f


def compare_equal_variances(first: np.ndarray, second: np.ndarray) -> float:
    """Return Student's two-tailed p, which for two samples is that of the analysis of variance."""
    pooled = (first.var(ddof=1) * (len(first) - 1) + second.var(ddof=1) * (len(second) - 1)) / (
        len(first) + len(second) - 2
    )
    t = (first.mean() - second.mean()) / math.sqrt(pooled * (1 / len(first) + 1 / len(second)))
    return float(2 * stats.t.sf(abs(t), len(first) + len(second) - 2))


@pytest.mark.parametrize(
    "samples",
    [
        [np.array([0.5])], [np.array([0.5]), np.array([0.6])], [np.array([]), np.array([0.5, 0.6])],
        [np.array([0.1] * 3), np.array([0.1] * 3)], [np.array([0.1] * 3), np.array([0.2] * 3)],
        [np.array([0.0, 1e-200]), np.array([0.0, 0.0])],
    ],
)  # fmt: skip
def test_what_cannot_be_told_is_none(samples: list[np.ndarray]) -> None:
    assert (anova(samples).f, anova(samples).p) == (None, None)
    assert str(anova(samples)) == "ANOVA undefined (single runs, or no variance)"
    if len(samples) == 2:
        assert equivalence(*samples, 0.1).p is None
        assert "undefined" in str(equivalence(*samples, 0.1))
        assert (compare(*samples).p, compare(*samples).d) == (None, None)


def test_one_run_beside_several_can_be_told_by_anova_alone() -> None:
    found = anova([np.array([0.5]), np.array([0.6, 0.7, 0.8])])
    # 0.5 lies 0.2 below 0.7: between = 1 * 0.15^2 + 3 * 0.05^2 = 0.03; within = 0.02 / 2.
    assert (found.between, found.within) == (1, 2)
    assert found.f == pytest.approx(3, rel=1e-9)
    assert equivalence(np.array([0.5]), np.array([0.6, 0.7]), 0.1).p is None


PAIR = st.lists(st.integers(0, 1000), min_size=2, max_size=6)


@given(PAIR, PAIR, st.integers(1, 300))
@settings(deadline=None, max_examples=60)
def test_equivalence_is_two_one_sided_welch_tests(one: list[int], other: list[int], thousandths: int) -> None:
    first, second, margin = np.array(one) / 1000, np.array(other) / 1000, thousandths / 1000
    found = equivalence(first, second, margin)
    difference = first.mean() - second.mean()
    assert found.difference == pytest.approx(difference, abs=STATISTICS)
    errors = [0.0 if not np.ptp(x) else x.var(ddof=1) / len(x) for x in (first, second)]
    if not any(errors):
        assert found.p is None
        return
    freedom = sum(errors) ** 2 / sum(e**2 / (len(x) - 1) for e, x in zip(errors, (first, second), strict=True))
    error = math.sqrt(sum(errors))
    above = stats.t.sf((difference + margin) / error, freedom)  # against: lower by the margin or more
    below = stats.t.cdf((difference - margin) / error, freedom)  # against: higher by the margin or more
    assert found.p == pytest.approx(max(above, below), rel=1e-7, abs=STATISTICS)
    assert found.p == pytest.approx(equivalence(second, first, margin).p, rel=1e-7, abs=STATISTICS)
    wider = equivalence(first, second, 2 * margin).p
    assert wider is not None
    assert wider <= found.p + STATISTICS


def test_constant_runs_beside_varying_ones_are_told_quietly() -> None:
    constant, varying = np.array([0.9, 0.9, 0.9]), np.array([0.88, 0.9, 0.92])
    found = equivalence(constant, varying, 0.05)
    # t = 0.05 / (0.02 / sqrt(3)) with the two degrees of freedom of the sample that varies.
    assert found.p == pytest.approx(stats.t.sf(0.05 / (0.02 / math.sqrt(3)), 2), rel=1e-9)
    assert anova([constant, varying]).f == pytest.approx(0, abs=STATISTICS)


@pytest.mark.parametrize("margin", [0, -0.1, math.inf, math.nan])
def test_a_margin_is_positive(margin: float) -> None:
    with pytest.raises(ValueError, match=f"equivalence: margin must be a positive number; got {margin}"):
        equivalence(np.array([1.0, 2.0]), np.array([1.0, 2.0]), margin)
