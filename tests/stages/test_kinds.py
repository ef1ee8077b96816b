"""Kinds of layers: grouped, depthwise and transposed convolutions, norms, pools and activations, proved exact."""

import copy
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_compaction import randomised
from torch import nn

import pyprune as pp
from pyprune import baking, cutting, files, graph, kinds, measure
from pyprune.types import Plan
from tolerances import COMPACTED_FLOAT64


def zeroed(model, plan):
    """Zero what the masks zero, by hand: filters along their own dimension, and entries of norms."""
    twin = copy.deepcopy(model)
    for name, indices in graph.dead_slices(twin, plan).items():
        owner, leaf = twin.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        tensor = getattr(owner, leaf).data
        for index in indices.tolist():
            if "Transpose" in type(owner).__name__ and leaf == "weight":
                made, read = tensor.shape[1], tensor.shape[0] // owner.groups
                group = index // made
                tensor[group * read : (group + 1) * read, index % made] = 0
            else:
                tensor[index] = 0
    for name, keep in plan.keep.items():  # what the plan asks for, except what no mask can silence
        stays = graph.unmaskable(model, plan).get(name, {})
        dead = np.setdiff1d(np.arange(twin.get_submodule(name).out_channels), [*keep, *stays])
        assert set(dead) <= set(graph.dead_slices(model, plan).get(f"{name}.weight", np.zeros(0)).tolist())
    return twin


def assert_exact(model, plan, shape=(2, 2, 8, 8), **options):
    """Compact in float64 and compare on fresh inputs with the masked network; the model keeps every bit."""
    model, x = randomised(model).double(), torch.randn(shape, dtype=torch.float64)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    slim = pp.compact(model, plan, x, latency=False, **options)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    expected, found = zeroed(model, plan).eval(), copy.deepcopy(slim.model).eval()
    for batch in (x, torch.randn((shape[0] + 1, *shape[1:]), dtype=torch.float64)):
        want = expected(batch)
        assert want.std() > 0
        assert (found(batch) - want).abs().max() <= COMPACTED_FLOAT64 * max(1, want.abs().max())
    assert slim.certificate.max_difference <= COMPACTED_FLOAT64
    if options.get("residual", "scatter") == "scatter" and "round_to" not in options:
        analysis = pp.analyse(model, plan, x)
        assert analysis.parameters_left == sum(one.numel() for one in slim.model.parameters())
        for layer in analysis.layers:
            module = slim.model.get_submodule(layer.name)
            assert layer.parameters_left == sum(one.numel() for one in module.parameters())
            assert layer.inputs_left == getattr(module, "in_channels", None) or module.in_features
    return slim


def sizes(slim, *names):
    """Return inputs, outputs and groups of convolutions."""
    layers = [slim.model.get_submodule(name) for name in names]
    return [(layer.in_channels, layer.out_channels, layer.groups) for layer in layers]


def separable(inputs, outputs, stride=1, activation=nn.ReLU6, multiplier=1):
    wide = inputs * multiplier
    return nn.Sequential(
        nn.Conv2d(inputs, wide, 3, stride, 1, groups=inputs, bias=False), nn.BatchNorm2d(wide), activation(),
        nn.Conv2d(wide, outputs, 1, bias=False), nn.BatchNorm2d(outputs), activation(),
    )  # fmt: skip


def mobilenet(multiplier=1, activation=nn.ReLU6):
    """MobileNet v1 in small."""
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6), activation(),
        separable(6, 8, 1, activation, multiplier), separable(8, 10, 2, activation, multiplier),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 3),
    )  # fmt: skip


class Inverted(nn.Module):
    """A block of MobileNet v2: wide, depthwise, narrow, added to what came in."""

    def __init__(self, inputs, outputs, stride, expand):
        super().__init__()
        wide = inputs * expand
        self.expand, self.norm1 = nn.Conv2d(inputs, wide, 1, bias=False), nn.BatchNorm2d(wide)
        self.depth, self.norm2 = nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide)
        self.narrow, self.norm3 = nn.Conv2d(wide, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x):
        y = F.relu6(self.norm2(self.depth(F.relu6(self.norm1(self.expand(x))))))
        y = self.norm3(self.narrow(y))
        return x + y if self.adds else y


def mobilenet_v2():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU6(),
        Inverted(4, 6, 1, 2), Inverted(6, 6, 1, 3), Inverted(6, 8, 2, 2), Inverted(8, 8, 1, 2),
        nn.Conv2d(8, 12, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU6(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 3),
    )  # fmt: skip


def some(model, seed=0, kinds=(nn.Conv1d, nn.Conv2d, nn.Conv3d), share=0.5, only=lambda layer: True):
    """Keep a random share of the filters of every layer of ``kinds``."""
    rng = np.random.default_rng(seed)
    return Plan({
        name: np.sort(rng.choice(layer.out_channels, max(1, int(layer.out_channels * share)), replace=False))
        for name, layer in model.named_modules()
        if isinstance(layer, kinds) and only(layer)
    })  # fmt: skip


