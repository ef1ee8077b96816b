"""Random networks: programs of torch modules that read any earlier tensors, drawn by chance, and plans for them.

A program is a list of steps ``(part, args, kwargs, reads)``: a class of torch.nn or of this module, what it is made
with, and the numbers of the tensors that it reads; tensor 0 is the input. :class:`Network` runs one, and a failing one
can be pasted into a test as it is printed. Everything is drawn through one function, ``choose(options)``, so that
hypothesis and a plain random generator draw alike.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from pyprune import graph
from pyprune.types import Plan
from zoo import checking


class Add(nn.Module):
    def __init__(self, how="+"):
        super().__init__()
        self.how = how

    def forward(self, a, b):
        if self.how == "+=":
            a += b
            return a
        return a - b if self.how == "-" else torch.add(a, b) if self.how == "add" else a + b


class Times(nn.Module):
    def __init__(self, how="*"):
        super().__init__()
        self.how = how

    def forward(self, a, b):
        if self.how == "*=":
            return a.mul_(b)
        return {"*": torch.mul, "max": torch.maximum, "min": torch.minimum}[self.how](a, b)


class Cat(nn.Module):
    def forward(self, *tensors):
        return torch.cat(tensors, 1)


class Split(nn.Module):
    """``chunk``, ``split`` or ``tensor_split`` along the channels; ``yields`` tensors."""

    def __init__(self, how, where, yields):
        super().__init__()
        self.how, self.where, self.yields = how, where, yields

    def forward(self, x):
        return getattr(x, self.how)(self.where, dim=1)


class Narrow(nn.Module):
    def __init__(self, start, length):
        super().__init__()
        self.start, self.length = start, length

    def forward(self, x):
        return x.narrow(1, self.start, self.length)


class Sliced(nn.Module):
    def __init__(self, start, stop, step=1, space=1):
        super().__init__()
        self.at = slice(start, stop, step), slice(None, None, space)

    def forward(self, x):
        channels, space = self.at
        return x[:, channels, space, space]


class Taken(nn.Module):
    """Channels by an index that the network holds."""

    def __init__(self, index):
        super().__init__()
        self.register_buffer("index", torch.tensor(index))

    def forward(self, x):
        return x.index_select(1, self.index)


class Shuffle(nn.Module):
    """A channel shuffle by views, or by space that becomes channels and back."""

    def __init__(self, groups, how="view"):
        super().__init__()
        self.groups, self.how = groups, how

    def forward(self, x):
        if self.how == "view":
            N, C, H, W = x.shape
            return x.view(N, self.groups, C // self.groups, H, W).transpose(1, 2).reshape(N, C, H, W)
        if self.how == "literal":
            C = x.size(1)
            return (
                x.reshape(x.size(0), C // self.groups, self.groups, x.size(2), x.shape[3]).transpose(1, 2).flatten(1, 2)
            )
        return x.unflatten(1, (self.groups, -1)).transpose(2, 1).contiguous().flatten(1, 2)


class Squeezed(nn.Module):
    """Squeeze and excitation by linear layers and views."""

    def __init__(self, channels, squeezed, how="view"):
        super().__init__()
        self.how, self.down, self.up = how, nn.Linear(channels, squeezed), nn.Linear(squeezed, channels)

    def forward(self, x):
        gate = torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3))))))
        if self.how == "view":
            return x * gate.view(x.size(0), x.size(1), 1, 1)
        return x * (gate[:, :, None, None] if self.how == "index" else gate.unsqueeze(-1).unsqueeze(-1))


class PadChannels(nn.Module):
    def __init__(self, before, after, value=0.0):
        super().__init__()
        self.widths, self.value = (0, 0, 0, 0, before, after), value

    def forward(self, x):
        return F.pad(x, self.widths, value=self.value)


class Gate(nn.Module):
    """Squeeze and excitation, or a gate over space."""

    def __init__(self, channels, squeezed, act="Sigmoid", over="channels"):
        super().__init__()
        self.over = over
        self.down, self.mid = nn.Conv2d(channels, squeezed, 1), nn.ReLU()
        self.up, self.act = nn.Conv2d(squeezed, channels if over == "channels" else 1, 1), getattr(nn, act)()

    def forward(self, x):
        seen = x.mean((2, 3), keepdim=True) if self.over == "channels" else x
        return x * self.act(self.up(self.mid(self.down(seen))))


class Scale(nn.Module):
    """Arithmetic with a parameter: one number a channel, an image position or in all."""

    def __init__(self, shape, how="*"):
        super().__init__()
        self.how, self.gamma = how, nn.Parameter(torch.rand(shape) + 0.5)

    def forward(self, x):
        return x * self.gamma if self.how == "*" else x + self.gamma if self.how == "+" else self.gamma - x


class Number(nn.Module):
    def __init__(self, how, number):
        super().__init__()
        self.how, self.number = how, number

    def forward(self, x):
        if self.how == "r-":
            return self.number - x
        return {"*": torch.mul, "+": torch.add, "/": torch.div}[self.how](x, self.number)


class Call(nn.Module):
    """An activation as a function or method."""

    def __init__(self, how, *args, **kwargs):
        super().__init__()
        self.how, self.args, self.kwargs = how, args, kwargs

    def forward(self, x):
        home = next(home for home in (F, torch) if hasattr(home, self.how))
        return getattr(home, self.how)(x, *self.args, **self.kwargs)


class Upsampled(nn.Module):
    def forward(self, x):
        return F.interpolate(x, scale_factor=2, mode="nearest")


class Head(nn.Module):
    def __init__(self, features, outputs, how):
        super().__init__()
        self.how, self.linear = how, nn.Linear(features, outputs)

    def forward(self, *tensors):
        if self.how == "mean":
            tensors = [x.mean((2, 3)) for x in tensors]
        elif self.how == "pool":
            tensors = [torch.flatten(F.adaptive_avg_pool2d(x, 1), 1) for x in tensors]
        else:
            tensors = [x.flatten(1) for x in tensors]
        return self.linear(tensors[0] if len(tensors) == 1 else torch.cat(tensors, 1))


class Network(nn.Module):
    """The network that runs a program; ``outputs`` are the numbers of the tensors that it returns.

    Two parts are more than a class: ``again`` calls the part of an earlier step once more, and ``tied`` is a copy of
    it that shares its weight.
    """

    def __init__(self, steps=(), outputs=(-1,)):
        super().__init__()
        self.steps, self.outputs, self.parts = [], outputs, nn.ModuleList()
        for step in steps:
            self.add(*step)

    def made(self, part, args, kwargs):
        """Return the module of a step."""
        if part == "again":
            return self.parts[args[0]]
        if part == "tied":
            twin = self.made(*self.steps[args[0]][:3])
            twin.weight = self.parts[args[0]].weight
            return twin
        return globals().get(part, getattr(nn, part, None))(*args, **kwargs)

    def add(self, part, args, kwargs, reads):
        module = self.made(part, args, kwargs)
        self.steps.append((part, args, kwargs, reads))
        self.parts.append(module)
        return module

    def forward(self, x):
        values = [x]
        for module, (_, _, _, reads) in zip(self.parts, self.steps, strict=True):
            found = module(*[values[index] for index in reads])
            values += [found[i] for i in range(module.yields)] if isinstance(module, Split) else [found]
        found = [values[index] for index in self.outputs]
        return found[0] if len(found) == 1 else tuple(found)


@dataclass
class Drawing:
    """A program in the making: the network so far, and its tensors for one input."""

    choose: object
    network: Network = field(default_factory=Network)
    values: list = field(default_factory=list)
    unread: list = field(default_factory=list)

    def put(self, part, args, reads, **kwargs):
        """Add a step, unless torch refuses it or it makes too much of too little."""
        network = self.network
        module = network.made(part, args, kwargs).eval()
        try:
            with torch.no_grad():
                found = module(*[self.values[index].clone() for index in reads])
        except (RuntimeError, ValueError):
            return False
        found = list(found) if isinstance(module, Split) else [found]
        if any(one.ndim == 4 and not (1 <= one.shape[1] <= 16 and 1 <= one.shape[2] <= 12) for one in found):
            return False
        network.steps.append((part, args, kwargs, reads))
        network.parts.append(module)
        self.unread = [index for index in self.unread if index not in reads]
        self.unread = [*range(len(self.values), len(self.values) + len(found)), *self.unread]
        self.values += found
        return True

    def tensor(self):
        """Return the number of a tensor to read: mostly one that nothing has read yet."""
        return self.choose([*(self.unread * 3 or [len(self.values) - 1]), *range(len(self.values) - 1, -1, -1)])

    def like(self, index, *, space_only=False):
        """Return the number of another tensor of the same shape."""
        start = 2 if space_only else 1
        others = [i for i, one in enumerate(self.values) if one.shape[start:] == self.values[index].shape[start:]]
        others = [i for i in others if i != index and i > 0] or others
        return self.choose(others[::-1])


ZERO_AT_ZERO = ("ReLU", "LeakyReLU", "SiLU", "GELU", "Hardswish", "Tanh", "PReLU", "ELU", "Softshrink")
OTHER = ("Sigmoid", "Softplus", "Hardsigmoid", "LogSigmoid")
FUNCTIONS = (("relu",), ("cos",), ("sigmoid",), ("tanh",), ("abs",), ("silu",), ("clamp", -0.5, 0.8), ("clamp", 0.2, 2))


def _conv(draw):
    choose, x = draw.choose, draw.tensor()
    C = draw.values[x].shape[1]
    out, kernel = choose((4, 6, 8, 3, 5, 2, 1)), choose((3, 1, 2))
    padding = choose((kernel // 2, 0, 1))
    mode = choose(("zeros", "zeros", "reflect", "replicate", "circular")) if padding else "zeros"
    bias, stride, dilation = choose((True, False)), choose((1, 1, 1, 2)), choose((1, 1, 1, 2))
    kwargs = {"padding": padding, "stride": stride, "dilation": dilation, "bias": bias, "padding_mode": mode}
    return draw.put("Conv2d", (C, out, kernel), (x,), **_plain(kwargs))


def _plain(kwargs):
    """Leave out what is torch's default."""
    usual = {"padding": 0, "stride": 1, "dilation": 1, "bias": True, "padding_mode": "zeros", "groups": 1}
    return {key: value for key, value in kwargs.items() if usual.get(key) != value}


