"""Residual networks: basic and bottleneck blocks, shortcuts A to D, pre-activation, groups and group norms."""

import torch
import torch.nn.functional as F
from torch import nn

from zoo.entries import Entry


def conv(inputs, outputs, kernel=3, stride=1, groups=1):
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)


def group_norm(channels):
    return nn.GroupNorm(4, channels)


class PaddedShortcut(nn.Module):
    """Option A: every other pixel, and zero channels on both sides."""

    def __init__(self, more):
        super().__init__()
        self.more = more

    def forward(self, x):
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.more // 2, self.more - self.more // 2))


def shortcut(kind, inputs, outputs, stride, norm):
    if inputs == outputs and stride == 1:
        return nn.Sequential()
    if kind == "A":
        return PaddedShortcut(outputs - inputs) if stride > 1 else nn.Sequential()
    if kind == "D" and stride > 1:
        pool = nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False)
        return nn.Sequential(pool, conv(inputs, outputs, 1), norm(outputs))
    return nn.Sequential(conv(inputs, outputs, 1, stride), norm(outputs))


class Basic(nn.Module):
    grows = 1

    def __init__(self, inputs, width, stride, kind, norm, groups=1):
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, width, 3, stride), norm(width)
        self.conv2, self.bn2 = conv(width, width), norm(width)
        self.shortcut = shortcut(kind, inputs, width, stride, norm)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += self.shortcut(x)
        return F.relu(y)


class Bottleneck(nn.Module):
    grows = 4

    def __init__(self, inputs, width, stride, kind, norm, groups=1):
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, width, 1), norm(width)
        self.conv2, self.bn2 = conv(width, width, 3, stride, groups), norm(width)
        self.conv3, self.bn3 = conv(width, 4 * width, 1), norm(4 * width)
        self.relu = nn.ReLU(inplace=False)
        self.shortcut = shortcut(kind, inputs, 4 * width, stride, norm)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return self.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


class PreActivation(nn.Module):
    grows = 1

    def __init__(self, inputs, width, stride, kind, norm, groups=1):
        super().__init__()
        self.bn1, self.conv1 = norm(inputs), conv(inputs, width, 3, stride)
        self.bn2, self.conv2 = norm(width), conv(width, width)
        self.shortcut = None if inputs == width and stride == 1 else conv(inputs, width, 1, stride)

    def forward(self, x):
        y = torch.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        return self.conv2(torch.relu(self.bn2(self.conv1(y)))).add(shortcut)


class ResNet(nn.Module):
    def __init__(self, block, depths, width, kind="B", norm=nn.BatchNorm2d, groups=1, small=False, classes=10):
        super().__init__()
        self.small, self.pre = small, block is PreActivation
        if small:
            self.stem = nn.Sequential(conv(3, width), *([] if self.pre else [norm(width), nn.ReLU(True)]))
        elif kind in "CD":  # three small kernels for one large
            parts = [conv(3, width // 2, 3, 2), norm(width // 2), nn.ReLU(True), conv(width // 2, width // 2)]
            parts += [norm(width // 2), nn.ReLU(True), conv(width // 2, width), norm(width), nn.ReLU(True)]
            self.stem = nn.Sequential(*parts)
        else:
            self.stem = nn.Sequential(conv(3, width, 7, 2), norm(width), nn.ReLU(True))
        self.pool = nn.MaxPool2d(3, 2, 1)
        layers, channels = [], width
        for i, depth in enumerate(depths):
            for j in range(depth):
                stride = 2 if i and not j else 1
                layers.append(block(channels, width * 2**i, stride, kind, norm, groups))
                channels = block.grows * width * 2**i
        self.layers, self.last = nn.Sequential(*layers), norm(channels) if self.pre else nn.Identity()
        self.head = nn.Linear(channels, classes)

    def forward(self, x):
        x = self.stem(x)
        x = self.layers(x if self.small else self.pool(x))
        if self.pre:
            x = torch.relu(self.last(x))
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


CIFAR, IMAGENET = (2, 3, 16, 16), (2, 3, 32, 32)
ENTRIES = [
    Entry(
        "ResNet A, basic",
        lambda: ResNet(Basic, (2, 2, 2), 8, "A", small=True),
        CIFAR,
        99,
        lambda: ResNet(Basic, (9, 9, 9), 16, "A", small=True),
        (2, 3, 32, 32),
    ),
    Entry(
        "ResNet B, basic", lambda: ResNet(Basic, (1, 2, 1), 8), IMAGENET, 99, lambda: ResNet(Basic, (2, 2, 2, 2), 64)
    ),
    Entry(
        "ResNet B, bottleneck",
        lambda: ResNet(Bottleneck, (1, 2), 8),
        IMAGENET,
        99,
        lambda: ResNet(Bottleneck, (3, 4, 6, 3), 64),
    ),
    Entry(
        "ResNet C, basic",
        lambda: ResNet(Basic, (1, 1), 8, "C"),
        IMAGENET,
        99,
        lambda: ResNet(Basic, (3, 4, 6, 3), 64, "C"),
    ),
    Entry(
        "ResNet D, bottleneck",
        lambda: ResNet(Bottleneck, (1, 1), 8, "D"),
        IMAGENET,
        99,
        lambda: ResNet(Bottleneck, (3, 4, 6, 3), 64, "D"),
    ),
    Entry(
        "ResNet, pre-activation",
        lambda: ResNet(PreActivation, (1, 2), 8, small=True),
        CIFAR,
        99,
        lambda: ResNet(PreActivation, (3, 3, 3), 64, small=True),
        (2, 3, 32, 32),
    ),
    Entry(
        "ResNeXt",
        lambda: ResNet(Bottleneck, (1, 1), 8, groups=4),
        IMAGENET,
        99,
        lambda: ResNet(Bottleneck, (3, 4, 6, 3), 128, groups=32),
        run=2,
    ),
    Entry(
        "ResNet, group norms",
        lambda: ResNet(Basic, (1, 1), 8, norm=group_norm, small=True),
        CIFAR,
        52,
        lambda: ResNet(Basic, (2, 2, 2, 2), 64, norm=group_norm),
        mainstream=False,
    ),
]
