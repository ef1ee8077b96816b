"""MobileNet v1 to v3 and EfficientNet: depthwise convolutions, linear bottlenecks, squeeze and excitation."""

import torch.nn.functional as F
from torch import nn

from zoo.entries import Entry


def unit(inputs, outputs, kernel, stride=1, groups=1, act=nn.ReLU6):
    """A convolution, its norm and, unless ``act`` is None, an activation."""
    layers = [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*layers, *([] if act is None else [act()]))


class Squeeze(nn.Module):
    """Squeeze and excitation by 1x1 convolutions."""

    def __init__(self, channels, less, act=nn.ReLU, gate=nn.Sigmoid):
        super().__init__()
        self.pool, self.reduce, self.act = nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, less, 1), act()
        self.expand, self.gate = nn.Conv2d(less, channels, 1), gate()

    def forward(self, x):
        return x * self.gate(self.expand(self.act(self.reduce(self.pool(x)))))


class SqueezeByLinear(nn.Module):
    """The same by linear layers and views."""

    def __init__(self, channels, less):
        super().__init__()
        self.reduce, self.expand = nn.Linear(channels, less), nn.Linear(less, channels)

    def forward(self, x):
        n, c = x.shape[:2]
        y = F.relu(self.reduce(F.adaptive_avg_pool2d(x, 1).view(n, c)))
        return x * F.hardsigmoid(self.expand(y)).view(n, c, 1, 1)


class Inverted(nn.Module):
    """Expand, convolve each channel by itself, project."""

    def __init__(self, inputs, wide, outputs, kernel, stride, act=nn.ReLU6, squeeze=None):
        super().__init__()
        layers = [unit(inputs, wide, 1, act=act)] if wide != inputs else []
        layers += [unit(wide, wide, kernel, stride, wide, act)]
        layers += [squeeze(wide)] if squeeze else []
        self.layers, self.adds = (
            nn.Sequential(*layers, unit(wide, outputs, 1, act=None)),
            stride == 1 and inputs == outputs,
        )

    def forward(self, x):
        return x + self.layers(x) if self.adds else self.layers(x)


class Mobile(nn.Module):
    """A stem, blocks, a last 1x1 convolution and a linear head."""

    def __init__(self, stem, blocks, last, classes, act, hidden=0, by_linear=False):
        super().__init__()
        head = [nn.Linear(last, hidden), act(), nn.Dropout(0.2)] if hidden else [nn.Dropout(0.2)]
        self.features = nn.Sequential(stem, *blocks)
        self.head = nn.Sequential(*head, nn.Linear(hidden or last, classes))

    def forward(self, x):
        return self.head(self.features(x).mean([2, 3]))


def mobilenet1(width=32, strides=(1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1), classes=10):
    growth = (2, 4, 4, 8, 8, 16, 16, 16, 16, 16, 16, 32, 32)
    blocks, channels = [], width
    for times, stride in zip(growth, strides, strict=False):
        blocks += [unit(channels, channels, 3, stride, channels), unit(channels, width * times, 1)]
        channels = width * times
    return Mobile(unit(3, width, 3, 2), blocks, channels, classes, nn.ReLU6)


def mobilenet2(settings, stem=32, last=1280, classes=10):
    """Take (factor, channels, count, stride) for each stage."""
    blocks, channels = [], stem
    for factor, out, count, stride in settings:
        for i in range(count):
            blocks.append(Inverted(channels, channels * factor, out, 3, 1 if i else stride))
            channels = out
    return Mobile(unit(3, stem, 3, 2), [*blocks, unit(channels, last, 1)], last, classes, nn.ReLU6)


def mobilenet3(settings, stem=16, last=960, hidden=1280, classes=10):
    """Take (kernel, wide, channels, squeezed or not, hard swish or not, stride) for each block."""
    blocks, channels = [], stem
    for kernel, wide, out, squeezed, hard, stride in settings:
        act = nn.Hardswish if hard else nn.ReLU
        squeeze = (lambda c: Squeeze(c, max(4, c // 4), gate=nn.Hardsigmoid)) if squeezed else None
        blocks.append(Inverted(channels, wide, out, kernel, stride, act, squeeze))
        channels = out
    stem_unit = unit(3, stem, 3, 2, act=nn.Hardswish)
    return Mobile(stem_unit, [*blocks, unit(channels, last, 1, act=nn.Hardswish)], last, classes, nn.Hardswish, hidden)


def efficientnet(settings, stem=32, last=1280, classes=10, by_linear=False):
    """Take (factor, channels, count, stride, kernel) for each stage."""
    blocks, channels = [], stem
    for factor, out, count, stride, kernel in settings:
        for i in range(count):
            less = max(1, channels // 4)

            def squeeze(wide, less=less):
                return SqueezeByLinear(wide, less) if by_linear else Squeeze(wide, less, nn.SiLU)

            blocks.append(Inverted(channels, channels * factor, out, kernel, 1 if i else stride, nn.SiLU, squeeze))
            channels = out
    return Mobile(
        unit(3, stem, 3, 2, act=nn.SiLU), [*blocks, unit(channels, last, 1, act=nn.SiLU)], last, classes, nn.SiLU
    )


V2 = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
V3 = (
    (3, 16, 16, 0, 0, 1), (3, 64, 24, 0, 0, 2), (3, 72, 24, 0, 0, 1), (5, 72, 40, 1, 0, 2), (5, 120, 40, 1, 0, 1),
    (5, 120, 40, 1, 0, 1), (3, 240, 80, 0, 1, 2), (3, 200, 80, 0, 1, 1), (3, 184, 80, 0, 1, 1), (3, 184, 80, 0, 1, 1),
    (3, 480, 112, 1, 1, 1), (3, 672, 112, 1, 1, 1), (5, 672, 160, 1, 1, 2),
    (5, 960, 160, 1, 1, 1), (5, 960, 160, 1, 1, 1),
)  # fmt: skip
B0 = (
    (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5), (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)  # fmt: skip
SHAPE = (2, 3, 32, 32)
ENTRIES = [
    Entry("MobileNet v1", lambda: mobilenet1(6, (1, 2, 1)), SHAPE, 97, mobilenet1),
    Entry(
        "MobileNet v2",
        lambda: mobilenet2(((1, 8, 1, 1), (3, 8, 2, 1), (3, 12, 2, 2)), 8, 32),
        SHAPE,
        96,
        lambda: mobilenet2(V2),
    ),
    Entry(
        "MobileNet v3",
        lambda: mobilenet3(((3, 8, 8, 0, 0, 1), (3, 24, 12, 1, 0, 2), (5, 36, 12, 1, 1, 1)), 8, 24, 16),
        SHAPE,
        96,
        lambda: mobilenet3(V3),
    ),
    Entry(
        "EfficientNet",
        lambda: efficientnet(((1, 8, 1, 1, 3), (3, 12, 2, 2, 5)), 8, 24),
        SHAPE,
        96,
        lambda: efficientnet(B0),
    ),
    Entry(
        "EfficientNet, linear squeeze",
        lambda: efficientnet(((1, 8, 1, 1, 3), (3, 12, 2, 2, 5)), 8, 24, by_linear=True),
        SHAPE,
        96,
        lambda: efficientnet(B0, by_linear=True),
    ),
]
