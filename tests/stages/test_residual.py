"""Sums of branches that lose different channels: scatter, intersect and union, paddings and slices, proved exact."""

import copy
import operator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_compaction import half, masked, randomised
from torch import nn

import pyprune as pp
from pyprune import channels, graph, measure, rewiring
from pyprune.types import Plan
from tolerances import COMPACTED_FLOAT64, TRAINED_FLOAT64

MODES = ("scatter", "intersect", "union")


class Basic(nn.Module):
    """Two convolutions around a shortcut: none, zero channels on both sides, or a projection."""

    def __init__(self, inputs, outputs, stride=1, project=False):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)
        self.pad, self.stride = (outputs - inputs) // 2, stride
        self.project = (
            nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)) if project else None
        )

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.project is not None:
            x = self.project(x)
        elif self.pad or self.stride > 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(y + x)


class PreActivation(nn.Module):
    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.pad, self.stride = (outputs - inputs) // 2, stride

    def forward(self, x):
        y = self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
        return F.pad(x[..., :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad), value=0.0) + y


class Three(nn.Module):
    """Three branches, added in two ways, one of them in place."""

    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.a, self.b = nn.Conv2d(inputs, outputs, 3, stride, 1), nn.Conv2d(inputs, outputs, 1, stride)
        self.c, self.norm = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)

    def forward(self, x):
        y = self.a(x)
        y += self.norm(self.c(x))
        return F.relu(torch.add(self.b(x), y))


class Net(nn.Module):
    def __init__(self, *blocks, width=6, last=8):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, width, 3, padding=1), nn.BatchNorm2d(width)
        self.blocks, self.linear = nn.Sequential(*blocks), nn.Linear(last, 3)

    def forward(self, x):
        return self.linear(self.blocks(F.relu(self.norm(self.stem(x)))).mean((2, 3)))


def last(width):
    return nn.Sequential(nn.BatchNorm2d(width), nn.ReLU())


NETS = {
    "option A": lambda: Net(Basic(6, 6), Basic(6, 6), Basic(6, 12, 2), Basic(12, 12), last=12),
    "projection": lambda: Net(Basic(6, 6), Basic(6, 8, 2, project=True), Basic(8, 8), Basic(8, 8)),
    "pre-activation": lambda: Net(
        PreActivation(6, 6), PreActivation(6, 12, 2), PreActivation(12, 12), last(12), last=12
    ),
    "three branches": lambda: Net(Three(6, 8), Three(8, 8, 2), Basic(8, 8), Three(8, 8)),
}  # fmt: skip


def carried_out(model, slim):
    """Return the plan that was carried out: the given one, and what a union removes beyond it."""
    if not slim.lossy:
        return slim.plan
    keep = dict(slim.plan.keep)
    for name, more in slim.beyond.items():
        every = keep.get(name, np.arange(graph.convolutions(model)[name].out_channels))
        left = np.setdiff1d(every, more)
        keep[name] = left if len(left) else every  # all that it keeps is without effect: masked or not
    return Plan(keep)


def assert_exact(model, plan, shape=(2, 2, 8, 8), **options):
    """Compact in float64 and compare on fresh inputs with the masked network; return what compact returned."""
    model, x = randomised(model).double(), torch.randn(shape, dtype=torch.float64)
    slim = pp.compact(model, plan, x, latency=False, **options)
    expected, found = masked(model, carried_out(model, slim)).eval(), copy.deepcopy(slim.model).eval()
    for batch in (x, torch.randn((shape[0] + 1, *shape[1:]), dtype=torch.float64)):
        want = expected(batch)
        assert want.std() > 0
        assert (found(batch) - want).abs().max() <= COMPACTED_FLOAT64 * max(1, want.abs().max())
    assert slim.certificate.max_difference <= COMPACTED_FLOAT64
    return slim


def calls(slim, function):
    return sum(node.target is function for node in slim.model.graph.nodes)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("net", NETS)
def test_nets_equal_their_masked_twins(net, mode):
    torch.manual_seed(0)
    for seed in range(3):
        model = NETS[net]()
        plan = half(model, seed)
        slim = assert_exact(model, plan, residual=mode)
        assert slim.residual == mode
        layers = graph.convolutions(model)
        for name, kept in carried_out(model, slim).keep.items():
            stays = len(kept) + len(slim.kept.get(name, {}))
            assert slim.model.get_submodule(name).out_channels == stays
            assert layers[name].out_channels > len(plan.keep[name])
        if mode == "scatter":
            assert slim.kept == {}
            assert calls(slim, torch.index_add) > 0
            assert not slim.lossy
        else:
            assert calls(slim, torch.index_add) == 0
            assert slim.lossy == (mode == "union")


