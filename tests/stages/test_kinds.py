"""Kinds of layers: grouped, depthwise and transposed convolutions, norms, pools and activations, proved exact."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_compaction import randomised
from torch import nn

import pyprune as pp
from pyprune import graph, measure
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
        "groups" in why or "reaches" in why or "constant" in why for one in slim.kept.values() for why in one.values()
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
