"""Tracing, names, which slices a mask zeroes, and the check of generated source."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pyprune import graph
from pyprune.types import Plan


def test_trace_puts_the_flags_back_and_runs_nothing():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Dropout(), nn.BatchNorm2d(2))
    model[1].eval()
    nodes = [node.name for node in graph.trace(model).nodes]
    assert nodes == ["input_1", "_0", "_1", "_2", "output"]
    assert [module.training for module in model] == [True, False, True]


@pytest.mark.parametrize("name", ["a b", "x=1\nimport os", "class", "é", "a" * 129, "1a", ""])
def test_hostile_names_are_refused_before_tracing(name):
    model = nn.Sequential()
    model._modules[name] = nn.Conv2d(1, 1, 1)
    with pytest.raises(ValueError, match="names must be ASCII identifiers or numbers of at most 128 characters"):
        graph.trace(model)


def test_untraceable_models_are_named():
    class Branches(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match=r"compact: Branches cannot be traced by torch\.fx"):
        graph.trace(Branches(), "compact")


def slices(model, plan):
    return {name: found.tolist() for name, found in graph.dead_slices(model, Plan(plan)).items()}


def test_a_filter_its_bias_and_its_norm_are_zeroed():
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.BatchNorm2d(3), nn.MaxPool2d(2), nn.Conv2d(3, 2, 3, bias=False),
        nn.BatchNorm2d(2),
    )  # fmt: skip
    assert slices(model, {"0": [1], "4": [0]}) == {
        "0.weight": [0, 2], "0.bias": [0, 2], "2.weight": [0, 2], "2.bias": [0, 2], "4.weight": [1],
        "5.weight": [1], "5.bias": [1],
    }  # fmt: skip
    assert slices(model, {"0": [0, 1, 2]}) == {}


def test_a_norm_behind_a_flatten_is_zeroed_for_every_position():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.BatchNorm1d(8), nn.Linear(8, 3), nn.BatchNorm1d(3))
    found = slices(model, {"0": [1]})
    assert found["2.weight"] == found["2.bias"] == [0, 1, 2, 3]
    assert "4.weight" not in found


def test_functional_operations_are_followed():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.last = nn.Conv2d(1, 3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)

        def forward(self, x):
            x = F.max_pool2d(F.relu(self.conv(x)), 2)
            x = 2 * x.sigmoid() + 1
            return self.last(self.norm(x.mean((-2, -1))))

    assert slices(Functional(), {"conv": [2]})["norm.weight"] == [0, 1]


class Join(nn.Module):
    """Two convolutions whose outputs are joined before a norm."""

    def __init__(self, join, norm):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 3, 1), nn.Conv2d(1, 3, 1)
        self.norm, self.join = norm, join

    def forward(self, x):
        return self.norm(self.join(self.a(x), self.b(x)))


def test_a_sum_is_masked_only_where_both_sides_are():
    model = Join(lambda a, b: a + b, nn.BatchNorm2d(3))
    found = slices(model, {"a": [0], "b": [1]})
    assert (found["a.weight"], found["b.weight"], found["norm.weight"]) == ([1, 2], [0, 2], [2])
    assert "norm.weight" not in slices(model, {"a": [0]})


def test_a_concatenation_keeps_the_sides_apart():
    model = Join(lambda a, b: torch.cat([a, b], 1), nn.BatchNorm2d(6))
    assert slices(model, {"a": [0], "b": [1]})["norm.weight"] == [1, 2, 3, 5]


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (nn.BatchNorm2d(3, affine=False), "reaches norm, a norm without affine parameters"),
        (nn.InstanceNorm2d(3, track_running_stats=True), "reaches norm, a norm without affine parameters"),
        (nn.GroupNorm(1, 3), "reaches norm, a GroupNorm, which mixes it with other channels"),
    ],
)
def test_norms_that_no_mask_silences_keep_the_filter(norm, reason):
    model = Join(lambda a, b: a + b, norm)
    plan = Plan({"a": [0], "b": [0, 1]})
    assert {name: found.tolist() for name, found in graph.dead_slices(model, plan).items()} == {
        "a.weight": [1], "a.bias": [1],
    }  # fmt: skip
    assert graph.unmaskable(model, plan) == {"a": {2: reason}, "b": {2: reason}}


def test_an_instance_norm_without_statistics_keeps_zero_at_zero():
    model = Join(lambda a, b: a, nn.InstanceNorm2d(3))
    assert graph.unmaskable(model, Plan({"a": [0]})) == {}


def test_a_norm_used_twice_is_masked_where_both_uses_are():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.norm = nn.Conv2d(1, 3, 1), nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.norm(self.a(x)) * self.norm(self.b(x))

    plan = Plan({"a": [0], "b": [0, 1]})
    assert graph.dead_slices(Twice(), plan)["norm.weight"].tolist() == [2]
    assert graph.unmaskable(Twice(), plan) == {"a": {1: "reaches norm, which other channels share"}}


def test_shared_and_parametrized_filters_stay():
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1))
    model[1].weight = model[0].weight
    assert graph.unmaskable(model, Plan({"0": [0]})) == {"0": {1: "shares its parameters with 1.weight"}}
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 2, 1)))
    assert graph.unmaskable(model, Plan({"0": [0]})) == {"0": {1: "has a parametrized weight"}}
    assert graph.dead_slices(model, Plan({"0": [0]})) == {}


def test_the_plan_is_checked_and_the_indices_are_sorted_int64():
    model = nn.Sequential(nn.Conv2d(1, 9, 1))
    found = graph.dead_slices(model, Plan({"0": [4]}))["0.weight"]
    assert found.dtype == np.int64
    assert (np.diff(found) > 0).all()
    with pytest.raises(ValueError, match="mask_: the model has no convolution named 'conv'"):
        graph.dead_slices(model, Plan({"conv": [0]}), "mask_")


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("def forward(self, x):\n    return open(x)", "may not use 'open'"),
        ("def forward(self, x):\n    return x.__class__", "may not use '__class__'"),
        ("def forward(self, x):\n    return getattr(x, '__class__')", "may not use '__class__'"),
        ("def forward(self, x):\n    return getattr(x, x)", "may not use '__getattr__'"),
        ("import os", r"may not import \['os'\]"),
        ("def forward(self, x):\n    return (lambda: x)()", "may not hold Lambda"),
        ("def forward(self, x):\n    return [y for y in x]", "may not hold ListComp"),
        ("def forward(self, x):\n    while x: x = x", "may not hold While"),
        ("def forward(self, x):\n    return f'{x}'", "may not hold JoinedStr"),
    ],
)
def test_generated_source_is_held_against_a_list(source, what):
    with pytest.raises(ValueError, match=what):
        graph.check_source("compact", source, {"getattr", "torch"})


def test_plain_generated_source_passes():
    graph.check_source(
        "compact", "def forward(self, x):\n    y = torch.relu(self.a(x)[:, 1:2]) + 1\n    return y", {"torch"}
    )
