"""Channels that are joined, split, multiplied and moved: what leaves with them, proved exact in float64."""

import copy
import importlib.util

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_compaction import randomised
from test_residual import assert_exact
from torch import nn

import pyprune as pp
from pyprune import channels, rewiring
from pyprune.types import Plan
from tolerances import COMPACTED_FLOAT64


class Join(nn.Module):
    """Two convolutions, what ``join`` makes of them, and a convolution that reads it."""

    def __init__(self, join, width=None, a=4, b=4, **parts):
        super().__init__()
        self.a, self.b, self.join = nn.Conv2d(2, a, 3, padding=1), nn.Conv2d(2, b, 3, padding=1), join
        for name, part in parts.items():
            (self.add_module if isinstance(part, nn.Module) else self.register_buffer)(name, part)
        with torch.no_grad():
            found = self.join(self, *(conv(torch.zeros(2, 2, 6, 6)) for conv in (self.a, self.b)))
        self.last = nn.Conv2d(found.shape[1], 3, 1) if found.ndim == 4 else nn.Linear(found.shape[1], 3)

    def forward(self, x):
        return self.last(self.join(self, self.a(x), self.b(x)))


def exact(model, plan, shape=(2, 2, 6, 6), **options):
    """Compact, compare, save and load; return what compact returned."""
    before = copy.deepcopy(model.state_dict())
    slim = assert_exact(model, plan if isinstance(plan, Plan) else Plan(plan), shape, **options)
    assert before.keys() == model.state_dict().keys()
    return slim


def assert_saves(slim, folder):
    """Save, load, and run the generated source: all compute what the slim network does."""
    place, x = pp.save_slim(slim, folder), slim.example_inputs[0]
    expected = slim.model.eval()(x)
    loaded = pp.load_slim(place)
    assert all(torch.equal(one, loaded.state_dict()[name]) for name, one in slim.model.state_dict().items())
    assert torch.allclose(loaded(x), expected, rtol=0, atol=COMPACTED_FLOAT64)
    spec = importlib.util.spec_from_file_location("slim_model", place / "slim_model.py")
    source = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(source)
    assert torch.allclose(source.load(place)(x), expected, rtol=0, atol=COMPACTED_FLOAT64)


def beyond(slim):
    return {name: filters.tolist() for name, filters in slim.beyond.items()}


CATS = {
    "cat": lambda s, a, b: torch.cat([a, b], 1),
    "concat": lambda s, a, b: torch.concat((a, b), dim=-3),
    "concatenate": lambda s, a, b: torch.concatenate((a, b), axis=1),
    "three, one twice": lambda s, a, b: torch.cat([a, F.relu(b), torch.sigmoid(a)], 1),
    "nested": lambda s, a, b: torch.cat([torch.cat([b, a], 1), F.max_pool2d(a, 3, 1, 1)], 1),
    "of parts": lambda s, a, b: torch.cat(torch.cat([a, b], 1).chunk(4, 1)[::-1], 1),
    "flat": lambda s, a, b: torch.cat([a.mean((2, 3)), b.flatten(1)], 1),
}  # fmt: skip


@pytest.mark.parametrize("case", CATS)
@pytest.mark.parametrize("mode", ["scatter", "intersect", "union"])
def test_concatenations_keep_offsets(case, mode, tmp_path):
    model = Join(CATS[case])
    slim = exact(model, {"a": [1], "b": [0, 3]}, residual=mode)
    assert slim.kept == {}
    assert_saves(slim, tmp_path)
    assert (slim.model.a.out_channels, slim.model.b.out_channels) == (1, 2)


def test_a_part_of_which_nothing_is_left_is_empty():
    slim = exact(Join(CATS["of parts"]), {"a": [1], "b": [0, 3]})
    sizes = [node.args[1] for node in slim.model.graph.nodes if node.target is torch.split]
    assert sizes == [[1, 0, 1, 1]]


def test_a_concatenation_with_an_input_and_with_something_unfollowed():
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(2, 4, 1), nn.Conv2d(8, 3, 1), nn.Conv2d(7, 3, 1)

        def forward(self, x):
            y = self.a(x)
            return self.b(torch.cat([y, x, x.flip(1)], 1)) + self.c(torch.cat([torch.cumsum(x, 1), y, x[:, :1]], 1))

    slim = exact(Skips(), {"a": [2]})
    assert slim.kept == {}
    assert (slim.model.b.in_channels, slim.model.c.in_channels) == (5, 4)