def dense(layer):
    return layer.groups == 1


def test_a_depthwise_filter_leaves_with_its_channel():
    model = mobilenet()
    plan = Plan({"0": [0, 3], "3.3": [1, 2, 7], "4.3": [4]})
    slim = assert_exact(model, plan)
    assert slim.kept == {}
    names = ("0", "3.0", "3.3", "4.0", "4.3")
    assert sizes(slim, *names) == [(2, 2, 1), (2, 2, 2), (2, 3, 1), (3, 3, 3), (3, 1, 1)]
    assert all(slim.model.get_submodule(name).bias is None for name in names)
    by_hand = 2 * 2 * 9 + 4 + 2 * 9 + 4 + 2 * 3 + 6 + 3 * 9 + 6 + 3 * 1 + 2 + 1 * 3 + 3
    assert sum(one.numel() for one in slim.model.parameters()) == by_hand


def test_mobilenet_v2_shrinks_to_the_last_filter():
    model = mobilenet_v2()
    plan = some(model, only=dense)
    slim = assert_exact(model, plan)
    assert slim.kept == {}
    for name, kept in plan.keep.items():
        assert slim.model.get_submodule(name).out_channels == len(kept)
        if name.endswith("expand"):
            depth = slim.model.get_submodule(name.replace("expand", "depth"))
            assert depth.groups == depth.in_channels == depth.out_channels == len(kept)


@pytest.mark.parametrize("multiplier", [1, 2, 3])
def test_depthwise_multipliers(multiplier):
    model = mobilenet(multiplier)
    slim = assert_exact(model, Plan({"0": [1, 2, 5], "3.3": [0, 7]}))
    assert slim.kept == {}
    assert sizes(slim, "3.0", "4.0") == [(3, 3 * multiplier, 3), (2, 2 * multiplier, 2)]
    assert_exact(model, some(model, multiplier))


def test_multipliers_stay_equal_over_all_channels():
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Conv2d(3, 9, 3, groups=3), nn.Conv2d(9, 2, 1))
    slim = assert_exact(model, Plan({"1": [0, 3, 4, 8]}))
    assert sizes(slim, "0", "1", "2") == [(2, 3, 1), (3, 6, 3), (6, 2, 1)]
    assert slim.kept == {"1": {1: "keeps the groups of 1 equal", 6: "keeps the groups of 1 equal"}}


def test_biases_of_depthwise_filters_are_masked_with_their_channel():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 1), nn.Sigmoid(), nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 2, 3, padding=1),
    )  # fmt: skip
    dead = graph.dead_slices(model, Plan({"0": [0, 2]}))
    names = {f"{layer}.{leaf}" for layer in "023" for leaf in ("weight", "bias")}
    assert {name: one.tolist() for name, one in dead.items()} == {name: [1, 3] for name in names}
    slim = assert_exact(model, Plan({"0": [0, 2]}))
    assert sizes(slim, "0", "2", "5") == [(2, 2, 1), (2, 2, 2), (2, 2, 1)]
    masks = pp.mask_(model, Plan({"0": [0, 2]}))
    assert model[2].bias[[1, 3]].tolist() == [0.0, 0.0]
    assert masks.zeros == 2 * (2 + 1 + 9 + 1 + 1 + 1)


def test_a_bias_that_no_mask_reaches_is_carried_forward():
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.depth, self.b = nn.Conv2d(2, 2, 1), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 2, 3)

        def forward(self, x):
            return self.b(torch.sigmoid(self.depth(F.pad(self.a(x), (0, 0, 0, 0, 0, 2)))))

    slim = assert_exact(Padded(), Plan({"a": [1]}))
    assert sizes(slim, "a", "depth", "b") == [(2, 1, 1), (1, 1, 1), (1, 2, 1)]
    model = Padded()
    model.b.padding = (1, 1)
    slim = assert_exact(model, Plan({"a": [1]}))  # the constants meet zeros at the border
    assert sizes(slim, "a", "depth", "b") == [(2, 2, 1), (4, 4, 4), (4, 2, 1)]


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 99), multiplier=st.integers(1, 2), activation=st.sampled_from([nn.ReLU6, nn.SiLU, nn.Sigmoid])
)
def test_any_plan_of_a_mobilenet(seed, multiplier, activation):
    torch.manual_seed(seed)
    model = mobilenet(multiplier, activation)
    slim = assert_exact(model, some(model, seed, share=0.6))
    assert all(
        "groups" in why or "reaches" in why or "constant" in why or "last channel" in why
        for one in slim.kept.values()
        for why in one.values()
    )


def test_groups_of_two_by_hand():
    model = nn.Sequential(
        nn.Conv2d(2, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 3, 1),
    )  # fmt: skip
    slim = assert_exact(model, Plan({"0": [0, 3, 4, 7], "3": [1, 2, 6, 7]}))
    assert sizes(slim, "0", "3", "6") == [(2, 4, 1), (4, 4, 2), (4, 3, 1)]
    assert slim.kept == {}
    slim = assert_exact(model, Plan({"0": [0, 3, 4, 5, 7], "3": [1, 2, 3, 6]}))
    assert sizes(slim, "0", "3", "6") == [(2, 6, 1), (6, 6, 2), (6, 3, 1)]
    assert slim.kept == {
        "0": {1: "keeps the groups of 3 equal"},
        "3": dict.fromkeys((4, 5), "keeps the groups of 3 equal"),
    }
    assert not slim.model.get_submodule("3").weight[4].any()  # it came back as zero