def test_a_stream_and_its_branches_by_hand():
    model = Net(Basic(6, 6), last=6)
    plan = Plan({"stem": [0, 1], "blocks.0.conv1": [2], "blocks.0.conv2": [1, 4]})
    slim = assert_exact(model, plan)
    assert slim.model.stem.out_channels == 2
    assert slim.model.get_submodule("blocks.0.conv1").weight.shape[:2] == (1, 2)
    assert slim.model.get_submodule("blocks.0.conv2").weight.shape[:2] == (2, 1)
    assert slim.model.linear.in_features == 3
    assert [node.args[1] for node in slim.model.graph.nodes if node.target is F.pad] == [(0, 0, 0, 0, 1, 0)]
    assert slim.model.add_index.tolist() == [0, 1]
    slim = assert_exact(model, Plan({"stem": [2, 3], "blocks.0.conv2": [1, 4]}))
    assert slim.model.add_grown.tolist() == [0, 2, 2, 1]
    assert slim.model.add_index.tolist() == [1, 2]
    slim = assert_exact(model, Plan({"blocks.0.conv2": [1, 4]}))
    assert slim.model.add_index.tolist() == [1, 4]
    assert calls(slim, F.pad) == 0
    slim = assert_exact(model, Plan({"stem": [1, 4], "blocks.0.conv2": [1, 4]}))
    assert calls(slim, operator.add) == 1
    assert slim.model.linear.in_features == 2


def test_a_stream_without_its_stem_and_a_branch_of_one_filter():
    model = NETS["option A"]()
    for plan in (Plan({"stem": [3]}), Plan({"stem": [0], "blocks.1.conv2": [5], "blocks.2.conv2": [11]})):
        for mode in ("scatter", "intersect"):
            assert_exact(model, plan, residual=mode)
    slim = assert_exact(model, Plan({f"blocks.{i}.conv2": [0] for i in range(4)}))
    assert [slim.model.get_submodule(f"blocks.{i}.conv2").out_channels for i in range(4)] == [1] * 4
    assert slim.kept == {}


def test_intersect_rewrites_the_padding_and_scatter_drops_it():
    model = NETS["option A"]()
    plan = Plan({"blocks.2.conv2": [1, 4, 5, 9], "blocks.3.conv2": [1, 5, 9, 10]})
    slim = assert_exact(model, plan, residual="intersect")
    pads = [node.args[1] for node in slim.model.graph.nodes if node.target is F.pad]
    assert pads == [(0, 0, 0, 0, 1, 2)]  # 1 | 3 to 8 | 9, 10
    assert slim.model.linear.in_features == 9
    pads = [node.args[1] for node in assert_exact(model, plan).model.graph.nodes if node.target is F.pad]
    assert (0, 0, 0, 0, 3, 3) not in pads


class Slices(nn.Module):
    def __init__(self, take):
        super().__init__()
        self.a, self.b, self.take = nn.Conv2d(2, 8, 3), nn.Conv2d(4, 2, 1), take
        self.whole = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = self.a(x)
        return self.b(self.take(x)) + self.whole(x).mean()


@pytest.mark.parametrize(
    ("take", "kept", "index", "selects"),
    [
        (lambda x: x[:, 2:6], [0, 2, 5, 7], slice(1, 3, 1), 0),
        (lambda x: x[:, ::2, 1:, :-1], [1, 2, 4, 5], slice(1, 3, 1), 0),
        (lambda x: x[:, :-4], [0, 1, 2, 3, 7], slice(0, 4, 1), 0),
        (lambda x: x[..., 1:-1, ::2][:, 4:], [4, 5, 6, 7], slice(None), 0),
        (lambda x: x[:, ::2], [0, 1, 3, 5, 6], slice(0, 5, 4), 0),
        (lambda x: F.pad(x, (0, 0, 0, 0, 1, 3))[:, ::3], [0, 2, 3, 5, 6], None, 1),
    ],
)
def test_slices_of_channels_follow_what_is_left(take, kept, index, selects):
    slim = assert_exact(Slices(take), Plan({"a": kept}))
    assert slim.kept == {}
    assert calls(slim, torch.index_select) <= selects
    cuts = [node.args[1] for node in slim.model.graph.nodes if node.target is operator.getitem]
    assert index is None or cuts[-1][1] == index


