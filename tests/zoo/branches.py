"""Networks of parallel branches that are concatenated: SqueezeNet, GoogLeNet, later Inceptions."""

import torch
import torch.nn.functional as F
from torch import nn

from zoo.entries import Entry


class Fire(nn.Module):
    def __init__(self, inputs, less, more):
        super().__init__()
        self.squeeze, self.left = nn.Conv2d(inputs, less, 1), nn.Conv2d(less, more, 1)
        self.right, self.relu = nn.Conv2d(less, more, 3, padding=1), nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.relu(self.squeeze(x))
        return torch.cat([F.relu(self.left(x)), F.relu(self.right(x))], 1)


def squeezenet(stem, fires, classes=10):
    """Take (squeezed, expanded) for each fire, and None for a pool."""
    layers, channels = [nn.Conv2d(3, stem, 3, stride=2), nn.ReLU(True), nn.MaxPool2d(3, 2, ceil_mode=True)], stem
    for fire in fires:
        layers.append(nn.MaxPool2d(3, 2, ceil_mode=True) if fire is None else Fire(channels, *fire))
        channels = channels if fire is None else 2 * fire[1]
    head = [nn.Dropout(0.5), nn.Conv2d(channels, classes, 1), nn.ReLU(True), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(nn.Sequential(*layers), nn.Sequential(*head))


class Unit(nn.Module):
    """A convolution, a norm and an activation."""

    def __init__(self, inputs, outputs, kernel, stride=1, padding=None):
        super().__init__()
        padding = (
            (tuple(k // 2 for k in kernel) if isinstance(kernel, tuple) else kernel // 2)
            if padding is None
            else padding
        )
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Inception(nn.Module):
    """Four branches: 1x1, 3x3, 5x5 and a pool."""

    def __init__(self, inputs, one, three_less, three, five_less, five, pooled):
        super().__init__()
        self.one = Unit(inputs, one, 1)
        self.three = nn.Sequential(Unit(inputs, three_less, 1), Unit(three_less, three, 3))
        self.five = nn.Sequential(Unit(inputs, five_less, 1), Unit(five_less, five, 5))
        self.pooled = nn.Sequential(nn.MaxPool2d(3, 1, 1, ceil_mode=True), Unit(inputs, pooled, 1))

    def forward(self, x):
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pooled(x)], 1)


class GoogLeNet(nn.Module):
    def __init__(self, stem, blocks, classes=10):
        super().__init__()
        pool = [nn.MaxPool2d(3, 2, ceil_mode=True)]
        layers, channels = [Unit(3, stem, 7, 2), *pool, Unit(stem, stem, 1), Unit(stem, 3 * stem, 3), *pool], 3 * stem
        for block in blocks:
            layers += pool if block is None else [Inception(channels, *block)]
            channels = channels if block is None else block[0] + block[2] + block[4] + block[5]
        self.layers, self.drop, self.head = nn.Sequential(*layers), nn.Dropout(0.2), nn.Linear(channels, classes)

    def forward(self, x):
        return self.head(self.drop(torch.flatten(F.adaptive_avg_pool2d(self.layers(x), (1, 1)), 1)))


class Reduction(nn.Module):
    """Halve the map: a strided branch, a deeper one, and a pool without parameters."""

    def __init__(self, inputs, width):
        super().__init__()
        self.short = Unit(inputs, width, 3, 2, 0)
        self.deep = nn.Sequential(Unit(inputs, width, 1), Unit(width, width, 3), Unit(width, width, 3, 2, 0))

    def forward(self, x):
        return torch.cat([self.short(x), self.deep(x), F.max_pool2d(x, kernel_size=3, stride=2)], 1)


class Factored(nn.Module):
    """Branches of 1xn and nx1 kernels, one that forks at its end, and an average pool."""

    def __init__(self, inputs, width, kernel):
        super().__init__()
        flat, tall = (1, kernel), (kernel, 1)
        self.one, self.pooled = Unit(inputs, width, 1), Unit(inputs, width, 1)
        self.long = nn.Sequential(Unit(inputs, width, 1), Unit(width, width, flat), Unit(width, width, tall))
        self.start, self.end1, self.end2 = Unit(inputs, width, 1), Unit(width, width, flat), Unit(width, width, tall)

    def forward(self, x):
        fork = self.start(x)
        fork = torch.cat([self.end1(fork), self.end2(fork)], 1)
        pooled = self.pooled(F.avg_pool2d(x, kernel_size=3, stride=1, padding=1))
        return torch.cat([self.one(x), self.long(x), fork, pooled], 1)


def inception(stem, width, blocks, classes=10):
    layers, channels = [Unit(3, stem, 3, 2, 0), Unit(stem, 2 * stem, 3), nn.MaxPool2d(3, 2)], 2 * stem
    for count in blocks:
        for _ in range(count):
            layers.append(Factored(channels, width, 7))
            channels = 5 * width
        layers.append(Reduction(channels, width))
        channels += 2 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Dropout(), nn.Flatten(), nn.Linear(channels, classes))


GOOGLE = (
    (64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64), None, (192, 96, 208, 16, 48, 64),
    (160, 112, 224, 24, 64, 64), (128, 128, 256, 24, 64, 64), (112, 144, 288, 32, 64, 64),
    (256, 160, 320, 32, 128, 128), None, (256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128),
)  # fmt: skip
FIRES = (
    (16, 64), (16, 64), (32, 128), None, (32, 128), (48, 192), (48, 192), (64, 256), None, (64, 256),
)  # fmt: skip
ENTRIES = [
    Entry(
        "SqueezeNet",
        lambda: squeezenet(8, ((3, 6), (4, 6), None, (4, 8))),
        (2, 3, 32, 32),
        99,
        lambda: squeezenet(96, FIRES),
        heads=("1.1",),
    ),
    Entry(
        "GoogLeNet",
        lambda: GoogLeNet(6, ((4, 4, 6, 3, 4, 4), (6, 4, 6, 3, 4, 4), None, (4, 4, 6, 3, 4, 4))),
        (2, 3, 32, 32),
        99,
        lambda: GoogLeNet(64, GOOGLE),
    ),
    Entry(
        "Inception, factored",
        lambda: inception(6, 5, (1, 1)),
        (2, 3, 48, 48),
        99,
        lambda: inception(32, 128, (2, 4)),
        (2, 3, 96, 96),
    ),
]