def test_whole_groups_leave_with_what_only_they_read():
    model = nn.Sequential(
        nn.Conv2d(2, 6, 1), nn.ReLU(), nn.Conv2d(6, 9, 3, groups=3), nn.ReLU(), nn.Conv2d(9, 2, 1),
    )  # fmt: skip
    slim = assert_exact(model, Plan({"0": [0, 4], "2": [0, 1, 8]}))
    assert sizes(slim, "0", "2", "4") == [(2, 2, 1), (2, 4, 2), (4, 2, 1)]
    assert slim.kept == {"2": {6: "keeps the groups of 2 equal"}}
    slim = assert_exact(model, Plan({"0": [4, 5], "2": [6, 8]}))
    assert sizes(slim, "0", "2", "4") == [(2, 2, 1), (2, 2, 1), (2, 2, 1)]  # one group left


def test_groups_over_dead_inputs_are_constant():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.Sigmoid(), nn.Conv2d(6, 2, 3),
    )  # fmt: skip
    slim = assert_exact(model, Plan({"0": [0, 1]}))
    assert sizes(slim, "0", "2", "4") == [(2, 2, 1), (2, 3, 1), (3, 2, 1)]
    model[4].padding = (1, 1)
    slim = assert_exact(model, Plan({"0": [0, 1]}))
    assert sizes(slim, "0", "2", "4") == [(2, 4, 1), (4, 6, 2), (6, 2, 1)]
    assert set(slim.kept["0"].values()) == {"keeps the groups of 2 equal"}


class Grouped(nn.Module):
    """Grouped convolutions of different groups behind one another, between sums."""

    def __init__(self, transposed=False):
        super().__init__()
        conv = nn.ConvTranspose2d if transposed else nn.Conv2d
        self.a, self.n1 = nn.Conv2d(2, 12, 3), nn.BatchNorm2d(12)
        self.b, self.n2 = conv(12, 12, 3, padding=1, groups=3), nn.BatchNorm2d(12)
        self.c, self.n3 = conv(12, 12, 3, padding=1, groups=2, bias=False), nn.BatchNorm2d(12)
        self.d, self.e = conv(12, 24, 3, padding=1, groups=12), nn.Conv2d(24, 2, 1)

    def forward(self, x):
        x = F.relu(self.n1(self.a(x)))
        y = F.relu(self.n2(self.b(x)))
        x = F.silu(self.n3(self.c(y))) + x
        return self.e(torch.sigmoid(self.d(x)))


@settings(max_examples=12, deadline=None)
@given(
    transposed=st.booleans(), mode=st.sampled_from(["scatter", "intersect"]), seed=st.integers(0, 999), data=st.data()
)
def test_any_plan_of_grouped_convolutions(transposed, mode, seed, data):
    torch.manual_seed(seed)
    model, keep = Grouped(transposed), {}
    for name, layer in graph.prunable(model).items():
        if name != "e" and data.draw(st.integers(0, 3), label=f"whether {name}"):
            share = data.draw(st.sampled_from([0.2, 0.5, 0.8]), label=name)
            rng = np.random.default_rng(seed)
            keep[name] = np.sort(rng.choice(layer.out_channels, max(1, int(layer.out_channels * share)), replace=False))
    assert_exact(model, Plan(keep), residual=mode)
    x = torch.randn(2, 2, 8, 8, dtype=torch.float64)
    promised = measure.profile(model, x, plan=Plan(keep), latency=False)
    real = measure.profile(pp.compact(model, Plan(keep), x, latency=False).model, x, latency=False)
    assert promised.macs == real.macs


def test_round_to_and_union_keep_groups_equal():
    torch.manual_seed(0)
    model = Grouped()
    plan = some(model, 3, only=lambda layer: layer.out_channels > 2)
    for options in ({"round_to": 2}, {"round_to": 3}, {"residual": "union"}):
        x = torch.randn(2, 2, 8, 8, dtype=torch.float64)
        slim = pp.compact(randomised(model).double(), plan, x, latency=False, **options)
        assert slim.certificate.max_difference <= COMPACTED_FLOAT64
        for name in plan.keep:
            assert slim.model.get_submodule(name).out_channels % options.get("round_to", 1) == 0


def between(*layers, padding=0, width=4):
    """Two convolutions with layers between them."""
    return nn.Sequential(nn.Conv2d(2, width, 1), *layers, nn.Conv2d(width, 2, 3, padding=padding))