def test_a_tensor_keeps_its_last_channel():
    slim = assert_exact(Slices(lambda x: x[:, :4]), Plan({"a": [5, 6]}))
    assert slim.kept == {"a": {0: "is the last channel of getitem"}}


PADS = {
    "space": (lambda x: F.pad(x, (1, 1, 2, 0)), None),
    "space and channels": (lambda x: F.pad(x, (1, 1, -1, 0, 2, 1)), None),
    "reflected": (lambda x: F.pad(torch.sigmoid(x), (1, 1, 1, 1), mode="reflect"), None),
    "cropped": (lambda x: F.pad(torch.sigmoid(x), (-1, -1)), None),
    "a constant that fits": (lambda x: F.pad(torch.sigmoid(x), (1, 1, 1, 1, 1, 0), value=0.5), None),
    "a constant that does not": (
        lambda x: F.pad(torch.sigmoid(x), (1, 1)), "carries a constant into pad, which pads with 0",
    ),
    "fewer channels": (lambda x: F.pad(x, (0, 0, 0, 0, -1, 2)), "feeds a padding that pyprune does not know"),
    "the batch": (lambda x: F.pad(x, (0, 0, 0, 0, 0, 0, 0, 1)), "feeds a padding that pyprune does not know"),
}  # fmt: skip


@pytest.mark.parametrize("case", PADS)
def test_paddings_of_space_and_of_channels(case):
    function, reason = PADS[case]

    class Pads(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv2d(2, 4, 3)
            self.b = nn.Conv2d(function(torch.zeros(2, 4, 6, 6)).shape[1], 3, 1)

        def forward(self, x):
            return self.b(function(self.a(x)))

    slim = assert_exact(Pads(), Plan({"a": [1, 3]}))
    assert slim.kept == ({"a": {0: reason, 2: reason}} if reason else {})
    if "channels" in case and not reason:
        assert slim.model.b.in_channels == 2  # zero channels need no place


def test_a_constant_into_a_sum_stays_where_the_other_side_does():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(i, 4, 1) for i in (2, 2, 4))

        def forward(self, x):
            return self.c(torch.sigmoid(self.a(x)) + self.b(x))

    slim = assert_exact(Shifted(), Plan({"a": [0], "b": [0, 1], "c": [0, 1, 2, 3]}))
    assert slim.kept == {"a": {1: "carries a constant other than 0 into add, where b keeps its channel"}}
    assert slim.model.c.in_channels == 2
    assert slim.model.c.bias is not None


def test_an_overwritten_stream_keeps_its_sides_together():
    class Overwrites(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(i, 4, 1) for i in (2, 2, 4))

        def forward(self, x):
            y = self.a(x)
            z = y.add_(self.b(x))
            return self.c(F.relu(y)) + self.c.weight.sum() * z.mean()

    slim = assert_exact(Overwrites(), Plan({"a": [0], "b": [1]}))
    assert slim.model.a.out_channels == slim.model.b.out_channels == 4

    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            x = self.a(x)
            return self.b(x[:, :, ::2].sigmoid_()).mean() + self.c(x)

    slim = assert_exact(Views(), Plan({"a": [0, 1]}))
    assert slim.kept["a"][2] == "is overwritten through getitem, a view of it"


def test_a_union_says_what_it_costs():
    model = NETS["option A"]()
    plan = Plan({"stem": [0, 1, 2, 3], "blocks.0.conv2": [0, 1, 4, 5]})
    slim = assert_exact(model, plan, residual="union")
    assert {name: found.tolist() for name, found in slim.beyond.items()} == {
        "stem": [2, 3], "blocks.0.conv2": [4, 5], "blocks.1.conv2": [2, 3, 4, 5], "blocks.2.conv2": [5, 6, 7, 8],
        "blocks.3.conv2": [5, 6, 7, 8],
    }  # fmt: skip
    analysis = pp.analyse(model, plan, torch.randn(1, 2, 8, 8, dtype=torch.float64), residual="union")
    assert analysis.lossy
    assert analysis.parameters_left == sum(one.numel() for one in slim.model.parameters())
    assert "removed beyond the plan 2 (2, 3)" in str(analysis)
    assert "lossy" in str(analysis)
    assert analysis.to_json()["layers"][0]["beyond"] == (2, 3)
    other = masked(model, plan).eval()
    x = torch.randn(2, 2, 8, 8, dtype=torch.float64)
    assert (slim.model.eval()(x) - other(x)).abs().max() > 1e-6  # which is what lossy means


