"""Layers that run more than once, and layers that share their weights: what leaves one call leaves them all."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pyprune as pp
from pyprune import graph
from pyprune.types import Plan
from zoo import checking

X = torch.randn(2, 2, 6, 6, dtype=torch.float64)


class Net(nn.Module):
    """Two convolutions of the input and whatever is made of both; ``end`` reads the result."""

    def __init__(self, between, reads=6, tie=(), **parts):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(2, 6, 1)
        self.end = nn.Conv2d(reads, 3, 3)
        self.between = between
        for name, part in parts.items():
            setattr(self, name, copy.deepcopy(part))
        for one, other in tie:
            setattr(self.get_submodule(one.rpartition(".")[0]), one.rpartition(".")[2], self.get_parameter(other))

    def forward(self, x):
        return self.end(self.between(self, self.a(x), self.b(x)))


def same(filters=6, groups=1, bias=True):
    return nn.Conv2d(6, filters, 3, padding=1, groups=groups, bias=bias)


OPEN = nn.Conv2d(6, 6, 3, padding=1, padding_mode="replicate")
TWO = {"m": same(), "n": same()}
CASES = {
    "levels": (lambda s, a, b: s.m(a) + s.m(b), {"m": same()}),
    "one after another": (lambda s, a, b: s.m(s.m(F.relu(a)).relu()) + b, {"m": same()}),
    "levels in groups": (lambda s, a, b: s.m(a) + s.m(b), {"m": same(groups=2)}),
    "depthwise": (lambda s, a, b: s.m(a) * s.m(b), {"m": same(groups=6)}),
    "multiplier": (lambda s, a, b: s.m(a) * s.m(b), {"m": same(12, groups=6), "reads": 12}),
    "norm": (lambda s, a, b: torch.cat((s.m(a).relu(), s.m(b).relu()), 1), {"m": nn.BatchNorm2d(6), "reads": 12}),
    "group norm": (
        lambda s, a, b: torch.cat((s.m(a).relu(), s.m(b).relu()), 1), {"m": nn.GroupNorm(3, 6), "reads": 12},
    ),
    "slopes": (lambda s, a, b: torch.cat((s.m(a), s.m(b)), 1), {"m": nn.PReLU(6), "reads": 12}),
    "equal constants": (lambda s, a, b: s.m(a.sigmoid()) + s.m(b.sigmoid()), {"m": OPEN}),
    "other constants": (lambda s, a, b: s.m(a.sigmoid()) + s.m(b.relu()), {"m": OPEN}),
    "constant once": (lambda s, a, b: s.m(a.sigmoid()) + s.m(s.m(b.sigmoid())), {"m": OPEN}),
    "transposed": (lambda s, a, b: s.m(a) + s.m(b), {"m": nn.ConvTranspose2d(6, 6, 3)}),
    "heads": (
        lambda s, a, b: (s.m(a.mean((2, 3))) + s.m(b.mean((2, 3))))[:, :, None, None].expand(-1, -1, 4, 4),
        {"m": nn.Linear(6, 6)},
    ),
    "tied": (lambda s, a, b: s.m(a) + s.n(b), {**TWO, "tie": [("n.weight", "m.weight")]}),
    "tied whole": (lambda s, a, b: s.m(a) + s.n(b), {**TWO, "tie": [("n.weight", "m.weight"), ("n.bias", "m.bias")]}),
    "tied without biases": (
        lambda s, a, b: s.m(a) + s.n(b),
        {"m": same(bias=False), "n": same(bias=False), "tie": [("n.weight", "m.weight")]},
    ),
    "tied with constants": (
        lambda s, a, b: s.m(a.sigmoid()) + s.n(b.sigmoid()), {"m": OPEN, "n": OPEN, "tie": [("n.weight", "m.weight")]},
    ),
    "tied and called twice": (
        lambda s, a, b: s.m(a) + s.n(b) + s.n(a), {**TWO, "tie": [("n.weight", "m.weight"), ("n.bias", "m.bias")]},
    ),
    "a tied chain": (lambda s, a, b: s.n(s.m(a).relu()) + b, {**TWO, "tie": [("n.weight", "m.weight")]}),
}  # fmt: skip
PLANS = {
    "both": {"a": [0, 2, 3], "b": [0, 2, 3]},
    "differing": {"a": [0, 2, 3], "b": [1, 2, 4]},
    "one": {"a": [1, 4]},
    "all": {"a": [0, 3], "b": [0, 3], "m": [0, 3], "n": [0, 3]},
    "more": {"a": [0, 1, 3], "b": [0, 3], "m": [0, 3, 4], "n": [0, 1, 3, 4]},
}


def built(case):
    between, parts = CASES[case]
    torch.manual_seed(0)
    model = Net(between, **parts)
    return checking.randomised(model)


def planned(model, which):
    layers = graph.prunable(model)
    return Plan({name: kept for name, kept in PLANS[which].items() if name in layers})


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("which", PLANS)
def test_what_leaves_one_call_leaves_them_all(case, which, tmp_path):
    model = built(case)
    slim = checking.check(model, planned(model, which), X, folder=tmp_path / "slim")
    if "tied" in case:
        assert slim.model.m.weight is slim.model.n.weight
        assert (slim.model.m.bias is slim.model.n.bias) == (model.m.bias is model.n.bias)


@pytest.mark.parametrize("residual", ["intersect", "union"])
@pytest.mark.parametrize("case", CASES)
def test_in_the_other_modes(case, residual):
    model = built(case)
    checking.check(model, planned(model, "differing"), X, residual=residual)


def test_a_layer_over_several_levels_loses_what_all_of_them_lose():
    slim = checking.check(built("levels"), planned(built("levels"), "differing"), X)
    assert slim.model.m.in_channels == slim.model.a.out_channels == slim.model.b.out_channels == 5
    assert slim.kept["a"] == {
        1: "is read by m too, where b keeps its channel", 4: "is read by m too, where b keeps its channel"
    }  # fmt: skip
    slim = checking.check(built("one after another"), Plan({"a": [0, 3], "m": [0, 3]}), X)
    assert slim.kept == {}
    assert slim.model.m.weight.shape[:2] == (2, 2)


def test_different_constants_stay_and_equal_ones_are_folded():
    both = PLANS["both"]
    slim = checking.check(built("equal constants"), Plan(both), X)
    assert slim.kept == {}
    assert slim.model.m.in_channels == 3
    slim = checking.check(built("other constants"), Plan(both), X)
    assert "is another constant at another call of m" in slim.kept["b"].values()
    assert slim.model.m.in_channels == 6


def test_shared_weights_leave_where_both_names_say_so():
    model = built("a tied chain")
    slim = checking.check(model, Plan({"a": [0, 3], "m": [0, 3], "n": [0, 2, 3]}), X)
    assert slim.kept == {
        "m": {2: "shares its parameters with n.weight"},
        "a": {2: "is read by n too, where m keeps its channel"},
    }
    assert slim.model.m.weight is slim.model.n.weight
    slim = checking.check(model, Plan({"m": [0, 3]}), X)
    assert slim.kept["m"] == dict.fromkeys([1, 2, 4, 5], "shares its parameters with n.weight")


def test_layers_of_two_kinds_that_share_a_weight_stay():
    model = built("levels")
    model.n = nn.ConvTranspose2d(6, 6, 3).double()
    model.n.weight = model.m.weight
    model.between = lambda s, a, b: s.n(s.m(a)) + b[:, :, :1, :1]
    slim = checking.check(model, Plan({"a": [0], "m": [0, 1]}), X)
    assert graph.shared_layers(model) == {}
    assert set(slim.kept["m"].values()) == {"shares its parameters with n.weight"}


def test_a_layer_that_reads_the_images_too_keeps_its_inputs():
    model = checking.randomised(nn.Sequential(nn.Conv2d(2, 2, 3), nn.ReLU(), nn.Conv2d(2, 3, 1)))
    model = nn.Sequential(model[0], model[1], model[0], model[2])
    slim = checking.check(model, Plan({"0": [1]}), X)
    assert slim.kept == {"0": {0: "feeds 0, which reads something else too that pyprune does not follow"}}


def test_a_trained_slim_network_keeps_its_layers_tied():
    model = built("tied whole")
    slim = pp.compact(model, Plan(PLANS["all"]), X).model
    slim.train()
    optimizer = torch.optim.SGD(slim.parameters(), 0.1)
    slim(X).square().sum().backward()
    optimizer.step()
    assert torch.equal(slim.m.weight, slim.n.weight)
    assert sum(one.numel() for one in slim.parameters()) == sum(one.numel() for one in {*slim.parameters()})
