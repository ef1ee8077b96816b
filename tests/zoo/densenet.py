"""Densely connected networks: every layer reads all that came before it."""

import torch
import torch.nn.functional as F
from torch import nn

from zoo.entries import Entry


class Dense(nn.Module):
    def __init__(self, inputs, growth, wide):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, wide * growth, 1, bias=False)
        self.norm2, self.conv2 = (
            nn.BatchNorm2d(wide * growth),
            nn.Conv2d(wide * growth, growth, 3, padding=1, bias=False),
        )

    def forward(self, features):
        x = self.conv1(F.relu(self.norm1(torch.cat(features, 1))))
        return self.conv2(F.relu(self.norm2(x)))


class Block(nn.Module):
    def __init__(self, count, inputs, growth, wide):
        super().__init__()
        self.layers = nn.ModuleList(Dense(inputs + i * growth, growth, wide) for i in range(count))

    def forward(self, x):
        features = [x]
        for layer in self.layers:
            features.append(layer(features))
        return torch.cat(features, 1)


class DenseNet(nn.Module):
    def __init__(self, depths, growth, stem, wide=4, classes=10):
        super().__init__()
        parts = [nn.Conv2d(3, stem, 7, 2, 3, bias=False), nn.BatchNorm2d(stem), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
        channels = stem
        for i, depth in enumerate(depths):
            parts.append(Block(depth, channels, growth, wide))
            channels += depth * growth
            parts += [nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
            if i < len(depths) - 1:
                parts += [nn.Conv2d(channels, channels // 2, 1, bias=False), nn.AvgPool2d(2)]
                channels //= 2
        self.features, self.head = nn.Sequential(*parts), nn.Linear(channels, classes)

    def forward(self, x):
        return self.head(F.adaptive_avg_pool2d(self.features(x), (1, 1)).flatten(1))


ENTRIES = [
    Entry(
        "DenseNet",
        lambda: DenseNet((2, 3), 6, 8, 2),
        (2, 3, 32, 32),
        99,
        lambda: DenseNet((6, 12, 24, 16), 32, 64),
    ),
]
