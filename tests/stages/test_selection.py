"""Selection: every step by hand, the whole against an independent loop, and what is refused."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import euclidean
from sklearn.cluster import KMeans
from sklearn.metrics import silhouette_samples, silhouette_score
from sklearn.preprocessing import MinMaxScaler
from torch import nn

import pyprune as pp
from pyprune import clustering, selection
from pyprune.clustering import Clustering, KMeansOptions, best_k, cluster, k_range, search
from pyprune.criteria import crank
from pyprune.ops.kmeans import k_search
from pyprune.types import Region
from tolerances import HAND_ROUNDED, SILHOUETTE_GATE, SILHOUETTE_ROUNDING

# Eight filters, two classes; every column spans 0 to 10, so X = R / 10.
HAND = np.array([[0, 0], [10, 10], [10, 9], [9, 10], [0, 10], [0, 9], [10, 0], [8, 8]], np.float64)
# AVG, the row means, spans 0 to 1 already. STD = |a - b| / 2 spans 0 to 0.5, so it is doubled.
HAND_AVG = [0, 1, 0.95, 0.95, 0.5, 0.45, 0.5, 0.8]  # mean 5.15 / 8 = 0.64375
HAND_STD = [0, 0, 0.1, 0.1, 1, 0.9, 1, 0]  # mean 3.1 / 8 = 0.3875
# AVG > 0.64375 and STD < 0.3875: filters 1, 2, 3 and 7.
# Four groups: {0}, {1, 2, 3, 7}, {4, 5}, {6}. Splitting 7 off (K = 5) leaves 1, 2, 3 with a neighbour at 0.22 to 0.28.
HAND_GROUPS = [{0}, {1, 2, 3, 7}, {4, 5}, {6}]
# Summed distances within {1, 2, 3, 7}: 1: .1 + .1 + .2828 = .4828; 2: .1 + .1414 + .2236 = .4650; 3: the same;
# 7: .2828 + .2236 + .2236 = .7301. Filters 2 and 3 tie, so the medoid is 2. Within {4, 5} they tie too: 4.
# Silhouettes: 1: a = .4828 / 3 = .16095, b = 1 (to 6) -> .83905;  2: a = .15501, b = .9 (to 6) -> .82777;
# 3: a = .15501, b = (.9 + .90554) / 2 (to 4, 5) -> .82830;  7: a = .24335, b = (.82462 + .80623) / 2 -> .70156.
# 4: a = .1, b = .93240 (to 1, 2, 3, 7) -> .89275;  5: a = .1, b = .9 (to 0) -> .88889;  0 and 6 are alone -> 0.
HAND_SILHOUETTES = [0, 0.83905, 0.82777, 0.82830, 0.89275, 0.88889, 0, 0.70156]  # mean .62229
# The mean inside is (.83905 + .82777 + .82830 + .70156) / 4 = .79917: 1, 2, 3 are above, 2 stays as the medoid.
HAND_KEPT = [2, 7]


def model_of(*filters, kernel=1):
    channels = [1, *filters]
    pairs = zip(channels, filters, strict=False)
    return nn.Sequential(*(nn.Conv2d(inputs, outputs, kernel) for inputs, outputs in pairs))


def ranks_of(*layers, **more):
    return pp.ClassRanks({str(i): R for i, R in enumerate(layers)}, **more)


def spread(F, C, seed=0):
    rng = np.random.default_rng(seed)
    return 10 + rng.normal(size=(F, 1)) + rng.normal(size=(F, C)) * rng.random((F, 1))


def run(R, **options):
    return pp.select(model_of(len(R)), ranks=ranks_of(R), jobs=1, **options)


def test_each_step_by_hand():
    X = crank.min_max(HAND)
    np.testing.assert_array_equal(X, HAND / 10)
    avg, std = crank.average_and_deviation(X)
    np.testing.assert_allclose(avg, HAND_AVG, atol=HAND_ROUNDED)
    np.testing.assert_allclose(std, HAND_STD, atol=HAND_ROUNDED)
    assert crank.dividing_point(avg, std) == pytest.approx((0.64375, 0.3875))
    where = crank.regions(avg, std)
    assert [f for f, region in enumerate(where) if region is Region.HIGH_AVG_LOW_STD] == [1, 2, 3, 7]
    assert where[0] is Region.LOW_AVG_LOW_STD
    assert where[4] is Region.LOW_AVG_HIGH_STD
    labels = np.array([3, 0, 0, 0, 1, 1, 2, 0], np.int32)
    centres = crank.medoids(X, labels)
    assert centres == {0: 2, 1: 4, 2: 6, 3: 0}
    assert crank.surviving(centres, where) == [0]
    inside = np.array([0.83905, 0.82777, 0.82830, 0.70156])
    assert crank.mean_silhouette(inside) == pytest.approx(0.79917)
    assert crank.redundant(inside).tolist() == [True, True, True, False]


def test_the_whole_by_hand():
    plan = run(HAND)
    why = plan.why["0"]
    assert plan.keep["0"].tolist() == HAND_KEPT
    assert why.k == 4
    assert why.silhouette == pytest.approx(0.62229, abs=HAND_ROUNDED)
    assert (why.avg_mean, why.std_mean) == pytest.approx((0.64375, 0.3875))
    np.testing.assert_allclose([one.silhouette for one in why], HAND_SILHOUETTES, atol=HAND_ROUNDED)
    groups = [{f for f, one in enumerate(why) if one.cluster == label} for label in range(4)]
    assert sorted(groups, key=min) == HAND_GROUPS
    assert [f for f, one in enumerate(why) if one.medoid] == [0, 2, 4, 6]
    assert [one.reason for one in why] == [
        "its cluster's medoid lies outside HIGH_AVG_LOW_STD",
        "redundant: silhouette 0.84 above the mean 0.80",
        "medoid",
        "redundant: silhouette 0.83 above the mean 0.80",
        "its cluster's medoid lies outside HIGH_AVG_LOW_STD",
        "its cluster's medoid lies outside HIGH_AVG_LOW_STD",
        "its cluster's medoid lies outside HIGH_AVG_LOW_STD",
        "kept: silhouette 0.70 not above the mean 0.80",
    ]


def test_members_outside_the_region_go_and_do_not_count():
    # {1, 2, 3, 4} is one cluster by decree; 4 = (10, 6) is too uneven. Inside are 1, 2, 3.
    R = np.array([[0, 0], [10, 10], [10, 9], [9, 10], [10, 6], [0, 10], [10, 0]], np.float64)
    labels = np.array([0, 1, 1, 1, 1, 2, 3], np.int32)
    why = crank.select_filters(crank.min_max(R), Clustering(4, labels, 0.5))
    assert why[4].region is Region.HIGH_AVG_HIGH_STD
    assert why[4].reason == "outside HIGH_AVG_LOW_STD"
    inside = [why[f].silhouette for f in (1, 2, 3)]
    for f, silhouette in zip((1, 2, 3), inside, strict=True):
        assert why[f].keep == (why[f].medoid or silhouette <= np.mean(inside))
    # With member 4 (silhouette far below) in the mean, filter 2 or 3 would go as well.
    assert why[4].silhouette < min(inside)


def independent(R, seed=6, n_init=10):
    """Thesis algorithm 3 as a plain loop that shares nothing with pyprune but scikit-learn."""
    F = len(R)
    X = MinMaxScaler().fit_transform(R)
    best = (-2.0, None)
    for K in range(4, min(F - 1, len({tuple(row) for row in X})) + 1):
        labels = KMeans(n_clusters=K, random_state=seed, n_init=n_init, max_iter=10000).fit(X).labels_
        score = silhouette_score(X, labels)
        if score > best[0]:
            best = (score, labels)
    labels = best[1]
    plane = MinMaxScaler().fit_transform([[row.mean(), row.std(ddof=1)] for row in X])
    centre = plane.mean(axis=0)
    inside = [f for f in range(F) if plane[f][0] > centre[0] and plane[f][1] < centre[1]]
    silhouettes = silhouette_samples(X, labels)
    kept = set()
    for label in set(labels):
        members = [f for f in range(F) if labels[f] == label]
        medoid = min(members, key=lambda f: (round(sum(euclidean(X[f], X[g]) for g in members), 9), f))
        if medoid in inside:
            mine = [f for f in members if f in inside]
            mean = np.mean([silhouettes[f] for f in mine])
            kept |= {f for f in mine if silhouettes[f] <= mean} | {medoid}
    if not kept:
        kept = {min(range(F), key=lambda f: (-plane[f][0], plane[f][1], f))}
    return sorted(kept), labels, best[0]


@pytest.mark.parametrize(("F", "C", "seed"), [(8, 3, 1), (13, 2, 2), (20, 10, 3), (24, 5, 4), (9, 40, 5)])
def test_equals_an_independent_loop(F, C, seed):
    R = spread(F, C, seed)
    kept, labels, score = independent(R)
    plan = run(R, clusterer="sklearn")
    why = plan.why["0"]
    assert plan.keep["0"].tolist() == kept
    assert [one.cluster for one in why] == labels.tolist()
    assert why.silhouette == pytest.approx(score, rel=0, abs=SILHOUETTE_ROUNDING)
    assert why.k == len(set(labels))


def test_every_k_is_scikit_learn_to_the_letter():
    X = crank.min_max(spread(19, 6, 7))
    assert k_range(X) == range(4, 19)
    for K in k_range(X):
        one = cluster(X, K, KMeansOptions())
        labels = KMeans(n_clusters=K, random_state=6, n_init=10, max_iter=10000).fit(X).labels_
        assert np.array_equal(one.labels, labels)
        assert one.silhouette == silhouette_score(X, labels)
    other = cluster(X, 9, KMeansOptions(seed=7, n_init=1))
    assert not np.array_equal(other.labels, cluster(X, 9, KMeansOptions()).labels), "the seed must reach scikit-learn"


def test_the_native_search_is_the_default_and_agrees_on_clear_groups():
    rng = np.random.default_rng(4)
    R = np.repeat(spread(9, 6, 5) * 10, 4, axis=0) + rng.random((36, 6)) / 50
    plan, by_sklearn = run(R), run(R, clusterer="sklearn")
    assert plan.options["clusterer"] == "native"
    assert plan.why["0"].k == by_sklearn.why["0"].k == 9
    assert plan.keep["0"].tolist() == by_sklearn.keep["0"].tolist()
    assert plan.why["0"].silhouette == pytest.approx(by_sklearn.why["0"].silhouette, rel=0, abs=SILHOUETTE_GATE)
    found = k_search(crank.min_max(R))
    assert [one.cluster for one in plan.why["0"]] == found.labels[found.best].tolist()


def test_the_plan_says_how_stable_it_is(tmp_path):
    R = spread(40, 4, 8)
    plan = run(R, stability=3)
    others = [set(run(R, seed=seed, stability=0).keep["0"].tolist()) for seed in (7, 8, 9)]
    mine = set(plan.keep["0"].tolist())
    want = np.mean([len(mine & other) / len(mine | other) for other in others])
    assert 0 < want < 1, "seeds must disagree, or this proves nothing"
    assert plan.stability == {"0": pytest.approx(want, rel=1e-12)}
    assert run(R, stability=0).stability == {}
    assert run(R).stability["0"] == run(R, stability=3).stability["0"]
    plan.save(tmp_path / "plan.json")
    assert pp.Plan.load(tmp_path / "plan.json").stability == plan.stability
    assert run(R[:12], clusterer="sklearn").stability == {}
    assert run(np.ones((9, 3))).stability == {}


def test_wide_layers_are_compared_only_when_asked(monkeypatch):
    monkeypatch.setattr(crank, "STABILITY_FILTERS", 20)
    assert run(spread(21, 3)).stability == {}
    assert set(run(spread(21, 3), stability=2).stability) == {"0"}
    assert set(run(spread(20, 3)).stability) == {"0"}


def test_processes_do_not_change_the_plan(monkeypatch):
    monkeypatch.setattr(clustering, "CHUNK", 0.02)
    layers = {str(i): crank.min_max(spread(F, 4, i)) for i, F in enumerate((9, 14, 12))}
    ks = {name: k_range(X) for name, X in layers.items()}
    pids = []
    counted = clustering._run

    def count(tasks, options, jobs):
        pids.append(len(tasks))
        yield from counted(tasks, options, jobs)

    monkeypatch.setattr(clustering, "_run", count)
    one, two = (search(layers, ks, KMeansOptions(), jobs) for jobs in (1, 2))
    assert pids[1] > 3, "several tasks per layer, or nothing ran in parallel"
    for name in layers:
        assert (one[name].k, one[name].silhouette) == (two[name].k, two[name].silhouette)
        assert np.array_equal(one[name].labels, two[name].labels)


def test_tasks_cover_every_k_once():
    layers = {"a": np.zeros((40, 3)), "b": np.zeros((9, 3))}
    ks = {"a": range(4, 40), "b": range(4, 9)}
    tasks = clustering._tasks(layers, ks, KMeansOptions())
    for name, every in ks.items():
        assert sorted(k for task in tasks if task.layer == name for k in task.ks) == list(every)
    assert len(tasks) > 3
    assert [task.seconds for task in tasks] == sorted((task.seconds for task in tasks), reverse=True)


def test_the_smallest_k_wins_a_tie():
    labels = np.zeros(4, np.int32)
    three = [Clustering(5, labels, 0.5), Clustering(4, labels, 0.5 - 1e-15), Clustering(6, labels, 0.5)]
    assert best_k(three).k == 4
    assert best_k([*three, Clustering(7, labels, 0.5 + 1e-9)]).k == 7


def test_the_search_prefers_the_smallest_k_whatever_ends_first(monkeypatch):
    monkeypatch.setattr(clustering, "CHUNK", 1e-3)
    monkeypatch.setattr(clustering, "cluster", lambda X, k, options: Clustering(k, np.zeros(len(X), np.int32), 0.25))
    found = search({"a": np.zeros((30, 2))}, {"a": range(4, 30)}, KMeansOptions(), jobs=1)
    assert found["a"].k == 4  # the tasks with the largest K come first


def test_constant_columns_become_zero():
    R = np.array([[3.0, 1.0], [3.0, 2.0], [3.0 + 4e-16, 5.0]])
    np.testing.assert_allclose(crank.min_max(R), [[0, 0], [0, 0.25], [0, 1]])


def test_points_on_the_dividing_lines_lie_outside():
    # AVG mean 0.5 and STD mean 0.5: only the last filter is strictly better on both.
    avg, std = np.array([0, 0.5, 1, 0.5, 1, 0]), np.array([1, 0, 0.5, 1, 0, 0.5])
    assert [region is Region.HIGH_AVG_LOW_STD for region in crank.regions(avg, std)] == [False] * 4 + [True, False]


def test_medoid_ties_go_to_the_lowest_index():
    X = np.array([[0.1, 0.3], [0.7, 0.2], [0.7, 0.2], [0.7, 0.2], [0.9, 0.9]])
    assert crank.medoids(X, np.array([0, 0, 0, 0, 1], np.int32)) == {0: 1, 1: 4}


def test_equal_silhouettes_are_not_redundant():
    # 0.1 summed eleven times and divided is not 0.1 in floating point, nor is that of every other number.
    for value in (0.1, 0.7, 1 / 3):
        for count in (3, 7, 11, 49):
            assert not crank.redundant(np.full(count, value)).any()


def test_min_keep_refills_by_avg_then_std_then_index():
    avg, std = np.array([0.2, 0.9, 0.9, 0.9, 1.0]), np.array([0.0, 0.4, 0.3, 0.3, 0.9])
    keep = np.zeros(5, np.bool_)
    assert crank.refill(keep, avg, std, 4).tolist() == [4, 2, 3, 1]
    keep[2] = True
    assert crank.refill(keep, avg, std, 2).tolist() == [4]
    assert crank.refill(keep, avg, std, 1).tolist() == []
    plan = run(HAND, min_keep=4)
    assert plan.keep["0"].tolist() == [1, 2, 3, 7]
    assert plan.why["0"][1].reason == "kept to leave min_keep"
    assert run(HAND, min_keep=99).keep["0"].tolist() == list(range(8))


def test_a_layer_never_ends_empty():
    # AVG and STD rise together: the high ones are uneven, so no medoid lies in the region.
    level = np.arange(8.0)[:, None]
    plan = run(np.hstack([level * 0, level * 2, level * 3 + np.sin(level)]))
    why = plan.why["0"]
    assert not any(one.region is Region.HIGH_AVG_LOW_STD for one in why)
    assert plan.keep["0"].tolist() == [int(np.argmax([one.avg for one in why]))]
    assert why[plan.keep["0"][0]].reason == "kept to leave min_keep"


def test_duplicated_rows_bound_k_without_warnings():
    R = np.repeat(spread(6, 3, 8), 3, axis=0)
    assert k_range(crank.min_max(R)) == range(4, 7)
    plan = run(R)
    assert plan.why["0"].k == 6  # duplicates fall together exactly
    assert plan.why["0"].silhouette == pytest.approx(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        few = cluster(np.repeat([[0.0, 0], [1, 1], [0, 1]], 3, axis=0), 4, KMeansOptions())
    assert len(np.unique(few.labels)) == 3


@pytest.mark.parametrize(
    ("R", "note"),
    [
        (spread(4, 3), "too few to cluster: 4 filters, 4 of them distinct, and at least 5 are needed"),
        (np.repeat(spread(4, 3), 5, axis=0), "too few to cluster: 20 filters, 4 of them distinct"),
        (np.ones((9, 3)), "too few to cluster: 9 filters, 1 of them distinct"),
        (np.outer(np.arange(9), [1, 2, 3]), "no dividing point: AVG or STD is the same for every filter"),
    ],
)
def test_layers_that_cannot_be_judged_are_left_alone(R, note):
    plan = run(R)
    assert plan.keep["0"].tolist() == list(range(len(R)))
    assert plan.why["0"].note.startswith(note)
    assert all(one.keep and one.region is None for one in plan.why["0"])


def test_five_filters_are_enough():
    plan = run(spread(5, 3, 1))
    assert plan.why["0"].note == ""
    assert plan.why["0"].k == 4


def test_excluded_and_uninformative_layers_keep_all():
    R = np.full((8, 3), 6.0)
    R[0, 0] = 5.5
    model = model_of(8, 8, 8)
    ranks = ranks_of(HAND, HAND, R[:, :2] + HAND / 1000 * 0, shapes={"2": (6, 6)})
    plan = pp.select(model, ranks=ranks, exclude=["1"], jobs=1)
    assert [len(kept) for kept in plan.keep.values()] == [2, 8, 8]
    assert [why.note for why in plan.why.values()] == ["", "excluded", "uninformative: 93.8% of its ranks are full"]
    assert plan.filters == {"0": 8, "1": 8, "2": 8}
    assert plan.rates == {"0": 0.75, "1": 0, "2": 0}


def test_k_can_be_bounded():
    R = spread(14, 4, 2)
    assert run(R, k_min=6, k_max=6).why["0"].k == 6
    assert run(R, k_min=20).why["0"].note == "no number of clusters to try from 20 to 13"


def test_the_plan_says_how_it_was_made(tmp_path):
    ranks = ranks_of(HAND, info={"sample": "abc", "seed": 3})
    plan = pp.select(model_of(8), ranks=ranks, jobs=1, seed=11)
    assert plan.method == "crank"
    expected = {"clusterer": "native", "k_min": 4, "k_max": None, "seed": 11, "n_init": 10, "max_iter": 10000}
    assert expected.items() <= plan.options.items()
    assert plan.options["ranks"] == {"sample": "abc", "seed": 3}
    assert set(plan.options["libraries"]) == {"joblib", "numpy", "pyprune", "scikit-learn", "scipy"}
    plan.save(tmp_path / "plan.json")
    loaded = pp.Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    assert loaded.why["0"] == plan.why["0"]
    for rates in (0.5, {"0": 0.25}, plan):
        other = pp.select(model_of(8), "hrank", ranks=ranks, rates=rates)
        other.save(tmp_path / "other.json")
        assert pp.Plan.load(tmp_path / "other.json") == other


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10**6), st.integers(5, 12), st.integers(2, 5), st.integers(1, 4), st.booleans())
def test_what_always_holds(seed, F, C, min_keep, coarse):
    R = spread(F, C, seed)
    R = np.round(R) if coarse else R  # coarse ranks tie and repeat
    plan = run(R, min_keep=min_keep, n_init=1)
    kept, why = plan.keep["0"], plan.why["0"]
    assert kept.dtype == np.int64
    assert len(kept) >= min(min_keep, F)
    assert (np.diff(kept) > 0).all()
    assert 0 <= kept[0] <= kept[-1] < F
    assert run(R, min_keep=min_keep, n_init=1) == plan
    for one in why if not why.note else ():
        if one.medoid and one.region is Region.HIGH_AVG_LOW_STD:
            assert one.keep
        if one.keep and one.reason != "kept to leave min_keep":
            assert one.region is Region.HIGH_AVG_LOW_STD


@settings(max_examples=8, deadline=None)
@given(st.permutations(range(4)))
def test_the_order_of_the_classes_does_not_matter(order):
    # Eight well separated groups of three: k-means finds them whatever the rounding.
    R = np.repeat(spread(8, 4, 5) * 10, 3, axis=0) + np.random.default_rng(0).random((24, 4)) / 100
    assert run(R[:, order]).keep["0"].tolist() == run(R).keep["0"].tolist()


def test_hrank_keeps_the_highest_mean_rank():
    R = np.array([[1.0, 3], [2, 2], [5, 0], [0, 5], [2, 2]])
    model, ranks = model_of(5), ranks_of(R)
    # means 2, 2, 2.5, 2.5, 2: ties go to the lower index
    for rate, kept in ((0.0, [0, 1, 2, 3, 4]), (0.4, [0, 2, 3]), (0.5, [0, 2, 3]), (0.6, [2, 3]), (0.99, [2])):
        assert pp.select(model, "hrank", ranks=ranks, rates=rate).keep["0"].tolist() == kept
    plan = pp.select(model, "hrank", ranks=ranks, rates=0.6)
    assert plan.why["0"][2].reason == "mean rank 2.5, among the 2 highest"
    assert plan.why["0"][0].reason == "mean rank 2, below the 2 highest"
    # 9 images of class 0 and 1 of class 1: means 1.2, 2, 4.5, 0.5, 2
    weighted = pp.select(model, "hrank", ranks=ranks_of(R, counts=[9, 1]), rates=0.4)
    assert weighted.keep["0"].tolist() == [1, 2, 4]


def test_hrank_ties_survive_rounding():
    counts = [20, 7, 38, 18, 52]
    one = [48, 34, 108, 1230, 427]
    sums = np.array([one, [427, 48, 34, 1230, 108], [427, 34, 1230, 108, 48], [1230, 108, 427, 48, 34]])
    R = sums / counts
    assert np.average(R, axis=1, weights=counts).argmax() == 2, "rounding breaks the tie, or this proves nothing"
    ranks = ranks_of(R, counts=counts)
    assert pp.select(model_of(4), "hrank", ranks=ranks, rates=0.5).keep["0"].tolist() == [0, 1]


def test_hrank_at_the_rates_of_a_plan():
    model, ranks = model_of(8, 8, 8), ranks_of(HAND, HAND[::-1], HAND * 2)
    own = pp.select(model, ranks=ranks, exclude=["2"], jobs=1)
    hrank = pp.select(model, "hrank", ranks=ranks, rates=own)
    assert [len(kept) for kept in hrank.keep.values()] == [2, 2, 8]
    assert hrank.keep["0"].tolist() == [1, 2]
    assert pp.select(model, "hrank", ranks=ranks, rates=own.rates).keep["1"].tolist() == hrank.keep["1"].tolist()
    partial = pp.Plan({"1": [0]})
    assert [len(k) for k in pp.select(model, "hrank", ranks=ranks, rates=partial).keep.values()] == [8, 1, 8]
    excluded = pp.select(model, "hrank", ranks=ranks, rates={"0": 0.5, "1": 0.5}, exclude=["2"], min_keep=5)
    assert [len(kept) for kept in excluded.keep.values()] == [5, 5, 8]
    assert excluded.why["2"].note == "excluded"


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 600), st.data())
def test_rates_of_a_plan_give_its_counts_back(F, data):
    kept = data.draw(st.integers(1, F))
    assert selection.kept_count(F, 1 - kept / F) == kept


REFUSED = [
    ({"method": "cranc"}, ValueError, r"one of 'crank', 'hrank', 'l1', .*; got 'cranc'. Did you mean 'crank'\?"),
    ({"ranks": None}, ValueError, "'crank' needs ranks; pass ranks=pyprune.rank_filters"),
    ({"ranks": {"0": HAND}}, TypeError, "ranks must be ClassRanks; got dict"),
    ({"ranks": ranks_of(HAND[:7])}, ValueError, "from another model: '0' has 7 filters there and has 8 filters here"),
    ({"ranks": ranks_of(HAND, HAND)}, ValueError, "another model: '1' has 8 filters there and is no convolution here"),
    ({"ranks": ranks_of(HAND[:, :1])}, ValueError, "at least two classes; got 1. Use method='hrank'"),
    ({"exclude": ["2"]}, ValueError, "no convolution named '2'"),
    ({"exclude": "0"}, TypeError, r"Pass \['0'\]"),
    ({"min_keep": 0}, ValueError, "min_keep must be a whole number of at least 1; got 0"),
    ({"jobs": 1.5}, ValueError, "jobs must be a whole number of at least 1; got 1.5"),
    ({"k_min": 1}, ValueError, "k_min must be at least 2"),
    ({"stability": 1.5}, ValueError, "stability must be a whole number of at least 1; got 1.5"),
    ({"stability": 2, "clusterer": "sklearn"}, ValueError, "stability needs clusterer='native'"),
    ({"clusterer": "other"}, ValueError, "clusterer must be one of .*'sklearn'; got 'other'"),
    ({"ease": 1.1}, ValueError, "ease must be a number from 0 to 1; got 1.1"),
    ({"ease": 0.1, "rates": 0.5}, ValueError, "ease is for CRank's own rates; with rates or budget it says nothing"),
    ({"preset": "thesis"}, ValueError, "preset must be one of 'thesis_text', 'thesis_code'; got 'thesis'"),
    ({"space": "3d"}, ValueError, "space must be one of 'classes', '2d'; got '3d'"),
    ({"esae": 0.5}, ValueError, r"'crank' has no option 'esae'; it has preset, .* Did you mean 'ease'\?"),
    ({"rates": 0.5, "budget": {"macs": 0.5}}, ValueError, "rates and budget were both given"),
    ({"coupled": "both"}, ValueError, "coupled must be one of 'apart', 'joint'; got 'both'"),
    ({"coupled": "joint"}, ValueError, "coupled='joint' needs example_inputs; pass example_inputs="),
    ({"budget": {"macs": 0.5}}, ValueError, "budget needs example_inputs; pass example_inputs=, one batch"),
    ({"method": "hrank"}, ValueError, "'hrank' has no rate of its own. Pass rates=, a plan, one rate per"),
    ({"method": "hrank", "rates": 1}, ValueError, r"rates must be in \[0, 1\); got 1 for '0'"),
    ({"method": "hrank", "rates": {"0": -0.1}}, ValueError, r"in \[0, 1\); got -0.1"),
    ({"method": "hrank", "rates": {"0": float("nan")}}, ValueError, r"in \[0, 1\); got nan"),
    ({"method": "hrank", "rates": {"0": "0.5"}}, TypeError, r"numbers in \[0, 1\), or a plan; got str"),
    ({"method": "hrank", "rates": {"0": 0.5, "00": 0.5}}, ValueError, "names '00', of which there are no scores. Did"),
    ({"method": "hrank", "rates": {}}, ValueError, "rates lacks '0'. Give each a rate, or exclude it"),
    ({"method": "hrank", "rates": pp.Plan({"0": [8]})}, ValueError, "'0' has filters 0 to 7; the plan keeps 8"),
    ({"method": "hrank", "rates": pp.Plan({"1": [0]})}, ValueError, "no convolution named '1'"),
]


@pytest.mark.parametrize(("arguments", "kind", "message"), REFUSED)
def test_what_is_refused(arguments, kind, message):
    with pytest.raises(kind, match=message):
        pp.select(model_of(8), **{"ranks": ranks_of(HAND), **arguments})
