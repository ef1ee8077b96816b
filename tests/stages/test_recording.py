"""Networks that torch.fx cannot trace: their own forward over cut layers, proved exact in float64."""

import copy
import inspect
import re
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_compaction import masked, randomised
from torch import nn
from torch.utils.checkpoint import checkpoint

import pyprune as pp
from pyprune import graph, proving, recording
from pyprune.types import Plan
from tolerances import COMPACTED_FLOAT64
from zoo import ENTRIES, checking

SHAPE = (3, 3, 6, 6)


class Net(nn.Module):
    """Two convolutions with norms and a linear layer; the classes below differ in their forward."""

    def __init__(self, a=8, b=8, **parts):
        super().__init__()
        self.a, self.na = nn.Conv2d(3, a, 3, padding=1), nn.BatchNorm2d(a)
        self.b, self.nb = nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b)
        self.last = nn.Linear(b, 4)
        for name, part in parts.items():
            setattr(self, name, part)

    def first(self, x):
        return F.relu(self.na(self.a(x)))

    def second(self, x):
        return F.relu(self.nb(self.b(x)))

    def head(self, x):
        return self.last(x.mean((2, 3)))


class ShapeBranch(Net):
    def forward(self, x):
        if x.shape[2] > 3:
            x = self.first(x)
        height, width = x.shape[-2:]
        return self.head(F.interpolate(self.second(x), size=(int(height * 0.5), width // 2)))


class Asserts(Net):
    def forward(self, x):
        assert len(x) > 0
        x = self.second(self.first(x))
        assert x.size(2) == x.size(3), "square"
        return self.head(x)


class SizeLoop(Net):
    def forward(self, x):
        for _ in range(x.size(2) // 3):
            x = x * 0.5
        return self.head(self.second(self.first(x)))


class Shortcut(Net):
    def __init__(self):
        super().__init__(down=nn.Conv2d(3, 8, 1))

    def forward(self, x):
        y = self.first(x)
        x = self.down(x) if x.shape[1] != y.shape[1] else x
        return self.head(F.relu(self.nb(self.b(y)) + x))


class OptionA(Net):
    def __init__(self):
        super().__init__(b=12, c=nn.Conv2d(12, 12, 3, padding=1), stride=2)
        self.b.stride = (2, 2)

    def forward(self, x):
        x = self.first(x)
        y = self.c(self.second(x))
        if y.shape != x.shape:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        return self.head(F.relu(x + y))


class Checkpointed(Net):
    def forward(self, x):
        x = checkpoint(lambda one: self.first(one), x, use_reentrant=False)
        return self.head(checkpoint(self.second, x, use_reentrant=False)) if x.shape[0] else x


class Arguments(Net):
    def forward(self, *inputs, **options):
        (x,) = inputs if len(inputs[0]) else ()
        return {"out": [self.head(self.second(self.first(x)))], "none": None, "scale": options.get("scale", 2)}


@dataclass
class Outputs:
    logits: torch.Tensor
    others: dict[str, torch.Tensor]


class Dataclass(Net):
    def forward(self, x):
        y = self.second(self.first(x)) if len(x) else x
        y = self.head(y)
        return Outputs(y, {"twice": y * 2})


class Flattened(Net):
    def forward(self, x):
        x = F.adaptive_avg_pool2d(self.second(self.first(x)), 1)
        return self.last(x.view(x.shape[0], -1)) if x.shape[2] == 1 else x


class Parameters(Net):
    def __init__(self):
        super().__init__(gamma=nn.Parameter(torch.rand(1, 8, 1, 1) + 0.5), mean=torch.rand(1, 3, 1, 1))

    def forward(self, x):
        x = x - self.mean if x.shape[1] == 3 else x
        return self.head(self.second(self.first(x) * self.gamma))


class InList(Net):
    """Layers that are found through a list and a closure, besides their names."""

    def __init__(self):
        super().__init__()
        self.both = [self.a, self.b]

    def forward(self, x):
        if x.shape[2] > 3:
            x = F.relu(self.na(self.both[0](x)))
        return self.head(F.relu(self.nb(self.both[-1](x))))


class Gate(Net):
    def __init__(self):
        super().__init__(gate=nn.Linear(8, 8))

    def forward(self, x):
        x = self.second(self.first(x))
        n, c = x.shape[:2]
        gate = torch.sigmoid(self.gate(x.mean((2, 3)))).view(n, c, 1, 1)
        return self.head(x * gate) if n else x


class Reused(Net):
    def forward(self, x):
        x = self.first(x)
        for _ in range(2 if len(x) else 0):
            x = F.relu(self.nb(self.b(x)))
        return self.head(x)


class Tied(Net):
    """Two convolutions with one weight, and biases of their own."""

    def __init__(self):
        super().__init__(c=nn.Conv2d(8, 8, 3, padding=1), nc=nn.BatchNorm2d(8))
        self.c.weight = self.b.weight

    def forward(self, x):
        x = self.first(x) if len(x) else x
        return self.head(self.second(x) + F.relu(self.nc(self.c(x))))


WHOLE = [ShapeBranch, Asserts, SizeLoop, Checkpointed, Arguments, Dataclass, Flattened, Parameters, InList, Gate]
"""In these forward needs no edit, whatever leaves."""


class Number(Net):
    def forward(self, x):
        x = self.first(x)
        assert x.shape[1] == 8, "eight"  # here
        return self.head(self.second(x))


class Branch(Net):
    def forward(self, x):
        x = self.first(x)
        if x.shape[1] > 5:  # here
            x = x * 2
        return self.head(self.second(x))


class Scale(Net):
    def forward(self, x):
        x = self.first(x) if len(x) else x
        return self.head(self.second(x * x.shape[1] ** -0.5))  # here


class Viewed(Net):
    def forward(self, x):
        x = self.first(x)
        if x.shape[2] > 1:
            x = x.view(x.shape[0], 8, -1).mean(2).view(-1, 8, 1, 1)  # here
        return self.head(self.second(x))


class Rows(Net):
    def forward(self, x):
        x = self.first(x) if len(x) else x
        return self.head(self.second(x.view(-1, 8 * x.shape[2] * x.shape[3]).unflatten(1, (8, 6, 6))))  # here


class Chunked(Net):
    def forward(self, x):
        one, other = self.first(x).chunk(2, 1)  # here
        return self.head(self.second(torch.cat([other, F.silu(one)], 1))) if len(x) else one


class Sliced(Net):
    def forward(self, x):
        x = self.first(x) if len(x) else x
        return self.head(self.second(torch.cat([x[:, 3:], x[:, :3] * 2], 1)))  # here


class Shuffled(Net):
    def forward(self, x):
        x = self.first(x)
        n, c, h, w = x.shape
        assert c % 2 == 0
        return self.head(self.second(x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)))  # here


PINNED = [Number, Branch, Scale, Viewed, Rows, Chunked, Sliced, Shuffled]
"""In these the channels of the first convolution must stay, because of the line that says so."""

PLAN = Plan({"a": [0, 4, 5, 6], "b": [1, 2, 7]})


def built(net, seed=0):
    torch.manual_seed(seed)
    return randomised(net()).double()


def inputs(shape=SHAPE, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def zeroed(model, slim):
    """Return the masked network, without pyprune's own code: every removed filter, and its place in the norm."""
    twin = copy.deepcopy(model).eval()
    for name, kept in slim.plan.keep.items():
        gone = np.setdiff1d(np.arange(twin.get_submodule(name).out_channels), kept)
        for owner in [name, f"n{name}"] if hasattr(twin, f"n{name}") else [name]:
            for leaf in ("weight", "bias"):
                getattr(twin.get_submodule(owner), leaf).data[gone] = 0
    return twin


def line(net):
    """Return the number of the line of ``net`` that says "here"."""
    lines, start = inspect.getsourcelines(net)
    return start + next(i for i, one in enumerate(lines) if one.rstrip().endswith("# here"))


def exact(model, plan=PLAN, shape=SHAPE, **options):
    """Compact, and compare with the masked network on the inputs and on others; return what compact returned."""
    before = copy.deepcopy(model.state_dict())
    slim = pp.compact(model, plan, inputs(shape), latency=False, **options)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert type(slim.model) is type(model)
    assert slim.own_forward
    expected, found = zeroed(model, slim), copy.deepcopy(slim.model).eval()
    for batch in (inputs(shape), inputs((shape[0] + 1, *shape[1:]), 1)):
        want, got = (recording.tensors(one(batch)) for one in (expected, found))
        assert len(want) == len(got) > 0
        for one, other in zip(want, got, strict=True):
            assert (one - other).abs().max() <= COMPACTED_FLOAT64 * max(1, one.abs().max())
    assert slim.certificate.verified
    assert slim.certificate.max_difference <= COMPACTED_FLOAT64
    return slim


@pytest.mark.parametrize("net", WHOLE)
def test_all_of_the_plan_leaves_where_forward_needs_no_edit(net):
    model = built(net)
    with pytest.raises(ValueError, match=r"cannot be traced by torch\.fx"):
        graph.trace(model)
    slim = exact(model)
    assert slim.kept == {}
    assert (slim.model.a.out_channels, slim.model.b.in_channels, slim.model.b.out_channels) == (4, 4, 3)
    assert slim.after.parameters == sum(one.numel() for one in slim.model.parameters()) < slim.before.parameters
    assert slim.residual == "intersect"


@pytest.mark.parametrize("net", PINNED)
def test_what_is_written_out_stays_and_the_line_is_named(net):
    slim = exact(built(net))
    where = rf"line {line(net)} of forward of {net.__name__} in test_recording\.py"
    assert set(slim.kept) == {"a"}
    assert set(slim.kept["a"]) == {1, 2, 3, 7}
    assert all(re.search(where, why) for why in slim.kept["a"].values()), slim.kept["a"]
    assert slim.model.b.out_channels == 3


def test_layers_that_run_twice_or_share_weights_are_cut_once():
    slim = exact(built(Reused), Plan({"a": [0, 4, 6], "b": [0, 4, 6]}))
    assert (slim.model.a.out_channels, slim.model.b.in_channels, slim.model.b.out_channels) == (3, 3, 3)
    slim = exact(built(Tied), Plan({"a": [0, 4], "b": [1, 2, 3], "c": [1, 2, 3]}))
    assert slim.model.c.weight is slim.model.b.weight
    assert slim.model.c.weight.shape == (3, 2, 3, 3)
    assert slim.kept == {}


@pytest.mark.parametrize("residual", ["scatter", "intersect", "union"])
@pytest.mark.parametrize("net", [Shortcut, OptionA])
def test_branches_are_added_as_forward_adds_them(net, residual):
    model = built(net)
    plan = {"a": [0, 1, 4, 5, 6], "b": [0, 1, 2, 6, 7]}
    plan |= {"down": [0, 2, 7]} if net is Shortcut else {"c": [0, 2, 3, 6, 7, 10]}
    slim = pp.compact(model, Plan(plan), inputs(), residual=residual, latency=False)
    assert slim.residual == ("union" if residual == "union" else "intersect")
    assert slim.own_forward
    assert slim.certificate.max_difference <= COMPACTED_FLOAT64
    left = {name: slim.model.get_submodule(name).out_channels for name in plan}
    if residual == "union":
        assert slim.lossy
        return
    if net is Shortcut:
        assert left == {"a": 5, "b": 5, "down": 5}  # 3, 4 and 5 leave both branches
    else:
        assert left["c"] == left["a"] + 4  # two padded channels on each side stay
        assert any("pads with channels whose number is written out in line" in one for one in slim.kept["c"].values())


def test_numbers_that_the_slim_network_happens_to_fit_keep_nothing():
    """The halves of a split are wherever the middle is, so equal losses need no edit."""
    slim = exact(built(Chunked), Plan({"a": [0, 3, 5, 6]}))
    assert slim.kept == {}
    slim = exact(built(Sliced), Plan({"a": [0, 1, 2, 5, 7]}))  # nothing leaves before the third
    assert slim.kept == {}
    slim = exact(built(Shuffled), Plan({"a": [0, 3, 4, 7]}))  # the same of each group
    assert slim.kept == {}
    slim = exact(built(Branch), Plan({"a": [0, 1, 2, 3, 5, 7]}))  # six are more than five
    assert slim.kept == {}


def test_rounding_brings_channels_back():
    slim = pp.compact(built(Gate), Plan({"a": [0, 4, 5], "b": [1]}), inputs(), round_to=4, latency=False)
    assert (slim.model.a.out_channels, slim.model.b.out_channels) == (4, 4)
    assert slim.certificate.max_difference <= COMPACTED_FLOAT64


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from([*WHOLE, *PINNED, Shortcut, OptionA, Reused, Tied]),
    st.integers(0, 2**16),
    st.floats(0.1, 0.95),
    st.sampled_from(["scatter", "union"]),
    st.sampled_from([1, 2, 8]),
)
def test_any_plan_is_exact(net, seed, rate, residual, round_to):
    model, rng = built(net, seed % 7), np.random.default_rng(seed)
    keep = {}
    for name, layer in graph.convolutions(model).items():
        count = max(1, round(layer.out_channels * (1 - rate)))
        keep[name] = np.sort(rng.choice(layer.out_channels, count, replace=False))
    slim = pp.compact(model, Plan(keep), inputs(), residual=residual, round_to=round_to, latency=False)
    assert slim.certificate.max_difference <= COMPACTED_FLOAT64
    assert slim.certificate.native_difference <= COMPACTED_FLOAT64


class Misled(Net):
    """torch.fx traces it, but a proxy is no tensor."""

    def forward(self, x):
        if isinstance(x, torch.Tensor):
            x = x * 3
        return self.head(self.second(self.first(x)))


def test_a_trace_that_goes_another_way_is_not_believed():
    model = built(Misled)
    graph.trace(model)
    slim = exact(model)
    assert slim.own_forward == "torch.fx follows another way through forward than tensors take"
    assert slim.kept == {}


class Values(Net):
    def forward(self, x):
        if x.sum() > 0:  # here
            x = -x
        return self.head(self.second(self.first(x)))


class Item(Net):
    def forward(self, x):
        x = self.first(x) if len(x) else x
        return self.head(self.second(x / x.max().item()))  # here


class Hidden(Net):
    """Values that are read where the exception is caught."""

    def forward(self, x):
        try:
            x = x * float(x.mean())  # here
        except ValueError:
            x = x * 2
        return self.head(self.second(self.first(x))) if len(x) else x


class Data(Net):
    def forward(self, x):
        x = self.first(x) if len(x) else x
        x.data = x.data * 2  # here
        return self.head(self.second(x))


class Foreign(Net):
    def __init__(self):
        super().__init__(hidden=[nn.Conv2d(8, 8, 1).double()])

    def forward(self, x):
        x = self.hidden[0](self.first(x))  # here
        return self.head(self.second(x)) if len(x) else x


class Captured(Net):
    """A function keeps the layers of the model that it was made in, also in a copy of that."""

    def __init__(self):
        super().__init__()
        self.function = lambda x: F.relu(self.na(self.a(x)))  # here

    def forward(self, x):
        return self.head(self.second(self.function(x))) if len(x) else x


class Noise(Net):
    def forward(self, x):
        x = x + torch.randn_like(x) if len(x) else x
        return self.head(self.second(self.first(x)))


class Counting(Net):
    def forward(self, x):
        self.count = getattr(self, "count", 0) + 1
        return self.head(self.second(self.first(x))) * self.count if len(x) else x


class Set(Net):
    def forward(self, x):
        return {self.head(self.second(self.first(x)))} if len(x) else x


READS = r"reads values of a tensor \(({})\), so that what it does depends on the images"
REFUSED = {
    Values: READS.format("__bool__"), Item: READS.format("item"), Hidden: READS.format("__float__"),
    Data: "replaces the data of a tensor", Foreign: r"uses a parameter of \[8, 8, 1, 1\] that no module",
    Captured: "Functions that are stored in a model keep the layers of the original",
    Noise: "computes something else than the calls of torch that were recorded",
    Counting: "computes something else than the calls of torch that were recorded",
    Set: "must return tensors, in tuples, lists, dictionaries and dataclasses; got set",
}  # fmt: skip


@pytest.mark.parametrize("net", REFUSED)
@pytest.mark.parametrize("act", [pp.analyse, pp.compact], ids=lambda one: one.__name__)
def test_what_no_graph_holds_is_refused_by_its_line(net, act):
    model = built(net)
    model.nb.eval()
    before, held = copy.deepcopy(model.state_dict()), {one: set(vars(one)) for one in model.modules()}
    with pytest.raises(ValueError, match=rf"^{act.__name__}: .*{REFUSED[net]}") as caught:
        act(model, PLAN, inputs())
    if "# here" in inspect.getsource(net):
        assert f": line {line(net)} of " in str(caught.value)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert held == {one: set(vars(one)) for one in model.modules()}
    assert [one for one in model.modules() if not one.training] == [model.nb]
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in model.modules())


class Storing(Net):
    """A forward that leaves things behind, in itself, in a layer, in a buffer."""

    def __init__(self, traced=False):
        super().__init__(traced=traced)
        self.register_buffer("steps", torch.zeros(1))

    def forward(self, x):
        self.last_input, self.b.seen = x, x
        self.steps += 1
        return self.head(self.second(self.first(x))) if self.traced or len(x) else x


@pytest.mark.parametrize("traced", [False, True])
def test_the_original_is_left_as_it_was(traced):
    model = built(lambda: Storing(traced))
    model.nb.eval()
    model.a.weight.requires_grad_(False)
    before, held = copy.deepcopy(model.state_dict()), {one: dict(vars(one)) for one in model.modules()}
    random = torch.get_rng_state()
    slim = pp.compact(model, PLAN, inputs())
    assert bool(slim.own_forward) != traced
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert all(vars(one) == held[one] for one in model.modules())
    assert [name for name, one in slim.model.named_modules() if not one.training] == ["nb"]
    assert [name for name, one in slim.model.named_parameters() if not one.requires_grad] == ["a.weight"]
    own = {one.untyped_storage().data_ptr() for one in model.state_dict().values()}
    assert not own & {one.untyped_storage().data_ptr() for one in slim.model.state_dict().values()}


class Written(Net):
    """Memory that is written to under other names: assignments, views, and what no table knows."""

    def __init__(self, way):
        super().__init__(way=way)

    def forward(self, x):
        x = self.a(x)
        y = x[:, :4] if self.way != "data" else x.data
        if self.way == "assignment":
            x[:, :2] = 1.0
        elif self.way == "view":
            y.add_(1.0)
        elif self.way == "flat":
            x.view(len(x), -1).clamp_min_(0.25)
        elif self.way == "part":
            x.chunk(2, 1)[0].relu_()
        else:
            y.mul_(2).add_(0.5)
        return self.head(self.second(self.na(x))) if len(x) else x


class WrittenInInference(Written):
    """There torch does not count writes."""

    @torch.inference_mode()
    def forward(self, x):
        return super().forward(x)


@pytest.mark.parametrize("way", ["assignment", "view", "flat", "part", "data"])
@pytest.mark.parametrize("net", [Written, WrittenInInference])
def test_writing_over_memory_is_noticed(way, net):
    model = built(lambda: net(way))
    slim = pp.compact(model, PLAN, inputs(), latency=False)
    assert slim.certificate.max_difference <= COMPACTED_FLOAT64
    assert set(slim.kept) == {"a"}


class TwoWays(Net):
    def forward(self, x):
        x = self.first(x)
        x = torch.cat([x[:, 4:], x[:, :4]], 1) if x.shape[2] > 5 else x
        return self.head(self.second(x))


def test_only_the_way_of_the_example_inputs_is_compared(monkeypatch):
    monkeypatch.setattr(proving, "_MOST_SPACE", 4)
    slim = exact(built(TwoWays))
    assert slim.certificate.inputs[0] == "example inputs (3 images)"
    assert all("line" in why for why in slim.kept["a"].values())
    slim = exact(built(TwoWays), shape=(3, 3, 5, 5))
    assert slim.certificate.inputs[0] == "example inputs (3 images, cropped to 4 x 4)"
    assert slim.kept == {}


def test_a_wrong_decision_would_be_noticed(monkeypatch):
    monkeypatch.setattr(recording, "to_freeze", lambda *_: None)
    with pytest.raises(RuntimeError, match="differs from the masked one"):
        pp.compact(built(Sliced), Plan({"a": [1, 3, 4, 5, 6, 7]}), inputs(), latency=False)


def test_what_cannot_be_mended_is_refused(monkeypatch):
    monkeypatch.setattr(recording, "to_freeze", lambda *_: {})
    with pytest.raises(ValueError, match="does something else with narrower layers"):
        pp.analyse(built(Gate), PLAN, inputs())


def test_the_analysis_says_what_compact_does():
    model = built(Chunked)
    found, slim = pp.analyse(model, PLAN, inputs()), pp.compact(model, PLAN, inputs(), latency=False)
    assert {one.name: one.kept for one in found.layers if one.kept} == slim.kept
    assert found.parameters_left == slim.after.parameters
    assert found.residual == "intersect"


def test_inputs_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"does not accept example_inputs of \[2, 5, 6, 6\] float64"):
        pp.compact(built(Gate), PLAN, inputs((2, 5, 6, 6)))


def test_compiled_modules_are_refused():
    model = built(Gate)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model.na = torch.jit.script(nn.ReLU())
    with pytest.raises(ValueError, match=r"'na' is compiled by torch\.jit"):
        pp.compact(model, PLAN, inputs())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_types_and_layouts_survive(dtype):
    model = built(Gate).to(dtype=dtype, memory_format=torch.channels_last)
    slim = pp.compact(model, PLAN, inputs().to(dtype), latency=False)
    assert slim.certificate.dtype == str(dtype).removeprefix("torch.")
    assert {one.dtype for one in slim.model.parameters()} == {dtype}
    assert slim.model.b.weight.is_contiguous(memory_format=torch.channels_last)


def test_training_goes_on_and_files_hold_it(tmp_path):
    model, x = built(Gate), inputs()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(x).sum().backward()
    optimizer.step()
    slim = pp.compact(model, PLAN, x, latency=False)
    carried = slim.carry(optimizer, model)
    before = slim.model.a.weight.clone()
    slim.model(x).sum().backward()
    carried.step()
    assert not torch.equal(before, slim.model.a.weight)
    with pytest.raises(ValueError, match=r"save_slim: a slim folder holds a graph, and the slim Gate keeps its own"):
        pp.save_slim(slim, tmp_path)
    again = pp.compact(model, slim.plan, x, latency=False).model
    again.load_state_dict(slim.model.state_dict())
    assert torch.equal(again.eval()(x), slim.model.eval()(x))


@pytest.mark.slow
def test_deployment(tmp_path):
    slim = pp.compact(built(Shortcut).float(), PLAN, inputs().float(), latency=False)
    assert pp.export_onnx(slim, tmp_path / "slim.onnx").max_difference <= 1e-5
    assert pp.export_pt2(slim, tmp_path / "slim.pt2").max_difference == 0


GUARDED = ("ResNet A, basic", "DenseNet", "MobileNet v3", "ShuffleNet v2", "U-Net, transposed", "RegNet Y")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in GUARDED else pytest.mark.slow) for name in ENTRIES]
)
def test_the_zoo_under_its_own_forward(name):
    """Whole architectures, with one line that stops a trace: exact, and as small as under ``"intersect"``."""
    entry = ENTRIES[name]
    torch.manual_seed(0)
    model, x = checking.randomised(entry.build()), torch.randn(entry.shape, dtype=torch.float64)
    twin = copy.deepcopy(model)

    def forward(self, x):
        return super(type(self), self).forward(x) if len(x) else x

    twin.__class__ = type(type(model).__name__, (type(model),), {"forward": forward})
    plan = checking.random_plan(model, 0, 0.5, run=entry.run, heads=entry.heads)
    slim = pp.compact(twin, plan, x, latency=False)
    assert slim.own_forward
    assert slim.certificate.max_difference <= COMPACTED_FLOAT64
    other = torch.randn((len(x) + 1, *x.shape[1:]), dtype=torch.float64)
    expected, found = (recording.tensors(one.eval()(other)) for one in (masked(model, plan), slim.model))
    for one, want in zip(found, expected, strict=True):
        assert (one - want).abs().max() <= COMPACTED_FLOAT64 * max(1, want.abs().max())
    recorded = recording.record("test", copy.deepcopy(model).eval(), [x]).graph
    assert str(graph.follow_masks(model, plan, recorded)) == str(graph.follow_masks(model, plan, graph.trace(model)))
    graphs = pp.compact(model, plan, x, residual="intersect", latency=False, verify=False)
    literal = any("written out" in why for reasons in slim.kept.values() for why in reasons.values())
    assert (slim.after.parameters > graphs.after.parameters) == literal
