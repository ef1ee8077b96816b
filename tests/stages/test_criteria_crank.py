"""CRank's options, each on a layer whose answer is worked out by hand; the order of coming back; budgets."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_selection import HAND, HAND_AVG, HAND_STD, model_of, ranks_of, run, spread
from torch import nn

import pyprune as pp
from pyprune.clustering import Clustering
from pyprune.criteria import crank
from pyprune.types import Region
from tolerances import HAND_ROUNDED

HAND_LABELS = np.array([3, 0, 0, 0, 1, 1, 2, 0], np.int32)  # as in test_selection, the clusters numbered by hand


def hand(**options):
    """Judge the layer of test_selection with its clusters numbered by hand."""
    return crank.select_filters(crank.min_max(HAND), Clustering(4, HAND_LABELS, 0.62229), **options)


def kept(why):
    return [f for f, one in enumerate(why) if one.keep]


# The same layer with one member outside the region: filter 4 = (10, 6). X = R / 10.
# AVG 0, 1, .95, .95, .8, .5, .5, mean .67143; STD, doubled, 0, 0, .1, .1, .4, 1, 1, mean .37143: inside are 1, 2, 3.
OUTSIDE = np.array([[0, 0], [10, 10], [10, 9], [9, 10], [10, 6], [0, 10], [10, 0]], np.float64)
OUTSIDE_LABELS = np.array([0, 1, 1, 1, 1, 2, 3], np.int32)
# Distances in {1, 2, 3, 4}: 12 .1, 13 .1, 14 .4, 23 .14142, 24 .3, 34 .41231. Sums: 1 .6; 2 .54142; 3 .65373;
# 4 1.11231: the medoid is 2. Nearest other: 1 at 1 (to 5), 2 at .9 (to 6), 3 at .9 (to 5), 4 at .6 (to 6). Silhouettes:
# 1: 1 - .2 / 1 = .8; 2: 1 - .18047 / .9 = .79947; 3: 1 - .21791 / .9 = .75788; 4: 1 - .37077 / .6 = .38205.
OUTSIDE_SILHOUETTES = [0, 0.8, 0.79947, 0.75788, 0.38205, 0, 0]


def outside(**options):
    return crank.select_filters(crank.min_max(OUTSIDE), Clustering(4, OUTSIDE_LABELS, 0.5), **options)


def test_members_of_the_region_or_of_the_cluster():
    why = outside()
    np.testing.assert_allclose([one.silhouette for one in why], OUTSIDE_SILHOUETTES, atol=HAND_ROUNDED)
    # Mean inside: (.8 + .79947 + .75788) / 3 = .78578. 1 and 2 are above; 2 stays as the medoid, and 3 stays.
    assert kept(why) == [2, 3]
    assert why[4].reason == "outside HIGH_AVG_LOW_STD"
    # Mean of the cluster: (.8 + .79947 + .75788 + .38205) / 4 = .68485. 1, 2 and 3 are above; 4 stays, though outside.
    why = outside(members="cluster")
    assert kept(why) == [2, 4]
    assert why[4].region is Region.HIGH_AVG_HIGH_STD
    assert why[4].reason == "kept: silhouette 0.38 not above the mean 0.68"


def test_the_bug_of_the_listing_keeps_cluster_numbers():
    assert kept(hand()) == [2, 7]
    # 1, 2, 3 are above the mean and go, the medoid 2 with them; 7 stays. The one surviving cluster has number 0, so the
    # listing keeps filter 0, which lies in the worst corner.
    why = hand(medoid="cluster_numbers")
    assert kept(why) == [0, 7]
    assert why[2].reason == "redundant: silhouette 0.83 above the mean 0.80"
    assert why[0].reason == "kept as the number of a surviving cluster: the listing's bug"
    assert pp.select(model_of(8), ranks=ranks_of(HAND), medoid="cluster_numbers", jobs=1).keep["0"].tolist() != [2, 7]


def test_min_max_by_class_or_by_layer():
    # Ranks of the second class are a tenth of the first's. By class that makes no difference.
    R = HAND * [1, 0.1]
    np.testing.assert_allclose([one.avg for one in run(R).why["0"]], HAND_AVG, atol=HAND_ROUNDED)
    # By layer X = R / 10 = (a, b / 10) for a, b in HAND / 10, so AVG, scaled, is (10 a + b) / 11:
    avg = [0, 1, 10.9 / 11, 10 / 11, 1 / 11, 0.9 / 11, 10 / 11, 8.8 / 11]
    # and STD = |a - b / 10| / 2 in units of 1 / 2: 0, .9, .91, .8, .1, .09, 1, .72.
    std = [0, 0.9, 0.91, 0.8, 0.1, 0.09, 1, 0.72]
    why = run(R, scale="layer").why["0"]
    np.testing.assert_allclose([one.avg for one in why], avg, atol=HAND_ROUNDED)
    np.testing.assert_allclose([one.std for one in why], std, atol=HAND_ROUNDED)


def test_clustering_in_the_plane():
    # Points: 0 (0, 0); 1 (1, 0); 2 and 3 (.95, .1); 7 (.8, 0); 4 and 6 (.5, 1); 5 (.45, .9). Four groups: {0},
    # {1, 2, 3}, {7}, {4, 5, 6}. In the second, 12 = 13 = sqrt(.05^2 + .1^2) = .11180 and 23 = 0: 2 is the medoid, the
    # lower of the two. To 7: 1 at .2, 2 and 3 at sqrt(.15^2 + .1^2) = .18028.
    # Silhouettes: 1: 1 - .11180 / .2 = .44098; 2 and 3: 1 - .05590 / .18028 = .68992; their mean .60694. 3 goes,
    # 2 stays as the medoid, 1 stays. 7 is alone in its cluster and inside the region: it stays. With five clusters it
    # makes no difference to the inertia whether 1 or 5 parts from its group, and so none are tried.
    plan = run(HAND, space="2d", k_max=4)
    why = plan.why["0"]
    assert plan.keep["0"].tolist() == [1, 2, 7]
    assert why.k == 4
    silhouettes = [one.silhouette for one in why]
    np.testing.assert_allclose(np.array(silhouettes)[[0, 1, 2, 3, 7]], [0, 0.44098, 0.68992, 0.68992, 0], atol=1e-5)
    assert [one.avg for one in why] == pytest.approx(HAND_AVG)
    assert [one.std for one in why] == pytest.approx(HAND_STD)
    # Rows that differ in C dimensions may coincide in the plane: (a, b) and (b, a) do.
    assert (
        run(np.array([[0, 0], [1, 5], [5, 1], [2, 5], [5, 2], [5, 5]]), space="2d")
        .why["0"]
        .note.startswith("too few to cluster: 6 filters, 4 of them distinct")
    )


def test_min_keep_fills_up_by_average():
    # 2 and 7 stay; then 1 (AVG 1) and 3 (AVG .95).
    assert run(HAND, min_keep=4).keep["0"].tolist() == [1, 2, 3, 7]


def test_excluded_layers_are_not_clustered():
    plan = pp.select(model_of(8, 8), ranks=ranks_of(HAND, HAND), exclude=["0"], jobs=1)
    assert [len(one) for one in plan.keep.values()] == [8, 2]
    assert plan.why["0"].k is None


def test_k_is_bounded():
    # From 5 on the best is K = 5, which splits 7 off: {1, 2, 3} survives with 7's cluster beside it.
    plan = run(HAND, k_min=5, k_max=5)
    assert plan.why["0"].k == 5
    assert 7 in plan.keep["0"]
    assert next(one for f, one in enumerate(plan.why["0"]) if f == 7).medoid


PRESETS = {
    None: {"scale": "class", "space": "classes", "members": "region", "medoid": "kept"},
    "thesis_text": {"scale": "layer", "space": "classes", "members": "cluster", "medoid": "kept"},
    "thesis_code": {"scale": "class", "space": "classes", "members": "region", "medoid": "cluster_numbers"},
}


@pytest.mark.parametrize(("preset", "expected"), PRESETS.items())
def test_presets_bundle_options(preset, expected):
    plan = run(HAND, preset=preset)
    assert expected.items() <= plan.options.items()
    assert plan.options["preset"] == preset
    if preset:
        assert plan.options["clusterer"] == "sklearn"
    by_hand = run(HAND, clusterer=plan.options["clusterer"], **expected)
    assert plan.keep["0"].tolist() == by_hand.keep["0"].tolist()
    assert run(HAND, preset=preset, space="2d").options["space"] == "2d", "what is given wins"


def test_a_preset_says_how_the_ranks_differ_from_the_source():
    info = {"images_per_class": 50, "taps": "activation"}

    def differs(preset):
        plan = pp.select(model_of(8), ranks=ranks_of(HAND, info=info), preset=preset, jobs=1)
        return plan.options.get("ranked_otherwise")

    assert differs("thesis_text") is None
    assert differs("thesis_code") == [
        "images_per_class is 50, and thesis_code has 640", "taps is 'activation', and thesis_code has 'hrank'",
    ]  # fmt: skip


def test_the_order_of_coming_back_by_hand():
    # Kept: the medoid 2, then 7. Redundant: 3 (silhouette .82830) comes back before 1 (.83905). Then the clusters by
    # their medoids' distance from AVG 1, STD 0: {0} at 1, {4, 5} and {6} both at sqrt(.5^2 + 1) = 1.118, the one with
    # the lower medoid first, and in it the medoid 4 before 5.
    why = hand()
    order = np.argsort([-one.score for one in why]).tolist()
    assert order == [2, 7, 3, 1, 0, 4, 5, 6]
    # Two stay: 2 - 1/4 and 2 - 3/4. Six went: 1 - (j + 1/2) / 6.
    scores = [1.75, 1.25, *(1 - (j + 0.5) / 6 for j in range(6))]
    assert sorted((one.score for one in why), reverse=True) == pytest.approx(scores)
    # Half of six come back at 0.5: 3, 1 and 0.
    assert kept(crank.ease(why, 0.5)) == [0, 1, 2, 3, 7]
    assert crank.ease(why, 0.5)[3].reason == "back at ease 0.5; redundant: silhouette 0.83 above the mean 0.80"
    assert kept(crank.ease(why, 0)) == [2, 7]
    assert kept(crank.ease(why, 1)) == list(range(8))
    # 0.08 of 6 is 0.48, rounded to none; 0.09 of 6 is 0.54, rounded to one.
    assert kept(crank.ease(why, 0.08)) == [2, 7]
    assert kept(crank.ease(why, 0.09)) == [2, 3, 7]


def test_members_outside_the_region_come_back_after_the_redundant_ones():
    # Kept 2 (medoid), 3; redundant 1; then 4, outside; then clusters {0} at 1, {5} and {6} at 1.118.
    assert np.argsort([-one.score for one in outside()]).tolist() == [2, 3, 1, 4, 0, 5, 6]


def test_a_refilled_filter_is_the_first_to_go():
    why = hand(min_keep=4)
    assert kept(why) == [1, 2, 3, 7]
    assert np.argsort([-one.score for one in why]).tolist()[:4] == [2, 7, 3, 1]


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.integers(5, 14), st.integers(2, 4), st.integers(1, 3))
def test_kept_sets_are_nested(seed, F, C, min_keep):
    R = spread(F, C, seed)
    options = {"n_init": 1, "min_keep": min_keep}
    eased = [set(run(R, ease=e, **options).keep["0"].tolist()) for e in (0, 0.1, 0.37, 0.5, 0.8, 1)]
    assert eased[0] == set(run(R, **options).keep["0"].tolist())
    assert eased[-1] == set(range(F))
    for less, more in pairwise(eased):
        assert less <= more
    for rate in (0.3, 0.6, 0.9):
        at_rate = set(run(R, rates=rate, **options).keep["0"].tolist())
        assert all(at_rate <= one or one <= at_rate for one in eased), "rates follow the same order"


def ranked_chain(seed=0, filters=(9, 12, 8)):
    torch.manual_seed(seed)
    sizes = zip((1, *filters), filters, strict=False)
    model = nn.Sequential(*(nn.Conv2d(a, b, 3, padding=1) for a, b in sizes))
    return model, pp.ClassRanks({str(i): spread(F, 3, seed + i) for i, F in enumerate(filters)})


def test_a_budget_follows_the_same_order():
    model, ranks = ranked_chain()
    given_to = {"ranks": ranks, "n_init": 1, "jobs": 1}
    example = torch.randn(1, 1, 6, 6)
    own = pp.select(model, **given_to)
    previous = {name: set(range(count)) for name, count in own.filters.items()}
    for share in (1.0, 0.7, 0.4, 0.15, 0.05):
        plan = pp.select(model, budget={"macs": share}, example_inputs=example, exclude=["2"], **given_to)
        sets = {name: set(one.tolist()) for name, one in plan.keep.items()}
        assert all(sets[name] <= previous[name] for name in sets)
        assert all(sets[n] <= set(own.keep[n].tolist()) or set(own.keep[n].tolist()) <= sets[n] for n in ("0", "1"))
        found = plan.options["budget"]["macs"]
        assert found["reached"] <= found["allowed"] == pytest.approx(share * found["of"])
        previous = sets
    assert len(previous["2"]) == 8


def test_layers_that_are_left_alone_are_pruned_only_on_request():
    model, ranks = ranked_chain()
    ranks = pp.ClassRanks({**ranks.layers, "1": np.full((12, 3), 6.0)}, shapes={"1": (6, 6)})
    more = {"ranks": ranks, "n_init": 1, "jobs": 1, "example_inputs": torch.randn(1, 1, 6, 6)}
    plan = pp.select(model, budget={"macs": 0.6}, **more)
    assert len(plan.keep["1"]) == 12
    assert plan.why["1"].note == "uninformative: 100.0% of its ranks are full"
    assert len(pp.select(model, rates=0.5, **more).keep["1"]) == 6
    assert len(pp.select(model, ease=0.5, **more).keep["1"]) == 12


def test_the_plan_with_its_scores_survives_a_file(tmp_path):
    plan = run(HAND, ease=0.3, preset="thesis_text")
    plan.save(tmp_path / "plan.json")
    loaded = pp.Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    assert loaded.why["0"][2].score == plan.why["0"][2].score