def test_groups_of_a_group_norm_leave_as_wholes():
    for affine in (True, False):
        model = between(nn.GroupNorm(3, 6, affine=affine), nn.ReLU(), padding=1, width=6)
        slim = assert_exact(model, Plan({"0": [0, 2, 3]}))  # 1 | - | 4, 5
        reason = "reaches 1, a GroupNorm, which mixes it with other channels"
        assert slim.kept == {"0": {1: reason}}
        norm = slim.model.get_submodule("1")
        assert (norm.num_groups, norm.num_channels) == (2, 4)
        assert sizes(slim, "0", "3") == [(2, 4, 1), (4, 2, 1)]
        masks = pp.mask_(copy.deepcopy(model), Plan({"0": [0, 2, 3]}))
        assert masks.kept == {"0": {1: reason}}
        assert {name: one.tolist() for name, one in masks.dead.items()} == {
            name: [4, 5] for name in ("0.weight", "0.bias", *(("1.weight", "1.bias") if affine else ()))
        }


def test_a_group_norm_with_one_group_keeps_all_and_with_groups_of_one_loses_all():
    assert len(assert_exact(between(nn.GroupNorm(1, 4)), Plan({"0": [1]})).kept["0"]) == 3
    slim = assert_exact(between(nn.Sigmoid(), nn.GroupNorm(4, 4), padding=1), Plan({"0": [1]}))
    assert slim.kept == {}
    assert slim.model.get_submodule("2").num_groups == 1
    reason = "reaches 2, a GroupNorm, which mixes it with other channels"  # constants that rounding would turn up
    slim = assert_exact(between(nn.Sigmoid(), nn.GroupNorm(4, 4, affine=False)), Plan({"0": [1]}))
    assert set(slim.kept["0"].values()) == {reason}


def test_a_group_norm_over_a_sum():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.norm = (
                nn.Conv2d(2, 6, 1),
                nn.Conv2d(2, 6, 1),
                nn.Conv2d(6, 2, 3),
                nn.GroupNorm(3, 6),
            )

        def forward(self, x):
            return self.c(F.relu(self.norm(self.a(x) + self.b(x))))

    for mode in ("scatter", "intersect"):
        slim = assert_exact(Sum(), Plan({"a": [0, 1], "b": [1, 3]}), residual=mode)
        assert slim.model.norm.num_groups == 2
        assert all("a GroupNorm" in why or "reaches add" in why for one in slim.kept.values() for why in one.values())


NORMS = {
    "instance": (lambda: nn.InstanceNorm2d(4), None),
    "instance affine": (lambda: nn.InstanceNorm2d(4, affine=True), None),
    "instance with statistics": (lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True), None),
    "instance with statistics alone": (
        lambda: nn.InstanceNorm2d(4, track_running_stats=True), "reaches 1, a norm without affine parameters",
    ),
    "batch": (lambda: nn.BatchNorm2d(4), None),
    "batch without statistics": (lambda: nn.BatchNorm2d(4, track_running_stats=False), None),
    "batch without both": (lambda: nn.BatchNorm2d(4, affine=False, track_running_stats=False), None),
    "batch without affine": (lambda: nn.BatchNorm2d(4, affine=False), "reaches 1, a norm without affine parameters"),
    "layer": (lambda: nn.LayerNorm((4, 8, 8)), "reaches 1, a LayerNorm, which mixes it with other channels"),
    "layer of positions": (lambda: nn.LayerNorm((8, 8)), "reaches 1, a LayerNorm with a bias"),
    "layer of rows": (lambda: nn.LayerNorm(8, bias=False), None),
    "layer without affine": (lambda: nn.LayerNorm(8, elementwise_affine=False), None),
    "root mean square of rows": (lambda: nn.RMSNorm(8), None),
    "root mean square": (lambda: nn.RMSNorm((4, 8, 8)), "reaches 1, a RMSNorm, which mixes it with other channels"),
    "response": (lambda: nn.LocalResponseNorm(2), "reaches 1, a LocalResponseNorm, which mixes it with other channels"),
}  # fmt: skip


@pytest.mark.parametrize("case", NORMS)
def test_norms(case):
    build, reason = NORMS[case]
    slim = assert_exact(between(build(), nn.ReLU(), padding=1), Plan({"0": [1, 3]}))
    assert slim.kept == ({"0": {0: reason, 2: reason}} if reason else {})
    slim = assert_exact(between(nn.Sigmoid(), build()), Plan({"0": [1, 3]}))
    masked = case in ("instance affine", "instance with statistics", "batch", "batch without statistics")
    assert (slim.kept == {}) == masked


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 99),
    groups=st.sampled_from([1, 2, 3, 4, 6, 12]),
    affine=st.booleans(),
    share=st.floats(0.1, 0.9),
)
def test_any_plan_of_group_norms(seed, groups, affine, share):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(2, 12, 3, padding=1), nn.GroupNorm(groups, 12, affine=affine), nn.SiLU(),
        nn.Conv2d(12, 12, 3, padding=1, groups=3), nn.GroupNorm(4, 12), nn.ReLU(),
        nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.GroupNorm(6, 12), nn.ReLU(), nn.Conv2d(12, 2, 1),
    )  # fmt: skip
    assert_exact(model, some(model, seed, share=share, only=lambda layer: layer.out_channels > 2))


