"""Networks that torch.fx cannot trace: their own forward over cut layers, proved exact in float64."""

import copy
import inspect
import re
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_compaction import half, randomised
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

import pyprune as pp
from pyprune import compaction, graph, recording
from pyprune.types import Plan
from tolerances import COMPACTED_FLOAT64

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
        assert x.ndim == 4 and len(x) > 0
        x = self.second(self.first(x))
        assert isinstance(x, torch.Tensor) and x.size(2) == x.size(3), "square"
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
