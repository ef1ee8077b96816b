"""ConvNeXt: layer norms over the channels, which tie all of them together."""

import torch
from torch import nn

from zoo.entries import Entry


class LastNorm(nn.LayerNorm):
    """A layer norm over the channels of a map."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.wide, self.narrow = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.act, self.scale = nn.GELU(), nn.Parameter(torch.full((channels,), 0.1))

    def forward(self, x):
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.narrow(self.act(self.wide(y)))
        return x + y.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    def __init__(self, depths, widths, classes=10):
        super().__init__()
        layers = [nn.Conv2d(3, widths[0], 4, 4), LastNorm(widths[0])]
        for i, depth in enumerate(depths):
            if i:
                layers += [LastNorm(widths[i - 1]), nn.Conv2d(widths[i - 1], widths[i], 2, 2)]
            layers += [Block(widths[i]) for _ in range(depth)]
        self.layers, self.norm, self.head = (
            nn.Sequential(*layers),
            nn.LayerNorm(widths[-1]),
            nn.Linear(widths[-1], classes),
        )

    def forward(self, x):
        return self.head(self.norm(self.layers(x).mean((-2, -1))))


ENTRIES = [
    Entry(
        "ConvNeXt",
        lambda: ConvNeXt((1, 1), (8, 12)),
        (2, 3, 32, 32),
        0,
        lambda: ConvNeXt((3, 3, 9, 3), (96, 192, 384, 768)),
        mainstream=False,
    ),
]
