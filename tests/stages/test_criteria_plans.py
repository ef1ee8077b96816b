"""From scores to plans: budgets that compaction keeps, coupled layers, what is recorded and what is refused."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import pyprune as pp
from pyprune import graph, selection
from zoo import ENTRIES, checking


class Stream(nn.Module):
    """A stem and a branch that are added, and a layer behind."""

    def __init__(self, filters=3):
        super().__init__()
        self.stem = nn.Conv2d(1, filters, 3, padding=1, bias=False)
        self.branch = nn.Conv2d(filters, filters, 3, padding=1, bias=False)
        self.behind = nn.Conv2d(filters, 4, 1)

    def forward(self, x):
        x = self.stem(x)
        return self.behind(torch.relu(x + self.branch(x)))


class Given:
    """Scores by decree."""

    name = "given"
    needs = ()

    def __init__(self, scores):
        self.by_layer = scores

    def scores(self, model, context):
        return {name: np.array(one, float) for name, one in self.by_layer.items() if name in context.layers}


X = torch.randn(1, 1, 6, 6)
DECREED = Given({"stem": [3, 2, 1], "branch": [1, 2, 9]})


def kept(plan):
    return {name: one.tolist() for name, one in plan.keep.items()}


def test_coupled_layers_scored_apart_leave_their_channels_behind():
    plan = pp.select(Stream(), DECREED, rates=0.6, example_inputs=X)
    assert kept(plan) == {"stem": [0], "branch": [2]}
    # Of six planned filters four go; the channels of filter 0 of the branch and 2 of the stem stay in the stream.
    assert plan.options["coupling"]["stays"] == 2


def test_coupled_layers_scored_jointly_by_hand():
    # Places, of three: 5/6, 3/6, 1/6. Stem 5/6, 3/6, 1/6; branch 1/6, 3/6, 5/6: every channel has 1/2, the first stays.
    plan = pp.select(Stream(), DECREED, rates=0.6, example_inputs=X, coupled="joint")
    assert kept(plan) == {"stem": [0], "branch": [0]}
    assert plan.options["coupling"]["stays"] == 0
    # Scores 3, 2, 1 and 2, 1, 9: places 5/6, 3/6, 1/6 and 3/6, 1/6, 5/6. Means 4/6, 2/6, 3/6.
    criterion = Given({"stem": [3, 2, 1], "branch": [2, 1, 9], "behind": [4, 3, 2, 1]})
    plan = pp.select(Stream(), criterion, rates=0.6, example_inputs=X, coupled="joint")
    assert [one.score for one in plan.why["stem"]] == pytest.approx([4 / 6, 2 / 6, 3 / 6])
    assert plan.why["branch"][2].reason == "joint given 0.5, below the 1 highest"
    assert [one.score for one in plan.why["behind"]] == pytest.approx([7 / 8, 5 / 8, 3 / 8, 1 / 8])
    # Comparable scores are averaged as they are: 2.5, 1.5, 5.
    criterion.comparable = True
    plan = pp.select(Stream(), criterion, rates=0.6, example_inputs=X, coupled="joint")
    assert kept(plan) == {"stem": [2], "branch": [2], "behind": [0, 1]}


def test_coupled_layers_keep_their_mean_count():
    # Rates of 0 and 2/3 ask for 3 and 1 of 3: both keep 2.
    rates = {"stem": 0.0, "branch": 2 / 3}
    plan = pp.select(Stream(), DECREED, rates=rates, example_inputs=X, coupled="joint")
    assert [len(one) for one in plan.keep.values()] == [2, 2]
    apart = pp.select(Stream(), DECREED, rates=rates, example_inputs=X)
    assert [len(one) for one in apart.keep.values()] == [3, 1]


def test_an_own_rate_can_be_taken_jointly():
    ranks = pp.ClassRanks({name: np.random.default_rng(i).random((12, 3)) for i, name in enumerate(("stem", "branch"))})
    given_to = {"ranks": ranks, "n_init": 1, "jobs": 1, "example_inputs": X}
    apart, joint = (pp.select(Stream(12), coupled=how, **given_to) for how in ("apart", "joint"))
    counts = [len(one) for one in apart.keep.values()]
    assert [len(one) for one in joint.keep.values()] == [int(sum(counts) / 2 + 0.5)] * 2
    assert kept(joint)["stem"] == kept(joint)["branch"]
    assert joint.options["coupling"]["stays"] == 0 < apart.options["coupling"]["stays"]


def test_joint_scores_really_shrink_a_residual_network():
    torch.manual_seed(0)
    model = pp.models.resnet20()
    x = torch.randn(1, 3, 16, 16)
    apart, joint = (pp.select(model, "random", rates=0.75, example_inputs=x, coupled=how) for how in ("apart", "joint"))
    assert [len(one) for one in apart.keep.values()] == [len(one) for one in joint.keep.values()]
    costs = [plan.options["coupling"] for plan in (apart, joint)]
    assert costs[1]["macs"][1] < costs[0]["macs"][1]
    assert costs[1]["macs_intersect"] < 0.6 * costs[0]["macs_intersect"]


class Mixed(nn.Module):
    """Grouped, depthwise and one-dimensional convolutions, and a concatenation."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv1d(2, 8, 3, padding=1)
        self.norm = nn.BatchNorm1d(8)
        self.deep = nn.Conv1d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv1d(8, 6, 3, padding=1, groups=2)
        self.head = nn.Linear(14, 3)

    def forward(self, x):
        x = self.deep(torch.relu(self.norm(self.first(x))))
        return self.head(torch.cat([x, torch.relu(self.grouped(x))], 1).mean(2))


