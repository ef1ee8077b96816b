"""ShuffleNet v1 and v2: grouped 1x1 convolutions, chunks, and channels that change places."""

import torch
import torch.nn.functional as F
from torch import nn

from zoo.entries import Entry


def shuffled(x, groups):
    """Deal the channels of every group out, one by one."""
    n, c, h, w = x.size()
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


class Grouped(nn.Module):
    """The unit of the first version."""

    def __init__(self, inputs, outputs, stride, groups, first_groups):
        super().__init__()
        wide, out = outputs // 4, outputs - inputs if stride == 2 else outputs
        self.stride, self.groups = stride, groups
        self.conv1 = nn.Conv2d(inputs, wide, 1, groups=first_groups, bias=False)
        self.conv2 = nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False)
        self.conv3 = nn.Conv2d(wide, out, 1, groups=groups, bias=False)
        self.norm1, self.norm2, self.norm3 = nn.BatchNorm2d(wide), nn.BatchNorm2d(wide), nn.BatchNorm2d(out)
        self.pool = nn.AvgPool2d(3, 2, 1)

    def forward(self, x):
        y = shuffled(F.relu(self.norm1(self.conv1(x))), self.groups)
        y = self.norm3(self.conv3(self.norm2(self.conv2(y))))
        return F.relu(torch.cat((self.pool(x), y), 1) if self.stride == 2 else x + y)


def branch(inputs, outputs, stride, first=True):
    layers = [nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(True)] if first else []
    wide = outputs if first else inputs
    layers += [nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide)]
    return nn.Sequential(
        *layers, nn.Conv2d(wide, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class Split(nn.Module):
    """The unit of the second version: half of the channels pass by."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        half = outputs // 2
        self.left = branch(inputs, half, stride, first=False) if stride == 2 else None
        self.right = branch(inputs if stride == 2 else half, half, stride)

    def forward(self, x):
        if self.left is None:
            left, right = x.chunk(2, dim=1)
            x = torch.cat((left, self.right(right)), dim=1)
        else:
            x = torch.cat((self.left(x), self.right(x)), dim=1)
        return shuffled(x, 2)


def stem(width):
    layers = [nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.MaxPool2d(3, 2, 1))


class ShuffleNet1(nn.Module):
    def __init__(self, depths, width, first, groups=3, classes=10):
        super().__init__()
        units, channels = [], first
        for i, depth in enumerate(depths):
            for j in range(depth):
                start = 1 if i == j == 0 else groups
                units.append(Grouped(channels, width * 2**i, 1 if j else 2, groups, start))
                channels = width * 2**i
        self.stem, self.units, self.head = stem(first), nn.Sequential(*units), nn.Linear(channels, classes)

    def forward(self, x):
        x = self.units(self.stem(x))
        return self.head(F.adaptive_avg_pool2d(x, 1).view(x.size(0), -1))


class ShuffleNet2(nn.Module):
    def __init__(self, depths, widths, first=24, last=1024, classes=10):
        super().__init__()
        units, channels = [], first
        for depth, width in zip(depths, widths, strict=True):
            for j in range(depth):
                units.append(Split(channels, width, 1 if j else 2))
                channels = width
        self.stem, self.units = stem(first), nn.Sequential(*units)
        self.last = nn.Sequential(nn.Conv2d(channels, last, 1, bias=False), nn.BatchNorm2d(last), nn.ReLU(True))
        self.head = nn.Linear(last, classes)

    def forward(self, x):
        return self.head(self.last(self.units(self.stem(x))).mean([2, 3]))


ENTRIES = [
    Entry(
        "ShuffleNet v1",
        lambda: ShuffleNet1((2, 2), 24, 12),
        (2, 3, 32, 32),
        35,
        lambda: ShuffleNet1((4, 8, 4), 240, 24),
        run=2,
    ),
    Entry(
        "ShuffleNet v2",
        lambda: ShuffleNet2((2, 2), (16, 24), 8, 24),
        (2, 3, 32, 32),
        88,
        lambda: ShuffleNet2((4, 8, 4), (116, 232, 464)),
    ),
]
