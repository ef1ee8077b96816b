"""Networks that answer for every pixel or at every scale: U-Net, and the backbone of a detector."""

import itertools

import torch
import torch.nn.functional as F
from torch import nn

from zoo.entries import Entry
from zoo.resnet import Basic, Bottleneck


def double(inputs, outputs):
    layers = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(True)]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Down, up again by transposed convolutions or by interpolation, and across."""

    def __init__(self, width=64, depth=4, transposed=True, classes=2):
        super().__init__()
        widths = [width * 2**i for i in range(depth + 1)]
        self.first, self.transposed = double(3, width), transposed
        pairs = list(itertools.pairwise(widths))
        self.down = nn.ModuleList(double(less, more) for less, more in pairs)
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(more, less, 2, stride=2) if transposed else nn.Conv2d(more, less, 1)
            for less, more in reversed(pairs)
        )
        self.merge = nn.ModuleList(double(2 * less, less) for less, _ in reversed(pairs))
        self.last = nn.Conv2d(width, classes, 1)

    def forward(self, x):
        x = self.first(x)
        across = []
        for down in self.down:
            across.append(x)
            x = down(F.max_pool2d(x, 2))
        for up, merge, other in zip(self.up, self.merge, reversed(across), strict=True):
            if not self.transposed:
                x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            x = merge(torch.cat([other, up(x)], dim=1))
        return self.last(x)


class Pyramid(nn.Module):
    """A residual network whose stages are joined from the top down."""

    def __init__(self, block, depths, width, outputs):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(True), nn.MaxPool2d(3, 2, 1)
        )
        stages, channels, widths = [], width, []
        for i, depth in enumerate(depths):
            blocks = []
            for j in range(depth):
                blocks.append(block(channels, width * 2**i, 2 if i and not j else 1, "B", nn.BatchNorm2d))
                channels = block.grows * width * 2**i
            stages.append(nn.Sequential(*blocks))
            widths.append(channels)
        self.stages = nn.ModuleList(stages)
        self.lateral = nn.ModuleList(nn.Conv2d(one, outputs, 1) for one in widths)
        self.smooth = nn.ModuleList(nn.Conv2d(outputs, outputs, 3, padding=1) for _ in widths)

    def forward(self, x):
        x, maps = self.stem(x), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        top, found = self.lateral[-1](maps[-1]), {}
        found[f"p{len(maps)}"] = self.smooth[-1](top)
        for i in reversed(range(len(maps) - 1)):
            across = self.lateral[i](maps[i])
            top = across + F.interpolate(top, size=across.shape[-2:], mode="nearest")
            found[f"p{i + 1}"] = self.smooth[i](top)
        found["coarse"] = F.max_pool2d(found[f"p{len(maps)}"], 1, 2)
        return found


ENTRIES = [
    Entry("U-Net, transposed", lambda: UNet(6, 2), (2, 3, 16, 16), 99, UNet, (1, 3, 64, 64), heads=("last",)),
    Entry(
        "U-Net, upsampled",
        lambda: UNet(6, 2, False),
        (2, 3, 16, 16),
        99,
        lambda: UNet(transposed=False),
        (1, 3, 64, 64),
        heads=("last",),
    ),
    Entry(
        "Detector's pyramid",
        lambda: Pyramid(Basic, (1, 1, 1), 6, 8),
        (2, 3, 32, 32),
        99,
        lambda: Pyramid(Bottleneck, (3, 4, 6, 3), 64, 256),
        heads=("smooth.0", "smooth.1", "smooth.2", "smooth.3"),
    ),
]
