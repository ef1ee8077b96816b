"""Minimal networks, one for every way in which channels depend on each other, each with one plan by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn


class Net(nn.Module):
    """One or two convolutions of the images, ``between``, which calls them, and a layer that reads what it makes."""

    def __init__(self, between, end, **parts):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1)
        self.between, self.end = between, end
        for name, part in parts.items():
            (setattr if isinstance(part, nn.Module | nn.Parameter) else nn.Module.register_buffer)(
                self, name, copy.deepcopy(part)
            )

    def forward(self, x):
        y = self.between(self, x)
        return y if self.end is None else self.end(y)


class Branching(Net):
    """One whose forward torch.fx cannot follow."""

    def forward(self, x):
        if x.shape[2] > 100:
            x = F.avg_pool2d(x, 2)
        return super().forward(x)


A, B = [0, 2, 3, 5, 7], [1, 2, 3, 6, 7]  # what a plan keeps of the layers a and b
SAME = {"a": A, "b": A}


@dataclass(frozen=True)
class Trap:
    """How to build it, and what is kept.

    ``reads`` is the number of channels that the end takes; ``tied`` gives the parts m and n one weight.
    """

    between: Callable
    keep: dict = field(default_factory=lambda: {"a": A})
    reads: int = 8
    parts: dict = field(default_factory=dict)
    end: nn.Module | None = None
    kind: type[Net] = Net
    shape: tuple[int, ...] = (2, 3, 8, 8)
    tied: bool = False

    def build(self):
        torch.manual_seed(0)
        end = nn.Conv2d(self.reads, 4, 3, padding=1) if self.end is None else self.end
        model = self.kind(self.between, copy.deepcopy(end), **self.parts)
        if self.tied:
            model.m.weight = model.n.weight
        called = set()
        hooks = [layer.register_forward_hook(lambda one, *_: called.add(one)) for layer in (model.a, model.b)]
        model(torch.zeros(self.shape))
        for hook in hooks:
            hook.remove()
        for name in ("a", "b"):
            if getattr(model, name) not in called:  # nothing may look smaller because of it
                delattr(model, name)
        return model


def conv(inputs=8, filters=8, size=3, **options):
    return nn.Conv2d(inputs, filters, size, padding=options.pop("padding", size // 2), **options)


def shuffled(x, groups):
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


def normed(x, norm):
    return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def halves(x):
    u, v = x.chunk(2, 1)
    return u, v


def uneven(x):
    u, v = x.split([3, 5], 1)
    return u, v


def option_a(x):
    return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))


def weight_normed():
    return nn.utils.parametrizations.weight_norm(conv())


FLAT = nn.Sequential(nn.Flatten(), nn.Linear(8 * 64, 4))
OPEN = nn.Conv2d(8, 4, 3)
M = {"m": conv()}
MN = {"m": conv(), "n": conv()}
NORM = {"norm": nn.BatchNorm2d(8)}

TRAPS = {
    # chains
    "chain": Trap(lambda s, x: s.a(x).relu()),
    "chain with norms": Trap(
        lambda s, x: s.after(s.m(s.norm(s.a(x)).relu())).relu(),
        {"a": A, "m": B}, parts={**M, **NORM, "after": nn.BatchNorm2d(8)},
    ),
    "pools and upsampling": Trap(lambda s, x: F.interpolate(F.max_pool2d(s.a(x), 2), scale_factor=2)),
    "slopes": Trap(lambda s, x: s.m(s.a(x)), parts={"m": nn.PReLU(8)}),
    "flatten, linear": Trap(lambda s, x: s.a(x).relu(), end=FLAT),
    "view, linear": Trap(lambda s, x: s.m(s.a(x).relu().view(x.shape[0], -1))[:, :, None, None],
                         parts={"m": nn.Linear(512, 8)}),
    "mean, linear": Trap(lambda s, x: s.a(x).mean((2, 3)), end=nn.Linear(8, 4)),
    # sums
    "sum, the same filters": Trap(lambda s, x: (s.a(x) + s.b(x)).relu(), SAME),
    "sum, differing filters": Trap(lambda s, x: (s.a(x) + s.b(x)).relu(), {"a": A, "b": B}),
    "sum, one side": Trap(lambda s, x: (s.a(x) + s.b(x)).relu()),
    "residual block": Trap(lambda s, x: (lambda y: (y + s.norm(s.m(y))).relu())(s.a(x).relu()), {"a": A, "m": B},
                           parts={**M, **NORM}),
    "pre-activation": Trap(lambda s, x: (lambda y: y + s.m(s.norm(y).relu()))(s.a(x)), {"a": A, "m": A},
                           parts={**M, **NORM}),
    "shortcut that pads channels": Trap(
        lambda s, x: (lambda y: option_a(y) + s.m(y))(s.a(x).relu()),
        {"a": A, "m": [0, 1, 2, 4, 5, 7, 9, 11]}, reads=12, parts={"m": conv(8, 12, stride=2)},
    ),
    "difference": Trap(lambda s, x: (s.a(x) - s.b(x)).relu(), SAME),
    # concatenations and splits
    "concatenation": Trap(lambda s, x: torch.cat([s.a(x), s.b(x)], 1), {"a": A, "b": B}, reads=16),
    "concatenation, one twice": Trap(lambda s, x: (lambda y: torch.cat([y, s.b(x), y.relu()], 1))(s.a(x)),
                                     {"a": A, "b": B}, reads=24),
    "concatenation with the images": Trap(lambda s, x: torch.cat([x, s.a(x)], 1), reads=11),
    "concatenation, norm": Trap(lambda s, x: s.m(torch.cat([s.a(x), s.b(x)], 1)).relu(), {"a": A, "b": B}, reads=16,
                                parts={"m": nn.BatchNorm2d(16)}),
    "concatenation, flatten": Trap(lambda s, x: torch.cat([s.a(x), s.b(x)], 1), {"a": A, "b": B},
                                   end=nn.Sequential(nn.Flatten(), nn.Linear(16 * 64, 4))),
    "chunk": Trap(lambda s, x: (lambda u, v: s.m(u) + s.n(v))(*halves(s.a(x))),
                  parts={"m": conv(4), "n": conv(4)}),
    "uneven split": Trap(lambda s, x: (lambda u, v: s.m(u) + s.n(v))(*uneven(s.a(x))),
                         parts={"m": conv(3), "n": conv(5)}),
    "slices": Trap(lambda s, x: (lambda y: s.m(y[:, :4]) + s.n(y[:, 4:]))(s.a(x)),
                   parts={"m": conv(4), "n": conv(4)}),
    "gated halves": Trap(lambda s, x: (lambda u, v: u * v.sigmoid())(*halves(s.a(x))), reads=4),
    "halves, one passes": Trap(lambda s, x: (lambda u, v: torch.cat([u, s.m(v)], 1))(*halves(s.a(x).relu())),
                               {"a": A, "m": [1, 3]}, parts={"m": conv(4, 4)}),
    # views
    "channel shuffle": Trap(lambda s, x: shuffled(s.a(x), 2)),
    "channel shuffle by a module": Trap(lambda s, x: s.m(s.a(x)), parts={"m": nn.ChannelShuffle(2)}),
    "pixel shuffle": Trap(lambda s, x: F.pixel_shuffle(s.a(x), 2), {"a": [0, 1, 2, 3]}, reads=2),
    "linear over pixels": Trap(lambda s, x: s.m(s.a(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
                               parts={"m": nn.Linear(8, 8)}),
    # grouped layers
    "depthwise": Trap(lambda s, x: s.m(s.a(x)).relu(), parts={"m": conv(groups=8, bias=False)}),
    "depthwise with a bias": Trap(lambda s, x: s.m(s.a(x)).relu(), parts={"m": conv(groups=8)}),
    "depthwise with a multiplier": Trap(lambda s, x: s.m(s.a(x)).relu(), reads=16,
                                        parts={"m": conv(8, 16, groups=8, bias=False)}),
    "groups, as many of each": Trap(lambda s, x: s.m(s.a(x)).relu(), {"a": [0, 2, 5, 7]},
                                    parts={"m": conv(groups=2)}),
    "groups, unevenly": Trap(lambda s, x: s.m(s.a(x)).relu(), parts={"m": conv(groups=2)}),
    "filters of groups": Trap(lambda s, x: s.m(s.a(x)).relu(), {"m": [0, 2, 5, 7]}, parts={"m": conv(groups=2)}),
    "a whole group": Trap(lambda s, x: s.m(s.a(x)).relu(), {"a": [0, 1, 2, 3], "m": [0, 1, 2, 3]},
                          parts={"m": conv(groups=2)}),
    "transposed": Trap(lambda s, x: s.m(s.a(x)).relu(), {"a": A, "m": B}, parts={"m": nn.ConvTranspose2d(8, 8, 2, 2)}),
    "transposed in groups": Trap(lambda s, x: s.m(s.a(x)).relu(), {"a": [0, 2, 5, 7]},
                                 parts={"m": nn.ConvTranspose2d(8, 8, 2, 2, groups=2)}),
    # norms
    "group norm": Trap(lambda s, x: s.m(s.a(x)).relu(), parts={"m": nn.GroupNorm(4, 8)}),
    "group norm, whole groups": Trap(lambda s, x: s.m(s.a(x)).relu(), {"a": [0, 1, 4, 5]},
                                     parts={"m": nn.GroupNorm(4, 8)}),
    "instance norm": Trap(lambda s, x: s.m(s.a(x)).relu(), parts={"m": nn.InstanceNorm2d(8, affine=True)}),
    "norm without parameters": Trap(lambda s, x: s.m(s.a(x)).relu(), parts={"m": nn.BatchNorm2d(8, affine=False)}),
    "layer norm over channels": Trap(lambda s, x: normed(s.a(x), s.m), parts={"m": nn.LayerNorm(8)}),
    # activations that make something of zero
    "sigmoid, no padding": Trap(lambda s, x: s.a(x).sigmoid(), end=OPEN),
    "sigmoid, zero padding": Trap(lambda s, x: s.a(x).sigmoid()),
    "sigmoid, linear": Trap(lambda s, x: s.a(x).sigmoid(), end=FLAT),
    "softmax over channels": Trap(lambda s, x: s.a(x).softmax(1)),
    # products, parameters
    "product": Trap(lambda s, x: s.a(x) * s.b(x), {"a": A, "b": B}),
    "squeeze and excitation": Trap(
        lambda s, x: (lambda y: y * s.n(s.m(y.mean((2, 3), keepdim=True)).relu()).sigmoid())(s.a(x)),
        {"a": A, "m": [0, 2, 3]}, parts={"m": conv(8, 4, 1), "n": conv(4, 8, 1)},
    ),
    "scale": Trap(lambda s, x: s.a(x) * s.gamma,
                  parts={"gamma": nn.Parameter(torch.linspace(0.5, 2, 8).view(1, 8, 1, 1))}),
    "shift": Trap(lambda s, x: (s.a(x) + s.beta).relu(),
                  parts={"beta": nn.Parameter(torch.linspace(0.5, 2, 8).view(8, 1, 1))}),
    "scale in a buffer": Trap(lambda s, x: s.a(x) * s.gamma, parts={"gamma": torch.linspace(0.5, 2, 8).view(8, 1, 1)}),
    # reuse and computed weights
    "a layer that runs twice": Trap(lambda s, x: s.m(s.m(s.a(x)).relu()), {"a": A, "m": A}, parts=M),
    "a layer on two levels": Trap(lambda s, x: s.m(s.a(x)) + s.m(s.b(x)).relu(), {"a": A, "b": A, "m": B}, parts=M),
    "tied weights": Trap(lambda s, x: s.m(s.a(x)).relu() + s.n(s.b(x)).relu(), SAME, parts=MN, tied=True),
    "weight norm": Trap(lambda s, x: s.m(s.a(x)).relu(), {"a": A, "m": B}, parts={"m": weight_normed()}),
    # others
    "one dimension": Trap(lambda s, x: s.m(s.a(x).flatten(2)).relu()[:, :, :, None], {"m": B},
                          parts={"m": nn.Conv1d(8, 8, 3, padding=1)}),
    "three dimensions": Trap(lambda s, x: s.n(s.m(x[:, :, None])).relu().squeeze(2), {"m": A, "n": B},
                             parts={"m": nn.Conv3d(3, 8, (1, 3, 3)), "n": nn.Conv3d(8, 8, (1, 3, 3))}),
    "branches by shape": Trap(lambda s, x: s.m(s.a(x).relu()).relu(), {"a": A, "m": B}, parts=M, kind=Branching),
}  # fmt: skip
