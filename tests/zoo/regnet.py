"""RegNet: bottlenecks without a waist, grouped in the middle, with or without squeeze and excitation."""

import torch
from torch import nn

from zoo.entries import Entry
from zoo.mobilenet import Squeeze, unit


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride, per_group, squeezed):
        super().__init__()
        self.first = unit(inputs, outputs, 1, act=nn.ReLU)
        self.middle = unit(outputs, outputs, 3, stride, outputs // per_group, nn.ReLU)
        self.squeeze = Squeeze(outputs, max(1, inputs // 4)) if squeezed else nn.Identity()
        self.last = unit(outputs, outputs, 1, act=None)
        self.project = unit(inputs, outputs, 1, stride, act=None) if inputs != outputs or stride > 1 else None

    def forward(self, x):
        y = self.last(self.squeeze(self.middle(self.first(x))))
        return torch.relu((x if self.project is None else self.project(x)) + y)


class RegNet(nn.Module):
    def __init__(self, depths, widths, per_group, squeezed=False, stem=32, classes=10):
        super().__init__()
        blocks, channels = [], stem
        for depth, width in zip(depths, widths, strict=True):
            for i in range(depth):
                blocks.append(Block(channels, width, 1 if i else 2, per_group, squeezed))
                channels = width
        self.body = nn.Sequential(unit(3, stem, 3, 2, act=nn.ReLU), *blocks)
        self.pool, self.head = nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(channels, classes)

    def forward(self, x):
        return self.head(self.pool(self.body(x)).flatten(start_dim=1))


ENTRIES = [
    Entry(
        "RegNet X",
        lambda: RegNet((1, 2), (8, 16), 4, stem=8),
        (2, 3, 32, 32),
        99,
        lambda: RegNet((1, 1, 4, 7), (24, 56, 152, 368), 8),
        run=4,
    ),
    Entry(
        "RegNet Y",
        lambda: RegNet((1, 2), (8, 16), 4, True, stem=8),
        (2, 3, 32, 32),
        99,
        lambda: RegNet((1, 1, 4, 7), (24, 56, 152, 368), 8, True),
        run=4,
    ),
]