class Part(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


SHIFTED = {
    "sigmoid": nn.Sigmoid(), "softplus": nn.Softplus(), "hardsigmoid": nn.Hardsigmoid(), "exp": Part(torch.exp),
    "cos": Part(lambda x: x.cos()), "shifted": Part(lambda x: F.elu(x) + 1), "logsigmoid": nn.LogSigmoid(),
    "scaled": Part(lambda x: (x - 3) / 2),
}  # fmt: skip


@pytest.mark.parametrize("case", SHIFTED)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_constants_of_activations_are_folded_where_the_border_sees_them_too(case, groups):
    for mode, padding in (("zeros", 0), ("reflect", 1), ("replicate", 1), ("circular", 1)):
        model = nn.Sequential(
            nn.Conv2d(2, 4, 1), SHIFTED[case],
            nn.Conv2d(4, 4, 3, 1, padding, groups=groups, padding_mode=mode, bias=False), SHIFTED[case],
            nn.Flatten(), nn.Linear(4 * (36 if padding == 0 else 64), 2),
        )  # fmt: skip
        slim = assert_exact(model, Plan({"0": [1, 2], "2": [0, 3]}))
        assert sizes(slim, "0") == [(2, 2 if groups < 4 else 1, 1)]  # what only dead filters read leaves as well
        if groups < 4:
            assert slim.kept == {}
            assert slim.model.get_submodule("5").in_features == model[5].in_features // 2
    model = between(SHIFTED[case], padding=1)
    slim = assert_exact(model, Plan({"0": [1, 2]}))
    assert all("which pads with zeros" in why for why in slim.kept["0"].values())


POOLS = {
    "average": (nn.AvgPool2d(2), None),
    "average, ceiling": (nn.AvgPool2d(3, 2, ceil_mode=True), None),
    "average, padding": (nn.AvgPool2d(3, 2, 1), "into _2, which averages it with padding"),
    "average, padding that does not count": (nn.AvgPool2d(3, 2, 1, True, False), None),
    "average, divisor": (nn.AvgPool2d(3, 1, divisor_override=2), None),
    "average, divisor and ceiling": (
        nn.AvgPool2d(3, 2, ceil_mode=True, divisor_override=5), "into _2, whose last windows are smaller",
    ),
    "average, function": (Part(lambda x: F.avg_pool2d(x, 3, 2, 1, True, False)), None),
    "average, function with a divisor": (Part(lambda x: F.avg_pool2d(x, (2, 3), divisor_override=7)), None),
    "power": (nn.LPPool2d(2, 3, ceil_mode=True), "into _2, which adds up its powers"),
    "maximum": (nn.MaxPool2d(3, 2, 1, ceil_mode=True), None),
    "adaptive": (nn.AdaptiveAvgPool2d((3, None)), None),
    "adaptive maximum": (nn.AdaptiveMaxPool2d(5), None),
    "nearest": (nn.Upsample(scale_factor=2), None),
    "bilinear": (nn.Upsample(scale_factor=1.7, mode="bilinear"), None),
    "bicubic": (nn.Upsample(size=(9, 5), mode="bicubic", align_corners=True), None),
    "zeros around": (nn.ZeroPad2d((1, 0, 2, 1)), "carries a constant into 2, which pads with 0"),
    "cropped": (nn.ZeroPad2d((-1, 0, -2, 0)), None),
    "halves around": (nn.ConstantPad2d(1, 0.5), None),
    "mirrored": (nn.ReflectionPad2d(2), None),
    "repeated": (nn.ReplicationPad2d((0, 1, 1, 0)), None),
    "round": (nn.CircularPad2d(1), None),
    "softmax over channels": (nn.Softmax2d(), "feeds 2 (Softmax2d), which pyprune does not know"),
}  # fmt: skip


@pytest.mark.parametrize("case", POOLS)
def test_pools_and_paddings_of_constants(case):
    pool, reason = POOLS[case]
    slim = assert_exact(between(nn.Sigmoid(), pool), Plan({"0": [1, 3]}), (2, 2, 12, 10))
    if reason is None:
        assert slim.kept == {}
        assert slim.model.get_submodule("3").bias is not None
    else:
        assert all(reason in why for why in slim.kept["0"].values())
        assert len(slim.kept["0"]) == 2
    if "softmax" not in case:
        slim = assert_exact(between(nn.ReLU(), pool, padding=1), Plan({"0": [1, 3]}), (2, 2, 12, 10))
        assert (slim.kept == {}) == (case != "halves around")


class Many(nn.Module):
    """Every kind of layer of a number of dimensions."""

    def __init__(self, dims):
        super().__init__()
        conv, up = getattr(nn, f"Conv{dims}d"), getattr(nn, f"ConvTranspose{dims}d")
        self.stem, self.n1 = conv(2, 8, 3, padding=1), getattr(nn, f"BatchNorm{dims}d")(8)
        self.depth, self.n2 = conv(8, 16, 3, padding=1, groups=8, bias=False), nn.GroupNorm(4, 16)
        self.grouped, self.n3 = conv(16, 12, 3, groups=2), getattr(nn, f"InstanceNorm{dims}d")(12, affine=True)
        self.pad, self.pool = getattr(nn, f"ReplicationPad{dims}d")(1), getattr(nn, f"LPPool{dims}d")(2, 2)
        self.up = up(12, 12, 3, stride=2, padding=1, output_padding=1, groups=3)
        self.up2, self.rows = up(12, 4, 2, bias=False), nn.LayerNorm(9, bias=False)
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        x = F.relu(self.n1(self.stem(x)))
        x = F.silu(self.n2(self.depth(x)))
        x = self.pool(self.pad(torch.tanh(self.n3(self.grouped(x)))))
        x = self.rows(self.up2(torch.tanh(self.up(x))))
        return self.linear(x.mean(tuple(range(2, len(self.up2.kernel_size) + 2))))


TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_every_number_of_dimensions(dims):
    torch.manual_seed(dims)
    model = Many(dims)
    plan = Plan({"stem": [0, 1, 4, 5], "grouped": [0, 1, 4, 6, 8, 10], "up": [0, 5, 8], "up2": [1, 3]})
    slim = assert_exact(model, plan, (2, 2, *[8] * dims))
    assert slim.kept == {}
    names = ("stem", "depth", "grouped", "up", "up2")
    assert sizes(slim, *names) == [(2, 4, 1), (4, 8, 4), (8, 6, 2), (6, 3, 3), (3, 2, 1)]
    kernel = 3**dims
    convolutions = 4 * 2 * kernel + 4 + 8 * kernel + 6 * 4 * kernel + 6 + 6 * kernel + 3 + 3 * 2 * 2**dims
    assert slim.after.parameters == convolutions + 8 + 16 + 12 + 9 + 2 * 3 + 3
    assert_exact(model, some(model, dims, (*CONVOLUTIONS, *TRANSPOSED)), (2, 2, *[8] * dims))


def test_transposed_convolutions_by_hand():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ConvTranspose2d(2, 3, 2, 2), nn.ReLU(), nn.Conv2d(3, 1, 1)).eval()
    plan = Plan({"0": [1], "1": [0, 2]})
    weight = model[1].weight.detach().clone()
    dead = graph.dead_slices(model, plan)
    assert dead["1.weight"].tolist() == dead["1.bias"].tolist() == [1]
    slim = assert_exact(model.double(), plan, (2, 1, 8, 8))
    assert sizes(slim, "0", "1", "3") == [(1, 1, 1), (1, 2, 1), (2, 1, 1)]
    assert torch.equal(slim.model.get_submodule("1").weight, weight[1:, [0, 2]].double())
    masks = pp.mask_(model, plan)
    assert masks.zeros == 1 + 1 + 2 * 4 + 1
    assert model[1].weight[:, 1].abs().max() == 0
    assert torch.equal(model[1].weight[:, [0, 2]], weight[:, [0, 2]].double())
    with torch.no_grad():
        model[1].weight += 1
    masks.reapply()
    assert model[1].weight[:, 1].abs().max() == 0