ALONG = {
    "space": (
        lambda s, a, b: torch.cat([a, b], 2), {"a": 3, "b": 3},
        {"a": {1: "reaches cat, where b keeps its channel"}, "b": {2: "reaches cat, where a keeps its channel"}},
    ),
    "two constants": (
        lambda s, a, b: torch.cat([torch.sigmoid(a), b], 3), {"a": 4, "b": 4},
        {name: {0: "is another constant on the other side of cat"} for name in ("a", "b")},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ALONG)
def test_concatenations_over_space_keep_the_same_channels(case):
    join, sizes, kept = ALONG[case]
    slim = exact(Join(join), {"a": [2, 3], "b": [1, 3]}, residual="scatter")
    assert {name: slim.model.get_submodule(name).out_channels for name in sizes} == sizes
    for name, reasons in kept.items():
        assert reasons.items() <= slim.kept[name].items()
    slim = exact(Join(join), {"a": [2, 3], "b": [1, 3]}, residual="union")
    assert slim.lossy == (case == "space")


SPLITS = {
    "chunk": lambda s, a, b: (lambda p: p[0] + 2 * p[1])(a.chunk(2, 1)),
    "unequal chunk": lambda s, a, b: (lambda p: torch.cat([p[1], p[0]], 1))(b.chunk(3, dim=1)),
    "split": lambda s, a, b: torch.cat([a.split(2, 1)[1], F.relu(torch.split(a, 1, 1)[3])], 1),
    "list": lambda s, a, b: s.c(a.split([1, 3], 1)[1]) + s.d(torch.split(a, (3, 1), dim=1)[0]),
    "tensor_split": lambda s, a, b: s.c(torch.tensor_split(a, (1,), 1)[1]),
    "computed": lambda s, a, b: s.d(torch.split(a, a.size(1) - 1, dim=1)[0]),
    "narrow": lambda s, a, b: s.c(a.narrow(1, 1, 3)) + s.d(torch.narrow(a, 1, 0, 3).narrow(2, 0, 6)),
    "of space": lambda s, a, b: (lambda p: s.c(p[0][:, 1:] + p[1][:, 1:]))(a.chunk(2, 3)),
    "by an index": lambda s, a, b: s.c(torch.index_select(a, 1, s.index)) + s.d(a.index_select(1, s.index)),
}  # fmt: skip


@pytest.mark.parametrize("case", SPLITS)
@pytest.mark.parametrize("kept", [[0, 1, 3], [1, 2], [3]])
def test_splits_are_cut_by_what_is_left(case, kept, tmp_path):
    model = Join(SPLITS[case], c=nn.Conv2d(3, 2, 1), d=nn.Conv2d(3, 2, 1), index=torch.tensor([3, 0, 1]))
    slim = exact(model, {"a": kept, "b": kept})
    assert_saves(slim, tmp_path)
    for why in [why for filters in slim.kept.values() for why in filters.values()]:
        assert "is the last channel of" in why


def test_a_chunk_becomes_a_split_with_a_list_and_what_nothing_reads_leaves():
    model = Join(lambda s, a, b: torch.cat([F.relu(a.chunk(2, 1)[1]), b], 1), a=6)
    slim = exact(model, {"a": [0, 4, 5]})
    assert beyond(slim) == {"a": [0]}
    assert not slim.lossy
    assert slim.model.a.out_channels == 2
    assert [node.args[1] for node in slim.model.graph.nodes if node.target is torch.split] == [[0, 2]]
    analysis = pp.analyse(model.double(), slim.plan, torch.randn(1, 2, 6, 6, dtype=torch.float64))
    assert "removed beyond the plan 1 (0): nothing needs them" in str(analysis)
    assert analysis.parameters_left == slim.after.parameters == sum(p.numel() for p in slim.model.parameters())


class Excite(nn.Module):
    """Squeeze and excitation, its gate behind ``activation``, made by convolutions or by linear layers."""

    def __init__(self, width, activation, linear=False):
        super().__init__()
        layer = nn.Linear if linear else lambda i, o: nn.Conv2d(i, o, 1)
        self.squeeze, self.excite, self.activation, self.linear = layer(width, 3), layer(3, width), activation, linear

    def forward(self, x):
        y = x.mean((2, 3), keepdim=not self.linear)
        y = self.activation(self.excite(F.relu(self.squeeze(y))))
        return x * (y[:, :, None, None] if self.linear else y)


@pytest.mark.parametrize("mode", ["scatter", "intersect", "union"])
def test_a_gate_leaves_with_what_it_multiplies(mode):
    model = Join(
        lambda s, a, b: s.gate(F.relu(s.norm(a))) + b, a=6, b=6, gate=Excite(6, nn.Sigmoid()), norm=nn.BatchNorm2d(6)
    )
    slim = exact(model, {"a": [0, 2, 5], "b": [0, 2, 3, 5]}, residual=mode)
    left = {"scatter": 3, "intersect": 4, "union": 3}[mode]
    assert slim.model.a.out_channels == slim.model.get_submodule("gate.excite").out_channels == left
    assert slim.model.get_submodule("gate.squeeze").in_channels == left
    if mode == "scatter":
        assert beyond(slim) == {"gate.excite": [1, 3, 4]}
        assert slim.kept == {}


def test_a_removed_gate_is_a_constant_or_frees_its_partner():
    gates = {"gate.excite": [0, 1], "gate.squeeze": [0, 2]}
    model = Join(lambda s, a, b: s.gate(a) + b, gate=Excite(4, nn.Sigmoid()))
    slim = exact(model, gates)  # half of the channel still passes
    assert slim.model.a.out_channels == 4
    assert slim.kept == {
        "gate.excite": {2: "reaches mul, where a keeps its channel", 3: "reaches mul, where a keeps its channel"}
    }
    assert slim.model.get_submodule("gate.squeeze").out_channels == 2
    slim = exact(Join(lambda s, a, b: F.relu(s.b2(b)) * a, b2=nn.Conv2d(4, 4, 1)), {"b2": [0, 3]})
    assert beyond(slim) == {"a": [1, 2]}
    assert slim.model.last.in_channels == 2
    assert not slim.lossy


PRODUCTS = {
    "times": lambda s, a, b: a * b,
    "torch": lambda s, a, b: torch.mul(a, torch.sigmoid(b)),
    "method": lambda s, a, b: a.mul(b).mul(0.5),
    "in place": lambda s, a, b: F.relu(a).mul_(b),
    "maximum": lambda s, a, b: torch.maximum(a, b),
    "sub": lambda s, a, b: a - b,
    "torch sub": lambda s, a, b: 1 - torch.sub(F.relu(a), torch.sigmoid(b)),
    "sub in place": lambda s, a, b: F.relu(a).sub_(b) * 0.5,
    "div": lambda s, a, b: a / (2 + torch.sigmoid(b)),
    "gated by one map": lambda s, a, b: a * torch.sigmoid(s.c(b)),
    "shifted by one map": lambda s, a, b: s.c(b) - a,
    "broadcast sum": lambda s, a, b: a + b.mean((2, 3), keepdim=True),
    "scaled residual": lambda s, a, b: a + 0.2 * b,
    "sides of a stranger": lambda s, a, b: a * torch.cumsum(b, 2),
    "an unfollowed map": lambda s, a, b: F.relu(a) * a.sum(1, keepdim=True),
}  # fmt: skip


@pytest.mark.parametrize("case", PRODUCTS)
@pytest.mark.parametrize("mode", ["scatter", "intersect", "union"])
def test_products_and_differences(case, mode, tmp_path):
    for keep in ({"a": [1, 2]}, {"a": [1, 2], "b": [1, 3]}, {"b": [0]}, {"a": [0, 1], "b": [0, 1]}):
        slim = exact(Join(PRODUCTS[case], c=nn.Conv2d(4, 1, 3, padding=1)), keep, residual=mode)
    if "strange" not in case:  # cumsum cannot be saved
        assert_saves(slim, tmp_path)


def test_products_leave_by_hand():
    slim = exact(Join(PRODUCTS["times"]), {"a": [1, 2], "b": [1, 3]})
    assert (slim.kept, beyond(slim)) == ({}, {"a": [2], "b": [3]})
    slim = exact(Join(PRODUCTS["sub"]), {"a": [1, 2], "b": [1, 3]})
    assert (slim.model.a.out_channels, slim.model.b.out_channels, slim.model.last.in_channels) == (2, 2, 3)
    slim = exact(Join(PRODUCTS["div"]), {"a": [1, 2]})
    assert slim.kept["a"][0] == "reaches truediv, where b keeps its channel"
    slim = exact(Join(PRODUCTS["gated by one map"], c=nn.Conv2d(4, 1, 3, padding=1)), {"a": [1, 2], "b": [0]})
    assert (slim.model.a.out_channels, slim.model.b.out_channels, slim.model.last.in_channels) == (2, 1, 2)
    slim = exact(Join(PRODUCTS["sides of a stranger"]), {"a": [1, 2]})
    assert slim.kept["a"][0] == "reaches mul, where cumsum keeps its channel"


class Scaled(nn.Module):
    """A parameter or buffer with one entry a channel between two convolutions."""

    def __init__(self, shape, apply, buffer=False):
        super().__init__()
        self.a, self.b, self.last = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(2, 4, 1), nn.Conv2d(4, 3, 1)
        self.inner = nn.Module()
        if buffer:
            self.inner.register_buffer("gamma", torch.rand(shape) + 0.5)
        else:
            self.inner.gamma = nn.Parameter(torch.rand(shape) + 0.5)
        self.apply_ = apply

    def forward(self, x):
        return self.last(self.apply_(self, self.inner.gamma, self.a(x), self.b(x)))


GAMMAS = {
    "scale": ((1, 4, 1, 1), lambda s, g, a, b: b + g * a, (1, 2, 1, 1), 3),
    "without a batch": ((4, 1, 1), lambda s, g, a, b: a * g, (2, 1, 1), 2),
    "shift": ((1, 4, 1, 1), lambda s, g, a, b: a - g, (1, 2, 1, 1), 2),
    "quotient": ((1, 4, 1, 1), lambda s, g, a, b: torch.relu(a).div(g), (1, 2, 1, 1), 2),
    "every position": ((1, 4, 6, 6), lambda s, g, a, b: a * g, (1, 2, 6, 6), 2),
    "one for all": ((1,), lambda s, g, a, b: a * g, (1,), 2),
    "one for a column": ((6,), lambda s, g, a, b: a * g, (6,), 2),
    "one position": ((1, 1, 6, 6), lambda s, g, a, b: torch.relu(a) * g, (1, 1, 6, 6), 2),
    "twice": ((1, 4, 1, 1), lambda s, g, a, b: (a * g) + torch.relu(a) * g, (1, 2, 1, 1), 2),
    "two streams": ((1, 4, 1, 1), lambda s, g, a, b: a * g + torch.relu(b) * s.inner.gamma, (1, 4, 1, 1), 4),
    "read elsewhere": ((1, 4, 1, 1), lambda s, g, a, b: a * g + g.sum(), (1, 4, 1, 1), 4),
    "as a gate": ((1, 4, 1, 1), lambda s, g, a, b: a * torch.sigmoid(g), (1, 4, 1, 1), 4),
    "shifts positions": ((1, 4, 6, 6), lambda s, g, a, b: a + g, (1, 4, 6, 6), 4),
}  # fmt: skip


@pytest.mark.parametrize("case", GAMMAS)
@pytest.mark.parametrize("buffer", [False, True])
def test_parameters_are_cut_with_the_channels(case, buffer, tmp_path):
    shape, apply, left, inputs = GAMMAS[case]
    model = Scaled(shape, apply, buffer)
    plan = {"a": [0, 2], "b": {"two streams": [1, 3], "scale": [2, 3]}.get(case, [0, 1, 2, 3])}
    slim = exact(model, plan)
    if not buffer or case not in ("read elsewhere", "as a gate"):  # there fx computes with the buffer while it traces
        gamma = slim.model.get_submodule("inner").gamma
        assert tuple(gamma.shape) == left
        assert slim.model.last.in_channels == inputs
        assert isinstance(gamma, nn.Parameter) != buffer
    assert not [name for name in vars(model) if "constant" in name]
    analysis = pp.analyse(model, slim.plan, slim.example_inputs)
    assert analysis.parameters_left == sum(p.numel() for p in slim.model.parameters())
    assert_saves(slim, tmp_path)


def test_why_a_parameter_keeps_its_channels():
    reasons = {
        "read elsewhere": "reaches mul, which meets inner.gamma, which is read elsewhere too",
        "as a gate": "reaches mul, where sigmoid keeps its channel",
        "two streams": "reaches mul, where b keeps its channel",
    }
    for case, reason in reasons.items():
        shape, apply, *_ = GAMMAS[case]
        plan = {"a": [0, 2], "b": [0, 1, 2]} if case == "two streams" else {"a": [0, 2]}
        assert exact(Scaled(shape, apply), plan).kept["a"][1] == reason
    model = Scaled((1, 4, 1, 1), lambda s, g, a, b: a * g)
    model.inner.more = model.inner.gamma
    assert "meets inner.gamma, which is inner.more too" in exact(model, {"a": [0, 2]}).kept["a"][1]


def test_overwritten_views_and_sums_read_through_another_name():
    class Views(nn.Module):
        def __init__(self, change):
            super().__init__()
            self.a, self.b, self.last, self.change = nn.Conv2d(2, 4, 1), nn.Conv2d(2, 4, 1), nn.Conv2d(4, 2, 1), change

        def forward(self, x):
            y, z = self.a(x), self.b(x)
            self.change(y, z)
            return self.last(F.relu(y))

    plan = {"a": [0, 1], "b": [1, 2]}
    slim = exact(Views(lambda y, z: y[:, :, 1:].add_(z[:, :, 1:])), plan)
    assert slim.kept["a"][2] == slim.kept["b"][0] == "is overwritten through getitem, a view of it"
    slim = exact(Views(lambda y, z: y.mul_(z)), plan)
    assert slim.model.a.out_channels == slim.model.b.out_channels == slim.model.last.in_channels == 2
    slim = exact(Views(lambda y, z: y.add_(z)), plan)
    assert slim.model.last.in_channels == 3


def test_round_to_counts_what_leaves_unplanned():
    model = Join(lambda s, a, b: s.gate(a) + b, a=6, b=6, gate=Excite(6, nn.Sigmoid()))
    plan = Plan({"a": [0, 2, 5], "b": [0, 2, 3]})
    slim = exact_rounded(model, plan, 4)
    for name in ("a", "b", "gate.excite"):
        size = slim.model.get_submodule(name).weight.shape[0]
        assert size % 4 == 0 or size == 6
    assert slim.kept["a"] == {1: "makes the number of filters a multiple of 4"}


def exact_rounded(model, plan, round_to):
    x = torch.randn(2, 2, 6, 6, dtype=torch.float64)
    return pp.compact(randomised(model).double(), plan, x, round_to=round_to, latency=False)


@pytest.mark.parametrize("disturb", ["sizes", "parameter", "place"])
def test_a_wrong_cut_is_noticed(monkeypatch, disturb):
    if disturb == "sizes":
        split = rewiring.Rewiring._split

        def wrong(self, node, found):
            split(self, node, found)
            node.args = (node.args[0], list(reversed(node.args[1])), 1)

        monkeypatch.setattr(rewiring.Rewiring, "_split", wrong)
    elif disturb == "parameter":
        entries = channels.Channels.leaving_entries
        monkeypatch.setattr(channels.Channels, "leaving_entries", lambda self, name: np.roll(entries(self, name), 1))
    else:
        leaving = channels.Channels.leaving_inputs
        monkeypatch.setattr(
            channels.Channels,
            "leaving_inputs",
            lambda self, name: np.roll(leaving(self, name), 1) if name == "last" else leaving(self, name),
        )
    model = Disturbed()
    with pytest.raises((RuntimeError, ValueError), match=r"in float64, more than 1e-10|expected|size|shape|channels"):
        pp.compact(model, Plan({"a": [0, 1, 2]}), torch.randn(2, 2, 6, 6), latency=False)


class Disturbed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.last, self.gamma = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 2, 1), nn.Parameter(torch.rand(1, 4, 1, 1))

    def forward(self, x):
        parts = (self.a(x) * self.gamma).split([2, 2], 1)
        return self.last(torch.cat([F.relu(parts[1]), parts[0]], 1))
