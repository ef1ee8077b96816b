"""The dataclasses that stages exchange: what they refuse, and that files give them back."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyprune.types import ClassRanks, Epoch, Evaluation, FilterWhy, History, LayerWhy, Plan, Region


def some_ranks() -> ClassRanks:
    R = np.random.default_rng(0).uniform(0, 4, (6, 3))
    R[:, 0] = 4
    return ClassRanks(
        {"features.0": R, "head": np.full((2, 3), 8.0)},
        counts=np.array([5, 5, 6]),
        shapes={"features.0": (4, 7), "head": (8, 8)},
        taps={"head": "relu"},
        info={"seed": 1},
    )


def test_class_ranks_round_trip_bit_for_bit(tmp_path: Path) -> None:
    ranks = some_ranks()
    ranks.save(tmp_path / "r")
    back = ClassRanks.load(tmp_path / "r")
    assert list(back.layers) == list(ranks.layers)
    assert all(np.array_equal(back.layers[name], ranks.layers[name]) for name in ranks.layers)
    assert back.counts is not None
    assert back.counts.tolist() == [5, 5, 6]
    assert (back.shapes, back.taps, back.info) == (ranks.shapes, ranks.taps, ranks.info)


def test_class_ranks_lie_in_memory_as_a_file_gives_them_back() -> None:
    assert ClassRanks({"a": np.ones((3, 2)).T}).layers["a"].flags.c_contiguous


def test_uninformative_means_more_than_nine_tenths_at_full_rank() -> None:
    ranks = some_ranks()
    assert ranks.full_rank_share("features.0") == 1 / 3
    assert ranks.uninformative == ("head",)
    R = np.full((10, 1), 4.0)
    R[0] = 3.9
    assert ClassRanks({"a": R}, shapes={"a": (4, 4)}).uninformative == ()  # exactly 90 % is still informative
    assert ClassRanks({"a": R}).uninformative == ()  # unknown size: nothing can be said


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({}, "at least one layer"),
        ({"a": np.zeros(3)}, r"needs R of \[F, C\]; got \[3\]"),
        ({"a": np.zeros((0, 3))}, r"got \[0, 3\]"),
        ({"a": np.full((2, 2), np.nan)}, "negative, NaN or infinite"),
        ({"a": np.full((2, 2), -1.0)}, "negative, NaN or infinite"),
        ({"a": np.zeros((2, 2)), "b": np.zeros((2, 3))}, r"one number of classes; got \[2, 3\]"),
    ],
)
def test_class_ranks_refuse_nonsense(layers: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClassRanks(layers)


def test_class_ranks_cannot_be_changed_through_the_caller() -> None:
    R = np.ones((2, 2))
    ranks = ClassRanks({"a": R})
    R[0] = 7
    assert ranks.layers["a"][0, 0] == 1
    with pytest.raises(ValueError, match="read-only"):
        ranks.layers["a"][0] = 7


@pytest.mark.parametrize(
    ("keep", "error", "message"),
    [
        ([], ValueError, "keeps no filter"),
        ([1, 1], ValueError, "names a filter twice"),
        ([-1, 2], ValueError, "from 0 to 3; got -1 to 2"),
        ([0, 4], ValueError, "from 0 to 3; got 0 to 4"),
        ([0.5], TypeError, "flat list of filter indices; got float64"),
        ([[0, 1]], TypeError, r"of shape \[1, 2\]"),
        (np.array([True, False, True, True]), TypeError, r"Pass np.flatnonzero\(mask\)"),
        (["a"], TypeError, "flat list of filter indices"),
    ],
)
def test_a_plan_refuses_bad_indices(keep: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Plan({"conv": keep}, {"conv": 4})  # type: ignore[dict-item]


@settings(deadline=None)
@given(st.sets(st.integers(0, 63), min_size=1))
def test_a_plan_sorts_and_round_trips(tmp_path_factory: pytest.TempPathFactory, keep: set[int]) -> None:
    why = LayerWhy(
        tuple(FilterWhy("r", i in keep, 1, i == min(keep), Region.LOW_AVG_LOW_STD, 0.25, 0.5, 1.0) for i in range(64)),
        k=4, silhouette=0.5, avg_mean=0.4, std_mean=0.6,
    )  # fmt: skip
    plan = Plan({"c": sorted(keep, reverse=True), "hand": [0]}, {"c": 64}, {"c": why}, "crank", {"seed": 6})
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    plan.save(path)
    back = Plan.load(path)
    assert back == plan
    assert back.keep["c"].dtype == np.int64
    assert back.keep["c"].tolist() == sorted(keep)
    assert back.why["c"][min(keep)].medoid
    assert back.rates == {"c": 1 - len(keep) / 64}
    assert Plan({"c": [0]}) != plan


def test_reasons_must_agree_with_what_is_kept() -> None:
    why = LayerWhy((FilterWhy("stays", True), FilterWhy("goes", False)))
    with pytest.raises(ValueError, match="reasons for 'c' disagree"):
        Plan({"c": [1]}, {"c": 2}, {"c": why})


@pytest.mark.parametrize("cut", [0, 1, 40, 200])
@pytest.mark.parametrize("kind", [ClassRanks, Plan, History, Evaluation])
def test_truncated_files_are_refused(tmp_path: Path, kind: type, cut: int) -> None:
    value = {
        ClassRanks: some_ranks(),
        Plan: Plan({"c": list(range(100))}, {"c": 200}),
        History: History((Epoch(1, 0.1, 0.5, None, None, 1.0),) * 5, 1),
        Evaluation: Evaluation(np.eye(9, dtype=np.int64), 0.5, None, None),
    }[kind]
    value.save(tmp_path / "f")
    data = (tmp_path / "f").read_bytes()
    (tmp_path / "f").write_bytes(data[:cut])
    with pytest.raises(ValueError, match=f"{kind.__name__}.load: "):
        kind.load(tmp_path / "f")


@pytest.mark.parametrize("kind", [Plan, History, Evaluation])
def test_foreign_and_future_files_are_refused(tmp_path: Path, kind: type) -> None:
    path = tmp_path / "f"
    path.write_text('{"format": "other"}')
    with pytest.raises(ValueError, match=f"must be a '{kind.FORMAT}' file; its format is 'other'"):
        kind.load(path)
    path.write_text(json.dumps({"format": kind.FORMAT, "version": 99}))
    with pytest.raises(ValueError, match="format version 99; this pyprune reads 1 to 1"):
        kind.load(path)
    path.write_text(json.dumps({"format": kind.FORMAT, "version": 1}))
    with pytest.raises(ValueError, match="lacks or garbles"):
        kind.load(path)


def test_a_model_file_is_no_ranks_file(tmp_path: Path) -> None:
    import torch

    from pyprune import files

    files.write_tensors(tmp_path / "m", {"w": torch.zeros(2)}, {})
    with pytest.raises(ValueError, match=r"must be a 'pyprune.ranks' file; its format is None"):
        ClassRanks.load(tmp_path / "m")


def test_evaluation_counts() -> None:
    confusion = np.array([[3, 1, 0], [0, 4, 0], [0, 0, 0]])
    evaluation = Evaluation(confusion, 0.5, None, None)
    assert evaluation.images == 8
    assert evaluation.top1 == 7 / 8
    assert evaluation.per_class[:2].tolist() == [0.75, 1.0]
    assert np.isnan(evaluation.per_class[2])