def _same_conv(draw):
    """A 3 x 3 convolution that keeps the shape, as residual branches have."""
    x = draw.tensor()
    C = draw.values[x].shape[1]
    return draw.put("Conv2d", (C, C, 3), (x,), **_plain({"padding": 1, "bias": draw.choose((True, False))}))


def _grouped(draw):
    choose, x = draw.choose, draw.tensor()
    C = draw.values[x].shape[1]
    groups = choose([g for g in (2, C, 3, 4) if C % g == 0 and g > 1] or [1])
    out = groups * choose((1, 2, 3) if groups < 6 else (1, 2))
    kernel, bias, stride = choose((3, 1)), choose((True, False)), choose((1, 1, 2))
    kwargs = {"groups": groups, "padding": choose((kernel // 2, 0)), "bias": bias, "stride": stride}
    return draw.put("Conv2d", (C, out, kernel), (x,), **_plain(kwargs))


def _transposed(draw):
    choose, x = draw.choose, draw.tensor()
    C = draw.values[x].shape[1]
    groups = choose([1, 1, *[g for g in (2, C) if C % g == 0]])
    kernel, stride = choose((2, 3, 1)), choose((1, 2))
    kwargs = {"groups": groups, "stride": stride, "padding": choose((0, kernel // 2)), "bias": choose((True, False))}
    if stride > 1 and choose((False, True)):
        kwargs["output_padding"] = 1
    return draw.put("ConvTranspose2d", (C, groups * choose((2, 1, 3)), kernel), (x,), **_plain(kwargs))


def _norm(draw):
    choose, x = draw.choose, draw.tensor()
    C = draw.values[x].shape[1]
    kind = choose(("BatchNorm2d", "BatchNorm2d", "BatchNorm2d", "GroupNorm", "InstanceNorm2d", "plain"))
    if kind == "plain":
        return draw.put("BatchNorm2d", (C,), (x,), **choose(({"affine": False}, {"track_running_stats": False})))
    if kind == "GroupNorm":
        groups = choose([g for g in (2, 1, 3, 4, C) if C % g == 0])
        return draw.put(kind, (groups, C), (x,), **choose(({}, {}, {"affine": False})))
    more = {} if kind == "BatchNorm2d" else choose(({"affine": True}, {}, {"track_running_stats": True}))
    return draw.put(kind, (C,), (x,), **more)


def _activation(draw):
    choose, x = draw.choose, draw.tensor()
    how = choose(("ReLU", "ReLU", "zero", "other", "function", "inplace", "prelu"))
    if how == "zero":
        return draw.put(choose(ZERO_AT_ZERO), (), (x,))
    if how == "other":
        return draw.put(choose(OTHER), (), (x,))
    if how == "function":
        found = choose(FUNCTIONS)
        more = {"inplace": True} if found == ("relu",) and choose((False, True)) else {}
        return draw.put("Call", found, (x,), **more)
    if how == "inplace":
        return draw.put(choose(("ReLU", "ReLU6", "SiLU", "Hardswish", "ELU", "Hardsigmoid")), (), (x,), inplace=True)
    if how == "prelu":
        return draw.put("PReLU", (draw.values[x].shape[1],), (x,))
    return draw.put("ReLU", (), (x,))


def _add(draw):
    x = draw.tensor()
    return draw.put("Add", (draw.choose(("+", "+", "+", "-", "add", "+=")),), (x, draw.like(x)))


def _times(draw):
    x = draw.tensor()
    return draw.put("Times", (draw.choose(("*", "*", "max", "min", "*=")),), (x, draw.like(x)))


def _cat(draw):
    x = draw.tensor()
    others = [draw.like(x, space_only=True) for _ in range(draw.choose((1, 2)))]
    return draw.put("Cat", (), (x, *others))


def _split(draw):
    choose, x = draw.choose, draw.tensor()
    C = draw.values[x].shape[1]
    if C < 2:
        return False
    how = choose(("chunk", "split", "sizes", "tensor_split"))
    if how in ("chunk", "tensor_split"):
        pieces = choose((2, 3))
        return draw.put("Split", (how, pieces, len(getattr(torch.empty(C), how)(pieces))), (x,))
    first = choose(range(1, C))
    where = [first, C - first] if how == "sizes" else first
    return draw.put("Split", ("split", where, len(torch.empty(C).split(where))), (x,))


def _part(draw):
    choose, x = draw.choose, draw.tensor()
    C = draw.values[x].shape[1]
    start = choose(range(C))
    length = choose(range(C - start, 0, -1))
    how = choose(("slice", "narrow", "index"))
    if how == "narrow":
        return draw.put("Narrow", (start, length), (x,))
    if how == "index":
        return draw.put("Taken", ([choose(range(C)) for _ in range(length)],), (x,))
    return draw.put("Sliced", (start, start + length, choose((1, 2)), choose((1, 2))), (x,))


def _pad(draw):
    choose, x = draw.choose, draw.tensor()
    if choose((True, False)):
        return draw.put("PadChannels", (choose((0, 1, 2)), choose((1, 2, 0)), choose((0.0, 0.0, 0.5))), (x,))
    kind = choose(("ZeroPad2d", "ReflectionPad2d", "ReplicationPad2d"))
    return draw.put(kind, (1,), (x,))


def _gate(draw):
    choose, x = draw.choose, draw.tensor()
    C = draw.values[x].shape[1]
    act, over = choose(("Sigmoid", "Hardsigmoid", "Tanh")), choose(("channels", "channels", "space", "linear"))
    if over == "linear":
        return draw.put("Squeezed", (C, choose((2, 3)), choose(("view", "index", "unsqueeze"))), (x,))
    return draw.put("Gate", (C, choose((2, 1, 3)), act, over), (x,))


def _pool(draw):
    choose, x = draw.choose, draw.tensor()
    kernel = choose((2, 3))
    kwargs = {"stride": choose((2, 1)), "padding": choose((0, 1))}
    if choose((True, False)):
        return draw.put("MaxPool2d", (kernel,), (x,), **kwargs)
    more = choose(({}, {"count_include_pad": False}, {"ceil_mode": True}, {"divisor_override": 3}))
    return draw.put("AvgPool2d", (kernel,), (x,), **kwargs, **more)


def _upsample(draw):
    x = draw.tensor()
    how = draw.choose(("nearest", "bilinear", "function"))
    if how == "function":
        return draw.put("Upsampled", (), (x,))
    return draw.put("Upsample", (), (x,), scale_factor=2, mode=how)


def _scale(draw):
    choose, x = draw.choose, draw.tensor()
    C, H, W = draw.values[x].shape[1:]
    shape = choose(((1, C, 1, 1), (C, 1, 1), (1,), (1, 1, H, W), (C, H, W)))
    return draw.put("Scale", (shape, choose(("*", "+", "-"))), (x,))


def _number(draw):
    x = draw.tensor()
    return draw.put("Number", draw.choose((("*", 0.5), ("+", 0.25), ("r-", 1.0), ("/", 3.0))), (x,))


def _other(draw):
    x = draw.tensor()
    return draw.put(draw.choose(("Dropout", "Dropout2d", "Identity")), (), (x,))


def _shuffle(draw):
    choose, x = draw.choose, draw.tensor()
    C = draw.values[x].shape[1]
    groups = choose([g for g in (2, 3, 4, C) if C % g == 0] or [1])
    how = choose(("view", "literal", "unflatten", "module", "pixels", "unpixels"))
    if how in ("pixels", "unpixels"):
        return draw.put("PixelShuffle" if how == "pixels" else "PixelUnshuffle", (2,), (x,))
    return draw.put("ChannelShuffle", (groups,), (x,)) if how == "module" else draw.put("Shuffle", (groups, how), (x,))


def _again(draw):
    """Call an earlier layer once more, or make one that shares its weight."""
    x = draw.tensor()
    C = draw.values[x].shape[1]
    fits = [
        index
        for index, module in enumerate(draw.network.parts)
        if C in (getattr(module, "in_channels", None), getattr(module, "num_features", None))
        and draw.network.steps[index][0] not in ("again", "tied")
    ]
    if not fits:
        return _same_conv(draw)
    index = draw.choose(fits)
    tied = draw.choose((False, True)) and isinstance(draw.network.parts[index], nn.Conv2d)
    return draw.put("tied" if tied else "again", (index,), (x,))


STEPS = (
    _conv, _conv, _conv, _norm, _activation, _same_conv, _add, _norm, _activation, _cat, _grouped, _pool, _split,
    _gate, _part, _pad, _scale, _times, _transposed, _upsample, _number, _other, _again, _shuffle,
)  # fmt: skip


def draw_network(choose, most=14):
    """Return a network and an input for it, drawn by ``choose``."""
    size = choose((6, 8, 5))
    draw = Drawing(choose, values=[torch.randn(2, 3, size, size)], unread=[0])
    with torch.random.fork_rng():
        _conv(draw)
        for _ in range(choose(range(2, most))):
            choose(STEPS)(draw)
        _heads(draw)
    return draw.network, (2, 3, size, size)


def _heads(draw):
    """End in one or two heads, which read most of what nothing has read."""
    outputs = []
    for _ in range(draw.choose((1, 1, 2))):
        x = draw.unread[0] if draw.unread else draw.tensor()
        if draw.values[x].ndim != 4:
            x = draw.choose([i for i, one in enumerate(draw.values) if one.ndim == 4])
        how = draw.choose(("mean", "pool", "flatten", "map"))
        if how == "map":
            outputs.append(x)
            draw.unread = [index for index in draw.unread if index != x]
            continue
        reads = [x, *(i for i in draw.unread if i != x and draw.values[i].ndim == 4)][: draw.choose((4, 1))]
        sizes = [draw.values[i].shape[1:] for i in reads]
        features = sum(one.numel() if how == "flatten" else one[0] for one in sizes)
        draw.put("Head", (features, 3, how), tuple(reads))
        outputs.append(len(draw.values) - 1)
    draw.network.outputs = tuple(dict.fromkeys(outputs))


def draw_plan(choose, model):
    """Return a plan that removes filters at random from a random part of the layers; ``None`` if there are none."""
    rng, keep = np.random.default_rng(choose(range(1000))), {}
    for name, layer in graph.prunable(model).items():
        rate = choose((0.5, 0.5, None, 0.3, 0.8, 1.0, 0.0))
        if rate is not None:
            count = layer.out_channels
            keep[name] = np.sort(rng.permutation(count)[: max(1, round(count * (1 - rate)))])
    return Plan(keep) if keep else None


@dataclass
class Case:
    """A network in float64 with random statistics, a plan, inputs, and how to compact it."""

    model: Network
    plan: Plan
    x: torch.Tensor
    options: dict

    def __repr__(self):
        keep = {name: kept.tolist() for name, kept in self.plan.keep.items()}
        steps = "".join(f"\n    {step!r}," for step in self.model.steps)
        shape, outputs = tuple(self.x.shape), self.model.outputs
        return f"case([{steps}\n], {outputs}, {keep}, {shape}, **{self.options})"


def case(steps, outputs, keep, shape, **options):
    """Return a case as one was printed."""
    torch.manual_seed(0)
    model = checking.randomised(Network(steps, outputs))
    return Case(model, Plan(keep), torch.randn(shape, dtype=torch.float64), options)


MODES = ("scatter", "scatter", "intersect", "union")


def draw_case(choose, most=14):
    """Return a random case; ``None`` if the plan names no layer, or torch refuses the network."""
    network, shape = draw_network(choose, most)
    plan = draw_plan(choose, network)
    if plan is None:
        return None
    options = {"residual": choose(MODES), "round_to": choose((1, 1, 2, 4, 8))}
    found = case(network.steps, network.outputs, plan.keep, shape, **options)
    try:
        with torch.no_grad():
            found.model(found.x.clone())
    except RuntimeError:  # two parts of one tensor are written over each other, which torch refuses
        return None
    return found


def seeded_case(seed, most=14):
    """Return the case that a plain random generator draws."""
    generator = random.Random(seed)  # noqa: S311
    return draw_case(lambda options: generator.choice(list(options)), most)


def check(found, **more):
    """Compact a case and hold the result against all that is promised; return it."""
    options = {**found.options, **more}
    slim = checking.check(found.model, found.plan, found.x, **options)
    checking.assert_masks_are_honest(found.model, found.plan, torch.cat([found.x, found.x.roll(1, -1) * 1.5 - 0.2]))
    assert_accounted_for(found.model, found.plan, slim, options.get("round_to", 1))
    return slim


def assert_accounted_for(model, plan, slim, round_to):
    """Check that every filter of a planned layer left by the plan or beyond it, or stays for a reason; and rounding."""
    layers, sizes = graph.prunable(model), dict(slim.model.named_modules())
    for name, kept in plan.keep.items():
        count, stays = layers[name].out_channels, slim.kept.get(name, {})
        assert set(stays).isdisjoint(kept.tolist())
        assert all(reason.strip() for reason in stays.values())
        gone = count - len(kept) - len(stays) + len(slim.beyond.get(name, ()))
        left = sizes[name].out_channels if name in sizes else count
        assert left == count - gone, f"{name} has {left} filters, and {count - gone} are accounted for"
        assert left % round_to == 0 or left == count, f"{name} has {left} filters"


def strength(seeds, most=14):
    """Return the :class:`zoo.checking.Count` of random networks compacted in the default mode."""
    total = checking.Count()
    for seed in seeds:
        if (found := seeded_case(seed, most)) is not None:
            slim = checking.pp.compact(found.model, found.plan, found.x, latency=False, verify=False)
            total.add(checking.count(found.model, found.plan, found.x, slim))
    return total
