"""Plans joined: kept sets against sets worked out by hand, who removes what and why, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import pyprune as pp
from pyprune import comparing
from pyprune.data import digits, loader
from pyprune.types import FilterWhy, LayerWhy, Plan, Region
from tolerances import STATISTICS

FILTERS = {"a": 7, "b": 4, "c": 1}


def plan(method="one", filters=FILTERS, **keep):
    return Plan(keep, filters={name: filters[name] for name in keep if name in filters}, method=method)


def scored(method, keep, scores, **more):
    why = LayerWhy(tuple(FilterWhy(f"worth {s}", f in keep, score=s) for f, s in enumerate(scores)), **more)
    return Plan({"a": keep}, filters={"a": len(scores)}, why={"a": why}, method=method)


def kept(joined):
    return {name: one.tolist() for name, one in joined.keep.items()}


@st.composite
def plans(draw, least=2, most=4):
    """Plans of one network that all know layer a; some leave others out, some do not say how many filters there are."""
    found = []
    for _ in range(draw(st.integers(least, most))):
        names = ["a", *(name for name in ("b", "c") if draw(st.booleans()))]
        keep = {n: sorted(draw(st.sets(st.integers(0, FILTERS[n] - 1), min_size=1))) for n in names}
        told = FILTERS if not found or draw(st.booleans()) else {}
        found.append(Plan(keep, filters={n: told[n] for n in names if n in told}, method=draw(st.sampled_from("xyz"))))
    return found


def sets(given_plans, how):
    """Return what stays by definition, in sets; a plan that leaves a layer out keeps all of it."""
    found = {}
    for name in FILTERS:
        stays = [set(one.keep[name].tolist()) if name in one.keep else set(range(FILTERS[name])) for one in given_plans]
        found[name] = set.intersection(*stays) if how == "union" else set.union(*stays)
    return found


@settings(deadline=None)
@given(plans(), st.sampled_from(["union", "intersection"]), st.integers(1, 8), st.randoms())
def test_kept_sets_are_those_of_the_definition_in_any_order(given_plans, how, min_keep, random):
    joined = pp.combine(given_plans, how, min_keep=min_keep)
    want = sets(given_plans, how)
    for name in FILTERS:
        have = set(joined.keep[name].tolist()) if name in joined.keep else set(range(FILTERS[name]))
        assert want[name] <= have
        if name in joined.filters:
            assert len(have) == max(len(want[name]), min(min_keep, FILTERS[name]))
            assert have - want[name] == set(joined.options["refilled"].get(name, ()))
        elif have != want[name]:  # nobody says how many there are: only what some plan keeps can come back
            assert have <= set().union(*(one.keep[name].tolist() for one in given_plans if name in one.keep))
    shuffled = list(given_plans)
    random.shuffle(shuffled)
    assert kept(pp.combine(shuffled, how, min_keep=min_keep)) == kept(joined)


@settings(deadline=None)
@given(plans(3, 3), st.sampled_from(["union", "intersection"]))
def test_joining_is_associative_where_nothing_comes_back(given_plans, how):
    one, two, three = given_plans
    at_once = pp.combine(given_plans, how)
    parts = [pp.combine([one, two], how), pp.combine([two, three], how)]
    wholes = [pp.combine([parts[0], three], how), pp.combine([one, parts[1]], how)]
    if not any(joined.options["refilled"] for joined in (at_once, *parts, *wholes)):
        for joined in wholes:
            want = sets(given_plans, how)
            have = {n: set(joined.keep[n].tolist()) if n in joined.keep else set(range(FILTERS[n])) for n in FILTERS}
            assert have == want


@settings(deadline=None)
@given(plans(1, 1), st.sampled_from(["union", "intersection"]))
def test_a_plan_joined_with_itself_is_itself(given_plans, how):
    assert kept(pp.combine(given_plans * 2, how)) == kept(given_plans[0])
    assert kept(pp.combine(given_plans * 3, how)) == kept(given_plans[0])


def test_reasons_name_the_plans_and_carry_theirs():
    one = scored("crank", [0, 1], [9.0, 8.0, 2.0, 1.0])
    other = scored("ckrm", [0, 3], [0.4, 0.1, 0.2, 0.3])
    union, common = pp.combine([one, other]), pp.combine([one, other], "intersection")
    assert kept(union) == {"a": [0]}
    assert [why.reason for why in union.why["a"]] == [
        "no plan removes it", "removed by ckrm: ckrm: worth 0.1",
        "removed by crank and ckrm: crank: worth 2.0; ckrm: worth 0.2", "removed by crank: crank: worth 1.0",
    ]  # fmt: skip
    assert kept(common) == {"a": [0, 1, 3]}
    assert [why.reason for why in common.why["a"]] == [
        "no plan removes it", "only ckrm would remove it: ckrm: worth 0.1",
        "removed by crank and ckrm: crank: worth 2.0; ckrm: worth 0.2", "only crank would remove it: crank: worth 1.0",
    ]  # fmt: skip
    three = pp.combine([one, other, scored("l1", [0, 1, 3], [1.0] * 4)])
    assert three.why["a"][2].reason.startswith("removed by crank, ckrm and l1: crank: worth 2.0; ")
    assert three.method == "union(crank, ckrm, l1)"
    assert (
        pp.combine([union, common], "intersection").method
        == "intersection(union(crank, ckrm), intersection(crank, ckrm))"
    )


def test_plans_by_the_same_method_are_numbered():
    joined = pp.combine([plan("l1", a=[0, 1]), plan("l1", a=[0, 2]), plan("l1 #1", a=[0])])
    assert [one["label"] for one in joined.options["plans"]] == ["l1 #1", "l1 #2", "l1 #1 #3"]
    assert joined.why["a"][1].reason == "removed by l1 #2 and l1 #1 #3"


def test_a_layer_that_a_plan_leaves_out_stays_whole_in_it():
    one, other = plan("crank", a=[0, 1], b=[2]), plan("ckrm", a=[1, 2])
    assert kept(pp.combine([one, other])) == {"a": [1], "b": [2]}
    joined = pp.combine([one, other], "intersection")
    assert kept(joined) == {"a": [0, 1, 2], "b": [0, 1, 2, 3]}
    assert joined.why["b"].note == "ckrm leaves this layer out and removes nothing in it"
    assert joined.why["b"][0].reason == "only crank would remove it"
    uncounted = [plan("crank", {}, a=[0, 1], b=[2]), plan("ckrm", {}, a=[1, 2])]
    assert kept(pp.combine(uncounted)) == {"a": [1], "b": [2]}
    joined = pp.combine(uncounted, "intersection")
    assert (kept(joined), joined.filters, joined.why) == ({"a": [0, 1, 2]}, {}, {})


def test_what_comes_back_is_what_fewest_remove_then_the_highest_places_then_the_lower_index():
    # All filters go by one plan or another: 0, 1 and 2 by two of the three, 3 by all.
    one = scored("one", [0], [9.0, 5.0, 6.0, 7.0])  # places 3, 0, 1, 2
    two = scored("two", [1], [1.0, 9.0, 8.0, 0.0])  # places 1, 3, 2, 0
    three = Plan({"a": [2]}, filters={"a": 4}, method="three")  # no scores: counts among those that remove, no more
    # Sums of places: 4, 3, 3, 2.
    for count, want in ((1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (4, [0, 1, 2, 3]), (9, [0, 1, 2, 3])):
        joined = pp.combine([three, one, two], min_keep=count)
        assert kept(joined) == {"a": want}
        assert joined.options["refilled"] == {"a": want}
        assert joined.why["a"].note == f"{len(want)} came back to leave {count}"
    assert joined.why["a"][3].reason == (
        "kept to leave min_keep though removed by three, one and two: one: worth 7.0; two: worth 0.0"
    )
    partly = replace(two, why={"a": replace(two.why["a"], filters=tuple(
        replace(why, score=None) if f == 0 else why for f, why in enumerate(two.why["a"])))})  # fmt: skip
    # Without two's places: 3, 0, 1, 2, of which 3 is removed by all.
    assert kept(pp.combine([three, one, partly], min_keep=2)) == {"a": [0, 2]}
    disagreeing = [scored("one", [0, 3], [0.0] * 4), scored("two", [1, 3], [9.0, 0.0, 0.0, 0.0]), plan("x", a=[2])]
    joined = pp.combine([*disagreeing[:2], Plan({"a": [2]}, filters={"a": 4}, method="three")])
    assert kept(joined) == {"a": [3]}  # one plan removes it, two remove each of the others


def test_clusters_and_regions_stay_visible_where_one_plan_has_them():
    seen = {"cluster": 2, "medoid": True, "region": Region.HIGH_AVG_LOW_STD, "silhouette": 0.5, "avg": 0.9, "std": 0.1}
    why = LayerWhy((FilterWhy("medoid", True, **seen), FilterWhy("gone", False)), k=4, avg_mean=0.5, stability=0.7)
    crank = Plan({"a": [0]}, filters={"a": 2}, why={"a": why}, method="crank")
    joined = pp.combine([plan("l1", {"a": 2}, a=[1]), crank], min_keep=2).why["a"]
    assert (joined.k, joined.avg_mean, joined.stability) == (4, 0.5, None)
    assert {name: getattr(joined[0], name) for name in seen} == seen
    assert pp.combine([crank, crank]).why["a"].k is None


def test_options_carry_what_was_joined_and_files_bring_it_back(tmp_path):
    one = replace(plan("crank", a=[0, 1], b=[2]), options={"seed": (6, 7)})
    joined = pp.combine([one, plan("ckrm", a=[2], c=[0])], min_keep=2)
    assert joined.options["plans"] == [
        {"label": "crank", "method": "crank", "options": {"seed": [6, 7]}},
        {"label": "ckrm", "method": "ckrm", "options": {}},
    ]
    assert (joined.options["how"], joined.options["min_keep"]) == ("union", 2)
    assert joined.options["refilled"] == {"a": [0, 1], "b": [0]}
    joined.save(tmp_path / "joined.json")
    assert Plan.load(tmp_path / "joined.json") == joined
    assert Plan.load(tmp_path / "joined.json") != pp.combine([one, plan("ckrm", a=[2], c=[0])])


@pytest.mark.parametrize(
    ("given_plans", "options", "error", "message"),
    [
        ([], {}, ValueError, "needs two or more plans; got 0"),
        ([plan(a=[0])], {}, ValueError, "needs two or more plans; got 1"),
        (plan(a=[0]), {}, ValueError, r"got one plan\. Pass \[plan, other\]"),
        ("plan.json", {}, TypeError, "must be pyprune.Plan in a list; got str"),
        ([plan(a=[0]), {"a": [0]}], {}, TypeError, r"got \['Plan', 'dict'\]"),
        ([plan(a=[0])] * 2, {"how": "intersect"}, ValueError, "got 'intersect'. Did you mean 'intersection'"),
        ([plan(a=[0])] * 2, {"how": None}, ValueError, "'union' or 'intersection'; got None"),
        ([plan(a=[0])] * 2, {"min_keep": 0}, ValueError, "min_keep must be a whole number of at least 1; got 0"),
        ([plan(a=[0])] * 2, {"min_keep": True}, ValueError, "at least 1; got True"),
        ([plan(a=[0]), plan(b=[0])], {}, ValueError, "no layer in common; theirs begin with 'a', 'b'"),
        ([plan("x", a=[0]), plan("y", {"a": 8}, a=[0])], {}, ValueError, "'a' has 7 filters .* 'x' and 8 .* 'y'"),
        ([scored("x", [0], [1.0] * 3), plan("y", a=[0])], {}, ValueError, "'a' has 3 filters .* 'x' and 7"),
        ([replace(scored("x", [0], [1.0] * 3), filters={"a": 4})] * 2, {}, ValueError, "'a' has 4 filters .* and 3 in"),
        ([plan("x", {}, a=[7]), plan("y", a=[0])], {}, ValueError, "'a' has 7 .* 'y'; that by 'x' keeps filter 7"),
    ],
)
def test_contradictions_are_one_sentence(given_plans, options, error, message):
    with pytest.raises(error, match=message) as caught:
        pp.combine(given_plans, **options)
    assert str(caught.value).startswith("combine: ")
    assert "\n" not in str(caught.value)


def test_reasons_alone_say_how_many_filters_there_are():
    uncounted = replace(scored("x", [0], [1.0] * 3), filters={})
    assert pp.combine([uncounted, plan("y", {}, a=[1, 2])]).filters == {"a": 3}


@settings(deadline=None)
@given(plans(2, 2))
def test_what_both_remove_beside_chance(given_plans):
    one, other = given_plans
    for name, found in comparing.removed_by_both(one, other).items():
        F = FILTERS[name]
        gone = [set(range(F)) - set(each.keep[name].tolist()) for each in given_plans]
        assert (found.filters, found.first, found.second) == (F, len(gone[0]), len(gone[1]))
        assert found.common == len(gone[0] & gone[1])
        assert abs(found.chance - len(gone[0]) * len(gone[1]) / F) < STATISTICS
        by_count = [stats.hypergeom.pmf(n, F, len(gone[0]), len(gone[1])) for n in range(F + 1)]
        assert abs(found.p - sum(by_count[found.common :])) < STATISTICS
        assert abs(found.p_fewer - sum(by_count[: found.common + 1])) < STATISTICS
        kept_by_both = comparing.overlap(one.keep[name], other.keep[name], F)
        assert abs(kept_by_both.p - found.p) < STATISTICS


def test_layers_together_are_all_the_ways_to_draw_in_each():
    first = {"a": [0, 1, 2], "b": [0], "c": [0]}
    layers = comparing.removed_by_both(plan(**first), plan(a=[1, 2, 5, 6], b=[3, 2], c=[0]))
    ways = [
        len(set(a) & {0, 3, 4})
        + len(set(b) & {0, 1})  # what the second removes, and all the first could remove instead
        for a in combinations(range(7), 4)
        for b in combinations(range(4), 3)
    ]
    found = comparing.pooled(layers.values())
    assert (found.filters, found.first, found.second, found.common) == (12, 7, 5, 3)
    assert abs(found.chance - np.mean(ways)) < STATISTICS
    assert abs(found.p - np.mean([one >= 3 for one in ways])) < STATISTICS
    assert abs(found.p_fewer - np.mean([one <= 3 for one in ways])) < STATISTICS
    assert 0 < found.p < 1
    assert comparing.pooled([]).p == 1


def test_masks_training_compaction_and_the_report_take_it(tmp_path):
    torch.manual_seed(0)
    data = digits()
    model = pp.models.vgg_digits(widths=(6, 8)).eval()
    example = data.test[0][0][None]
    ranks = pp.rank_filters(model, loader(data.train), images_per_class=2, progress=False)
    by_ranks = pp.select(model, "crank", ranks=ranks, progress=False)
    joined = pp.combine([by_ranks, pp.select(model, "ckrm", rates=0.5, progress=False)])
    slim = pp.compact(model, joined, example, latency=False)
    assert slim.certificate.verified
    assert {name: len(one) for name, one in joined.keep.items()} == {
        name: layer.out_channels for name, layer in slim.model.named_modules() if isinstance(layer, torch.nn.Conv2d)
    }
    again = pp.select(model, "l1", rates=joined, progress=False)
    assert {name: len(one) for name, one in again.keep.items()} == {name: len(one) for name, one in joined.keep.items()}
    masks = pp.mask_(model, joined)
    history = pp.finetune(model, loader(data.train, shuffle=True), masks=masks, steps=2, progress=False)
    for name, one in joined.keep.items():
        gone = np.setdiff1d(np.arange(joined.filters[name]), one)
        assert len(gone)
        assert not model.get_submodule(name).weight[gone].any()
    done = pp.evaluate(model, loader(data.test), progress=False)
    result = pp.PruneResult(ranks, joined, history, slim, {"original": done}, {})
    pp.report(result, tmp_path / "report.html")
    assert "removed by crank and ckrm" in (tmp_path / "report.html").read_text()