def test_filters_of_grouped_transposed_convolutions_are_zeroed_in_their_group():
    model = nn.Sequential(nn.ConvTranspose1d(4, 6, 3, groups=2))
    pp.mask_(model, Plan({"0": [0, 1, 3, 5]}))
    x = torch.randn(2, 4, 5)
    zero = [i for i in range(6) if not model(x)[:, i].any()]
    assert zero == [2, 4]
    assert model[0].weight.count_nonzero() == 4 * 2 * 3
    assert not model[0].weight[:2, 2].any()
    assert not model[0].weight[2:, 1].any()


def test_constants_into_transposed_convolutions():
    for kernel, stride, folds in ((1, 1, True), (2, 2, False), (3, 1, False)):
        model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.Sigmoid(), nn.ConvTranspose2d(4, 2, kernel, stride))
        slim = assert_exact(model, Plan({"0": [0]}))
        reason = "carries the constant 0.5 into 2, whose borders see other values"
        assert slim.kept == ({} if folds else {"0": {1: reason, 2: reason, 3: reason}})


def test_a_size_for_a_transposed_convolution():
    class Sized(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.down, self.up = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, 2), nn.ConvTranspose2d(4, 4, 3, 2)
            self.last = nn.Conv2d(4, 2, 1)

        def forward(self, x):
            x = self.a(x)
            return self.last(F.relu(self.up(self.down(x), output_size=x.shape[2:])))

    slim = assert_exact(Sized(), Plan({"a": [1], "down": [0, 3], "up": [2]}))
    assert slim.kept == {}
    assert sizes(slim, "a", "down", "up") == [(2, 1, 1), (1, 2, 1), (2, 1, 1)]