CASES = {
    "chain": (lambda: pp.models.vgg_digits(widths=(8, 8, 12, 12)), (1, 1, 16, 16)),
    "residual": (lambda: Stream(10), (1, 1, 6, 6)),
    "mixed": (Mixed, (1, 2, 9)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("coupled", ["apart", "joint"])
@pytest.mark.parametrize("what", ["macs", "parameters"])
def test_a_budget_is_what_compaction_leaves(case, coupled, what):
    torch.manual_seed(0)
    build, shape = CASES[case]
    model, x = build().eval(), torch.randn(shape)
    plan = pp.select(model, "l1", budget={what: 0.55}, example_inputs=x, coupled=coupled)
    found = plan.options["budget"][what]
    slim = pp.compact(model, plan, x, latency=False)
    assert found["of"] == getattr(slim.before, what)
    assert found["reached"] == getattr(slim.after, what) <= 0.55 * found["of"] == found["allowed"]
    assert found["reached"] == plan.options["coupling"][what][1]
    if coupled == "joint":
        return
    # Not more goes than must: with the filter that went last back in, it does not fit any more.
    places = {name: selection._places(np.array([one.score for one in why])) for name, why in plan.why.items()}
    gone = [
        (places[name][f], position, -f)
        for position, (name, why) in enumerate(plan.why.items())
        for f, one in enumerate(why)
        if not one.keep
    ]
    _, position, minus = max(gone)
    last = list(plan.keep)[position]
    fuller = pp.Plan({**plan.keep, last: np.append(plan.keep[last], -minus)})
    assert getattr(pp.compact(model, fuller, x, latency=False).after, what) > found["allowed"]


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 1000), st.lists(st.floats(0.3, 1), min_size=2, max_size=4))
def test_smaller_budgets_keep_subsets(seed, shares):
    torch.manual_seed(seed)
    model = Stream(8)
    plans = [
        pp.select(model, "random", seed=seed, budget={"macs": share}, example_inputs=X, exclude=["behind"])
        for share in sorted(shares)
    ]
    for fewer, more in pairwise(plans):
        assert all(set(fewer.keep[name]) <= set(more.keep[name]) for name in fewer.keep)


def test_budgets_of_several_costs_and_of_counts():
    model, x = pp.models.vgg_digits(widths=(8, 8, 12, 12)), torch.randn(1, 1, 16, 16)
    full = pp.profile(model, x, latency=False)
    plan = pp.select(model, "l2", budget={"macs": 0.9, "parameters": 2000}, example_inputs=x)
    found = plan.options["budget"]
    assert found["parameters"]["reached"] <= 2000 < full.parameters
    assert found["macs"]["reached"] <= 0.9 * full.macs
    whole = pp.select(model, "l2", budget={"macs": 1.0}, example_inputs=x)
    assert all(len(one) == whole.filters[name] for name, one in whole.keep.items())
    hrank = pp.select(model, "l2", budget={"hrank_v1_macs": 0.5}, example_inputs=x)
    assert pp.profile(model, x, plan=hrank, latency=False).hrank_v1_macs <= 0.5 * full.hrank_v1_macs


def test_a_budget_that_cannot_be_met_says_what_can():
    model, x = pp.models.vgg_digits(widths=(8, 8, 12, 12)), torch.randn(1, 1, 16, 16)
    with pytest.raises(ValueError, match=r"macs cannot fall to 3,?\d*; the nearest is [\d,]+, 0.\d+ of") as caught:
        pp.select(model, "l1", budget={"macs": 0.01}, min_keep=3, example_inputs=x)
    nearest = int(str(caught.value).split("nearest is ")[1].split(", 0.")[0].replace(",", ""))
    plan = pp.select(model, "l1", budget={"macs": nearest}, min_keep=3, example_inputs=x)
    assert plan.options["budget"]["macs"]["reached"] == nearest
    assert [len(one) for one in plan.keep.values()] == [3, 3, 3, 3]
    with pytest.raises(ValueError, match="macs cannot fall"):
        pp.select(model, "l1", budget={"macs": nearest - 1}, min_keep=3, example_inputs=x)