def test_a_union_never_empties_a_layer_and_leaves_outputs_alone():
    model = Net(Basic(6, 6), last=6)
    slim = assert_exact(model, Plan({"stem": [0, 1, 2], "blocks.0.conv2": [3, 4, 5]}), residual="union")
    assert slim.model.stem.out_channels == slim.model.get_submodule("blocks.0.conv2").out_channels == 2
    assert slim.kept["stem"] == {3: "reaches add, where blocks.0.conv2 keeps its channel"}

    class Out(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(2, 4, 1), nn.Conv2d(2, 4, 1)

        def forward(self, x):
            return self.a(x) + self.b(x)

    slim = assert_exact(Out(), Plan({"a": [0, 1]}), residual="union")
    assert not slim.lossy
    assert slim.model.b.out_channels == 4


def test_a_union_leaves_a_filter_in_a_layer_that_the_plan_does_not_name():
    class Sliced(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(2, 6, 1), nn.Conv2d(2, 3, 1), nn.Conv2d(3, 2, 1)

        def forward(self, x):
            y = self.a(x)
            return self.c(F.relu(y[:, :3] + self.b(x))) + y[:, 3:].sum(1, keepdim=True)

    slim = assert_exact(Sliced(), Plan({"a": [3, 4, 5]}), residual="union")  # b's three filters are all tied to a's
    assert slim.model.b.out_channels == 1
    assert slim.model.a.out_channels == 4


def test_round_to_brings_back_filters_in_every_mode():
    for mode in MODES:
        model = NETS["projection"]()
        slim = assert_exact_rounded(model, half(model), mode)
        for name in graph.convolutions(model):
            assert slim.model.get_submodule(name).out_channels % 2 == 0


def assert_exact_rounded(model, plan, mode):
    x = torch.randn(2, 2, 8, 8, dtype=torch.float64)
    slim = pp.compact(randomised(model).double(), plan, x, residual=mode, round_to=2, latency=False)
    assert slim.certificate.max_difference <= COMPACTED_FLOAT64
    return slim


@pytest.mark.parametrize("net", NETS)
def test_the_analysis_tells_what_coupling_costs(net):
    model = NETS[net]()
    plan, x = half(model), torch.randn(2, 2, 8, 8)
    left = {}
    for mode in MODES:
        analysis = pp.analyse(model, plan, x, residual=mode)
        slim = pp.compact(model, plan, x, residual=mode, latency=False)
        left[mode] = sum(one.numel() for one in slim.model.parameters())
        assert analysis.parameters_left == left[mode] == slim.after.parameters
        for layer in analysis.layers:
            module = slim.model.get_submodule(layer.name)
            assert layer.inputs_left == module.weight.shape[1]
            assert layer.parameters_left == sum(one.numel() for one in module.parameters())
        if mode == "intersect":
            kept = {name: len(filters) for name, filters in slim.kept.items()}
            assert {layer.name: layer.coupled for layer in analysis.layers if layer.coupled} == kept
    assert analysis.parameters_coupled == left["intersect"] - left["scatter"] > 0
    assert f"{analysis.parameters_coupled:,} parameters more than scatter" in str(analysis)
    promised = measure.profile(model, x, plan=plan, latency=False)
    real = measure.profile(pp.compact(model, plan, x, latency=False).model, x, latency=False)
    assert (promised.parameters, promised.macs) == (real.parameters, real.macs)


def test_profiles_are_those_of_a_run():
    model = NETS["option A"]()
    x = torch.randn(2, 2, 8, 8)
    slim = pp.compact(model, half(model), x, latency=False)
    before, after = measure.profile(model, x, latency=False), measure.profile(slim.model, x, latency=False)
    assert slim.before == before
    assert (slim.after.parameters, slim.after.macs, slim.after.layers) == (after.parameters, after.macs, after.layers)


BLOCKS = st.lists(
    st.sampled_from(["basic", "wider", "project", "pre", "three", "sigmoid", "norm", "pad", "slice", "conv"]),
    min_size=1, max_size=5,
)  # fmt: skip


class Part(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def drawn(names, width):
    blocks, now = [], width
    for name in names:
        if name == "norm":
            blocks.append(nn.BatchNorm2d(now))
        elif name == "sigmoid":
            blocks.append(nn.Sigmoid())
        elif name == "pad":
            blocks, now = [*blocks, Part(lambda x: F.pad(x, (0, 0, 1, 0, 1, 2)))], now + 3
        elif name == "slice":
            blocks, now = [*blocks, Part(lambda x: x[:, 1:, ::2])], now - 1
        else:
            wide = now + 4 if name in ("wider", "project") else now
            block = {"pre": PreActivation, "three": Three, "conv": lambda i, o: nn.Conv2d(i, o, 3, padding=1)}.get(name)
            blocks.append(block(now, wide) if block else Basic(now, wide, 1, project=name == "project"))
            now = wide
    return Net(*blocks, width=width, last=now)


@settings(max_examples=40, deadline=None)
@given(names=BLOCKS, width=st.integers(6, 8), mode=st.sampled_from(MODES), seed=st.integers(0, 99), data=st.data())
def test_any_residual_net_equals_its_masked_twin_and_the_walks_agree(names, width, mode, seed, data):
    torch.manual_seed(seed)
    model, keep = drawn(names, width), {}
    for name, layer in graph.convolutions(model).items():
        if data.draw(st.integers(0, 4), label=f"whether {name}"):
            keep[name] = sorted(data.draw(st.sets(st.integers(0, layer.out_channels - 1), min_size=1), label=name))
    assert_exact(model, Plan(keep), (2, 2, 32, 4), residual=mode)
    assert not unmasked_norms(model, Plan(keep), (2, 2, 32, 4))
    assert_walks_agree(model, Plan(keep), torch.randn(2, 2, 32, 4, dtype=torch.float64))


def test_a_union_may_leave_a_layer_nothing_of_what_its_plan_keeps():
    """The slice drops the channels of all that is kept: of the layer stays what a tensor cannot be without."""
    torch.manual_seed(0)
    assert_exact(drawn(["wider", "slice"], 6), Plan({"blocks.0.conv2": [0]}), (2, 2, 32, 4), residual="union")


def unmasked_norms(model, plan, shape=(2, 2, 8, 8)):
    """Return why filters stay where one walk took a channel for dead at a norm and the other did not.

    Padded channels are no filters, so that a norm gives them values of its own: where they meet one, that is no error.
    """
    x = torch.zeros(shape, dtype=torch.float64)
    layers = pp.analyse(model, plan, x, residual="intersect").layers
    reasons = [why for layer in layers for why in layer.kept.values() if "a norm that is not masked there" in why]
    return [why for why in reasons if "where pad" not in why]


def test_a_walk_that_stops_too_early_would_be_noticed(monkeypatch):
    model = NETS["pre-activation"]().double()
    plan = Plan({name: [0, 5] for name in graph.convolutions(model)})
    assert not unmasked_norms(model, plan)
    monkeypatch.setattr(graph._Stream, "padded", lambda *_: None)
    assert unmasked_norms(model, plan)


def assert_walks_agree(model, plan, x):
    """What the channel walk calls constant is constant in the masked network, and every masked slice is dead to it."""
    trace = graph.trace(model)
    dead = graph.follow_masks(model, plan, trace)[0]
    tensors = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, node):
            found = super().run_node(node)
            tensors[node] = found.clone() if isinstance(found, torch.Tensor) else found  # before it is overwritten
            return found

    with torch.no_grad():
        Recorder(masked(model, plan).eval(), graph=trace).run(x)
    shapes = {node: one.shape for node, one in tensors.items() if isinstance(one, torch.Tensor)}
    shapes |= {node: one for node, one in tensors.items() if type(one) is int}
    walk = channels._Walk(model, trace, shapes, dead)
    for node in trace.nodes:
        walk.values[node] = walk.step(node)
    leaves = walk.result().leaves
    for node, value in walk.values.items():
        if isinstance(value, channels.Value):
            gone = leaves[value.slots] & ~np.isnan(value.constants)  # the others are alive, and nothing needs them
            found = tensors[node].transpose(0, 1).flatten(1).numpy()[gone]
            assert np.allclose(found, value.constants[gone, None], rtol=0, atol=COMPACTED_FLOAT64)
            if node.op == "call_module" and f"{node.target}.weight" in dead:
                assert np.flatnonzero(value.constants == 0).tolist() == dead[f"{node.target}.weight"].tolist()


def test_padded_channels_are_no_reason_to_mask_a_norm():
    model = Net(Part(lambda x: F.pad(x, (0, 0, 0, 0, 1, 1))), nn.BatchNorm2d(8))
    assert graph.dead_slices(model, Plan({})) == {}
    found = graph.dead_slices(model, Plan({"stem": [0, 1, 2, 3, 5]}))
    assert found["blocks.1.weight"].tolist() == [5]
    slim = assert_exact(model, Plan({"stem": [0, 1, 2, 3, 5]}))
    assert slim.model.linear.in_features == 7  # the norm gives the padded ones values of its own


@pytest.mark.parametrize("disturb", ["index", "grown"])
def test_a_wrong_index_is_noticed(monkeypatch, disturb):
    index = rewiring.Rewiring._index

    def wrong(self, node, word, places):
        return index(self, node, word, np.roll(places, 1) if word == disturb else places)

    monkeypatch.setattr(rewiring.Rewiring, "_index", wrong)
    model = NETS["option A"]()
    with pytest.raises(RuntimeError, match="in float64, more than 1e-10"):
        pp.compact(randomised(model), half(model), torch.randn(2, 2, 8, 8), latency=False)


def test_training_the_slim_network_equals_training_the_masked_one():
    for net in ("option A", "projection", "pre-activation"):
        torch.manual_seed(1)
        model = randomised(NETS[net]()).double()
        plan, x, labels = half(model), torch.randn(6, 2, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
        slim = pp.compact(model, plan, x, latency=False).model
        twin = copy.deepcopy(model)
        masks = pp.mask_(twin, plan)
        start = slim.linear.weight.clone()
        for one in (slim.train(), twin.train()):
            optimizer = torch.optim.SGD(one.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
            if one is twin:
                masks.attach(optimizer)
            for _ in range(5):
                optimizer.zero_grad()
                F.cross_entropy(one(x), labels).backward()
                optimizer.step()
        assert (slim.linear.weight - start).abs().max() > 1e-3
        for name, kept in plan.keep.items():
            if (bias := slim.get_submodule(name).bias) is not None:
                assert torch.allclose(bias, twin.get_submodule(name).bias[kept.tolist()], rtol=0, atol=TRAINED_FLOAT64)
        assert torch.allclose(slim.eval()(x), twin.eval()(x), rtol=0, atol=TRAINED_FLOAT64 * 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_types_and_layouts_survive_an_indexed_sum(dtype, layout):
    model = NETS["option A"]().to(dtype).to(memory_format=layout)
    x = torch.randn(2, 2, 8, 8).to(dtype)
    slim = pp.compact(model, half(model), x.to(memory_format=layout), latency=False).model
    shapes = [node.target for node in slim.graph.nodes if node.target == "permute"]
    assert bool(shapes) == (layout == torch.channels_last)
    seen = []
    slim.blocks.get_submodule("3.conv1").register_forward_hook(lambda _, args, out: seen.append(args[0]))
    slim.eval()(x.to(memory_format=layout))
    assert seen[0].is_contiguous(memory_format=layout)
    assert seen[0].dtype == dtype
    assert slim.half().add_index.dtype == torch.int64


def test_autocast_export_and_saving_take_an_indexed_sum(tmp_path):
    model = NETS["option A"]()
    x = torch.randn(2, 2, 8, 8)
    slim = pp.compact(model, half(model), x, latency=False)
    network = slim.model.eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = network(x)
    assert torch.allclose(mixed.float(), network(x), atol=0.1)
    assert torch.equal(pp.load_slim(pp.save_slim(slim, tmp_path))(x), network(x))
    assert torch.equal(copy.deepcopy(network)(x), network(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_an_indexed_sum_compiles_in_one_graph_and_exports():
    model = NETS["option A"]()
    x = torch.randn(2, 2, 8, 8)
    slim = pp.compact(model, half(model), x, latency=False).model.eval()
    assert torch.equal(torch.compile(slim, backend="eager", fullgraph=True)(x), slim(x))
    assert torch.equal(torch.export.export(slim, (x,)).module()(x), slim(x))


def narrow_resnet50():
    """ResNet-50 with an eighth of its channels."""
    with torch.device("meta"):
        layers = graph.convolutions(pp.models.resnet50())
    return pp.models.resnet50(widths={name: layer.out_channels // 8 for name, layer in layers.items()}, stem="cifar")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "build", [lambda: pp.models.resnet20(), lambda: pp.models.resnet56(width=0.5), narrow_resnet50]
)
def test_residual_models_equal_their_masked_twins(build, mode):
    torch.manual_seed(0)
    model = build()
    slim = assert_exact(model, half(model), (2, 3, 16, 16), residual=mode)
    assert slim.after.macs < 0.6 * slim.before.macs


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_full_resnet50_equals_its_masked_twin(mode):
    torch.manual_seed(0)
    model = pp.models.resnet50()
    assert_exact(model, half(model), (1, 3, 224, 224), residual=mode)