WITHOUT_PYPRUNE = """
import importlib.util, sys
sys.modules["pyprune"] = None
from safetensors.torch import load_file, save_file
for folder in sys.argv[1:]:
    spec = importlib.util.spec_from_file_location("slim_model", folder + "/slim_model.py")
    slim_model = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(slim_model)
    found = slim_model.load()(load_file(folder + "/x.safetensors")["x"])
    save_file({"found": found.contiguous()}, folder + "/found.safetensors")
"""


def test_the_slim_folder_holds_every_kind(tmp_path):
    torch.manual_seed(0)
    networks = {f"many {dims}": (Many(dims), (2, 2, *[8] * dims)) for dims in (1, 2, 3)}
    networks |= {"mobilenet": (mobilenet_v2(), (2, 2, 8, 8)), "grouped": (Grouped(), (2, 2, 8, 8))}
    networks |= {"transposed": (Grouped(transposed=True), (2, 2, 8, 8))}
    for case, (pool, _) in POOLS.items():
        if not isinstance(pool, Part) and "divisor" not in case:
            networks[case] = (between(nn.Sigmoid(), copy.deepcopy(pool)), (2, 2, 12, 10))
    for case, (norm, _) in NORMS.items():
        networks[case] = (between(norm(), nn.ReLU()), (2, 2, 8, 8))
    expected = {}
    for name, (model, shape) in networks.items():
        x = torch.randn(shape)
        plan = some(randomised(model), 1, (*CONVOLUTIONS, *TRANSPOSED), only=lambda layer: layer.out_channels > 2)
        slim = pp.compact(model, plan, x, latency=False, verify=False)
        place = pp.save_slim(slim, tmp_path / name)
        expected[name] = slim.model.eval()(x)
        assert torch.equal(pp.load_slim(place)(x), expected[name])
        files.write_tensors(place / "x.safetensors", {"x": x}, {})
    run = [sys.executable, "-c", WITHOUT_PYPRUNE, *(str(tmp_path / name) for name in networks)]
    subprocess.run(run, check=True, timeout=120)
    for name, outputs in expected.items():
        found, _ = files.read_tensors("test", tmp_path / name / "found.safetensors")
        assert torch.equal(found["found"], outputs)
    source = (tmp_path / "many 2" / "slim_model.py").read_text()
    assert "self.up = nn.ConvTranspose2d(" in source
    assert "groups=" in source
    assert "nn.GroupNorm(" in source


def computed(kind):
    """Return a model whose weights are computed, in training mode, with some history behind it."""
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 1)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch advises against its older hooks
        for i in (0, 3):
            if kind == "masks":
                nn.utils.prune.random_unstructured(model[i], "weight", 0.3)
            else:
                kind(model[i])
        model(torch.randn(2, 2, 8, 8)).sum().backward()
    return model


KINDS = {
    "weight norm": nn.utils.parametrizations.weight_norm, "older weight norm": nn.utils.weight_norm,
    "spectral norm": nn.utils.parametrizations.spectral_norm, "older spectral norm": nn.utils.spectral_norm,
    "orthogonal": nn.utils.parametrizations.orthogonal, "masks": "masks",
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("case", KINDS)
def test_computed_weights_are_computed_once_on_a_copy(case):
    torch.manual_seed(0)
    model = computed(KINDS[case])
    model[0].bias.requires_grad_(False)
    for one in model[3].parameters():
        one.requires_grad_(False)
    randomised(model)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    x = torch.randn(2, 2, 8, 8)
    plain = baking.baked(model)
    assert plain is not model
    assert model.training
    assert all(module.training for module in plain.modules())
    assert not any(graph.is_changed(module) for module in plain.modules())
    model.eval()
    want = model(x).detach()
    assert torch.allclose(plain.eval()(x), want, rtol=0, atol=1e-6 * float(want.abs().max()))
    model.train()
    plan = Plan({"0": [1, 2], "3": [0, 2, 5]})
    slim = pp.compact(model, plan, x, latency=False)
    assert slim.kept == {}
    assert sizes(slim, "0", "3", "5") == [(2, 2, 1), (2, 3, 1), (3, 2, 1)]
    want = zeroed(plain, plan).eval()(x).detach()
    assert torch.allclose(slim.model.eval()(x), want, rtol=0, atol=1e-5 * max(1, float(want.abs().max())))
    layers = [slim.model.get_submodule(name) for name in ("0", "3")]
    trains = [(layer.weight.requires_grad, layer.bias.requires_grad) for layer in layers]
    assert trains == [(True, False), (False, False)]
    assert model.training
    after = model.state_dict()
    assert all(torch.equal(one, before[name]) for name, one in after.items())
    assert pp.analyse(model, plan, x).parameters_left == sum(one.numel() for one in slim.model.parameters())


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def test_other_parametrizations_and_hooks_keep_their_layers():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 1))
    nn.utils.parametrize.register_parametrization(model[1], "weight", Doubled())
    slim = assert_exact(model, Plan({"0": [0]}))
    assert set(slim.kept["0"].values()) == {"feeds 1, which has a parametrized weight"}
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 1))
    model[1].register_forward_hook(lambda module, args, output: output + 1)
    slim = assert_exact(model, Plan({"0": [0]}))
    assert set(slim.kept["0"].values()) == {"feeds 1, which has a forward hook"}