@pytest.mark.parametrize(
    ("budget", "kind", "message"),
    [
        (0.5, TypeError, r"budget must be a mapping such as \{\"macs\": 0.5\}; got 0.5"),
        ({}, TypeError, "budget must be a mapping"),
        ({"mac": 0.5}, ValueError, "budget can name 'macs', 'parameters', .*; got 'mac'. Did you mean 'macs'"),
        ({"macs": "half"}, TypeError, "budget of macs must be a number; got str"),
        ({"macs": True}, TypeError, "budget of macs must be a number; got bool"),
        ({"macs": 0}, ValueError, "budget of macs must be a share up to 1 or a number above; got 0"),
        ({"macs": float("nan")}, ValueError, "budget of macs must be a share"),
    ],
)
def test_budgets_that_are_none(budget, kind, message):
    with pytest.raises(kind, match=message):
        pp.select(Stream(), "l1", budget=budget, example_inputs=X)


def test_the_first_image_of_the_data_is_an_example():
    data = [(torch.randn(5, 1, 6, 6), torch.arange(5) % 2)]
    plan = pp.select(Stream(), "l1", data=data, budget={"macs": 0.9})
    assert plan.options["budget"]["macs"]["of"] == pp.profile(Stream(), X, latency=False).macs
    with pytest.raises(ValueError, match="budget needs example_inputs"):
        pp.select(Stream(), "l1", data=iter(data), budget={"macs": 0.9})  # reading one would use it up
    assert "coupling" not in pp.select(Stream(), "l1", data=data, rates=0.5).options, "nothing is run without need"


def test_what_cannot_be_traced_can_still_be_scored():
    class Forked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(1, 4, 3)

        def forward(self, x):
            return self.layer(x) if x.sum() > 0 else x

    assert len(pp.select(Forked(), "l1", rates=0.5).keep["layer"]) == 2
    with pytest.raises(ValueError, match=r"select: Forked cannot be traced by torch.fx"):
        pp.select(Forked(), "l1", budget={"macs": 0.5}, example_inputs=X)


def test_rates_of_other_plans_and_layers():
    model = Stream()
    plan = pp.Plan({"stem": [0], "behind": [0, 1, 2, 3]})
    assert [len(one) for one in pp.select(model, "l1", rates=plan).keep.values()] == [1, 3, 4]
    assert [len(one) for one in pp.select(model, "l1", rates=plan, exclude=["stem"]).keep.values()] == [3, 3, 4]
    with pytest.raises(ValueError, match="rates names 'branch', of which there are no scores"):
        pp.select(model, Given({"stem": [1, 2, 3]}), rates=pp.Plan({"branch": [0]}))
    with pytest.raises(ValueError, match=r"'given' has no rate of its own. Pass rates=, a plan, .*, or budget="):
        pp.select(model, DECREED)
    with pytest.raises(ValueError, match="the plan keeps 7"):
        pp.select(model, DECREED, rates=pp.Plan({"stem": [7]}))


class Own(Given):
    def plan(self, model, context):
        return pp.Plan({name: [int(np.argmax(one))] for name, one in self.scores(model, context).items()})


def test_a_criterion_with_a_rate_of_its_own():
    criterion = Own({"stem": [3, 2, 1], "branch": [1, 2, 9]})
    plan = pp.select(Stream(), criterion)
    assert kept(plan) == {"stem": [0], "branch": [2]}
    assert plan.why["stem"][1].reason == "given removes it"
    filled = pp.select(Stream(), criterion, min_keep=2)
    assert kept(filled) == {"stem": [0, 1], "branch": [1, 2]}
    assert filled.why["branch"][1].reason == "kept to leave min_keep"
    assert kept(pp.select(Stream(), criterion, exclude=["stem"])) == {"stem": [0, 1, 2], "branch": [2]}


def test_the_plan_records_its_settings():
    plan = pp.select(Stream(), "random", seed=5, rates={"stem": 0.5, "branch": 0, "behind": 0.25})
    options = plan.options
    assert (options["seed"], options["coupled"], options["min_keep"], options["exclude"]) == (5, "apart", 1, [])
    assert options["counts"] == {"stem": 2, "branch": 3, "behind": 3}
    assert options["rates"] == {"stem": 0.5, "branch": 0, "behind": 0.25}
    assert options["ranks"] == {}


@pytest.mark.parametrize("name", ENTRIES)
def test_what_a_plan_says_it_leaves_is_what_compaction_leaves(name):
    torch.manual_seed(0)
    entry = ENTRIES[name]
    model, x = checking.randomised(entry.build()), torch.randn(entry.shape, dtype=torch.float64)
    heads = [head for head in entry.heads if head in graph.convolutions(model)]
    plan = pp.select(model, "random", rates=0.5, example_inputs=x, exclude=heads)
    slim = pp.compact(model, plan, x, latency=False, verify=False)
    found = plan.options["coupling"]
    assert found["macs"] == [slim.before.macs, slim.after.macs]
    assert found["parameters"] == [slim.before.parameters, slim.after.parameters]  # with biases of folded constants
    together = pp.compact(model, plan, x, residual="intersect", latency=False, verify=False)
    assert found["macs_intersect"] == together.after.macs
    assert found["parameters_intersect"] == together.after.parameters
    joint = pp.select(model, "random", rates=0.5, example_inputs=x, exclude=heads, coupled="joint")
    assert joint.options["coupling"]["stays"] <= found["stays"]
    assert pp.select(model, "cup", rates=0.5, example_inputs=x, exclude=heads).filters == plan.filters