def lazy():
    return nn.Sequential(nn.LazyConv2d(4, 3), nn.Conv2d(4, 2, 1))


def on_meta():
    with torch.device("meta"):
        return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 2, 1))


def quantised():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 2, 1), nn.Flatten(), nn.Linear(72, 2))
    model[3] = type("Linear", (nn.Module,), {"__module__": "torch.ao.nn.quantized.dynamic.modules.linear"})()
    return model


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lazy, "'0.weight' has no shape yet, since its lazy layer has seen no data. Run the model"),
        (on_meta, "'0.weight' lies on the meta device, without values. Load the weights first"),
        (lambda: nn.Sequential(nn.Conv2d(2, 4, 3, dtype=torch.complex64)), "'0.weight' is complex .complex64"),
        (quantised, "'3' is a quantised Linear, whose weights cannot be cut. Compact the model in floating point"),
    ],
)  # fmt: skip
def test_models_that_cannot_be_cut_are_refused(build, message):
    for call in (pp.compact, pp.analyse):
        with pytest.raises(ValueError, match=f"^{call.__name__}: .*{message}"):
            call(build(), Plan({"0": [0]}), torch.randn(1, 2, 8, 8))


BAD = {
    "out of range": (lambda: Plan({"0": [0, 4]}), ValueError, "compact: '0' has filters 0 to 3; the plan keeps 4"),
    "negative": (lambda: Plan({"0": [-1]}), ValueError, "Plan: '0' needs indices from 0; got -1"),
    "doubled": (lambda: Plan({"0": [1, 1]}), ValueError, "Plan: '0' names a filter twice"),
    "empty": (lambda: Plan({"0": []}), ValueError, "Plan: '0' keeps no filter; keep at least one"),
    "boolean": (lambda: Plan({"0": [True, False, True]}), TypeError, r"got bool of shape \[3\]\. Pass np\.flatnonzero"),
    "nested": (lambda: Plan({"0": [[0], [1]]}), TypeError, "Plan: '0' needs a flat list of filter indices"),
    "fractions": (lambda: Plan({"0": [0.5]}), TypeError, "Plan: '0' needs a flat list of filter indices; got float64"),
    "missing": (lambda: Plan({"conv1": [0]}), ValueError, "compact: the model has no convolution named 'conv1'"),
    "a norm": (lambda: Plan({"1": [0]}), ValueError, "compact: the model has no convolution named '1'"),
    "a linear layer": (lambda: Plan({"4": [0]}), ValueError, "compact: the model has no convolution named '4'"),
    "another model": (lambda: Plan({"0": [0]}, filters={"0": 8}), ValueError, "'0' has 4 filters here and 8 in"),
    "transposed, out of range": (lambda: Plan({"2": [3]}), ValueError, "'2' has filters 0 to 2; the plan keeps 3"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_plans_leave_the_model_as_it_is(case):
    build, error, message = BAD[case]
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 3, 3), nn.Flatten(), nn.Linear(3 * 64, 2)
    )
    model[1].eval()
    before, flags = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    with pytest.raises(error, match=message):
        pp.compact(model, build(), torch.randn(1, 2, 8, 8), latency=False)
    for x in (torch.randn(1, 3, 8, 8), torch.randn(2, 8), torch.randn(1, 2, 9, 9), torch.zeros(1, 2, 8, 8).long()):
        with pytest.raises(ValueError, match=r"compact: Sequential does not accept example_inputs of .*Pass one batch"):
            pp.compact(model, Plan({"0": [0]}), x, latency=False)
    assert flags == [module.training for module in model.modules()]
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


@pytest.mark.parametrize("wrong", ["groups", "weight", "fold", "balance"])
def test_a_wrong_cut_is_noticed(monkeypatch, wrong):
    """Each part of the work on groups is disturbed in turn, and the proof must fail."""
    count, fold, cut = cutting._count, kinds.folded, cutting._cut_weight

    def rolled(slim, *args):
        cut(slim, *args)
        slim.weight.data = slim.weight.data.roll(1, 0)

    if wrong == "groups":
        monkeypatch.setattr(cutting, "_count", lambda module, groups: count(module, 1))
    elif wrong == "weight":
        monkeypatch.setattr(cutting, "_cut_weight", rolled)
    elif wrong == "fold":
        monkeypatch.setattr(kinds, "folded", lambda *args: fold(*args) * (1 + 1e-6))
    else:
        monkeypatch.setattr(kinds, "balance", lambda walk, leaves: False)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 1), nn.Sigmoid(), nn.Conv2d(6, 6, 3, groups=2), nn.Sigmoid(), nn.Conv2d(6, 2, 1)
    ).double()
    with pytest.raises((RuntimeError, ValueError)):
        pp.compact(model, Plan({"0": [0, 1, 4], "2": [0, 4, 5]}), torch.randn(1, 2, 8, 8).double(), latency=False)
